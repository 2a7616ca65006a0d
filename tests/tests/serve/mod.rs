//! `supra-worker serve`, as its clients and those who run it see it.

mod answers;
mod errors;
mod life;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use supra_tests::models::{convert, quickstart};
use supra_tests::process::run;
use supra_tests::{Programs, Result, Server};
use tempfile::TempDir;

use crate::LIMIT;

/// For a slot to come free, or a reader to be given up.
const SOON: Duration = Duration::from_secs(20);

/// Programs, a SUPRA model that nobody has trained, and a directory that goes away. Its text is gibberish of many scripts.
struct Stage {
    programs: Programs,
    model: PathBuf,
    directory: TempDir,
}

impl Stage {
    fn new() -> Result<Stage> {
        let programs = Programs::find()?;
        let directory = tempfile::tempdir()?;
        let model = directory.path().join("supra");
        convert(&programs, &quickstart("base"), &model)?;
        Ok(Stage {
            programs,
            model,
            directory,
        })
    }

    fn serve(&self, options: &[&str]) -> Result<Server> {
        Server::start(&self.programs, self.directory.path(), &self.model, options)
    }

    /// What the command line makes of a prompt, greedily.
    fn generate(&self, model: &Path, prompt: &str, tokens: u32) -> Result<String> {
        let mut command = self.programs.worker();
        command.args([
            "generate",
            "--json",
            "--temperature",
            "0",
            "--prompt",
            prompt,
        ]);
        command.args(["--max-tokens", &tokens.to_string()]);
        command.arg("--model").arg(model);
        let output = run(command, LIMIT)?.expect_code(0)?;
        let answer: Value = serde_json::from_str(&output.stdout)?;
        Ok(text(&answer["text"]))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("not a string").to_owned()
}

/// A request whose answer takes long.
fn long(tokens: u32) -> Value {
    // Nothing ends it early.
    json!({ "prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 1.5, "seed": 1, "stream": true, "top_k": 1 })
}
