//! A recipe that breaks its own workers: with real processes, and the mark that it ends with.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use supra_tests::process::{Output, run};
use supra_tests::{Result, TinyRecipe};

use crate::Stage;

/// For a run with faults that last seconds.
const LIMIT: Duration = Duration::from_secs(180);

/// Trains a recipe by `supra up` with two workers; its output and its receipt.
fn up(stage: &Stage, recipe: &TinyRecipe) -> Result<(Output, Value)> {
    let path = recipe.write(&stage.fixture)?;
    let state = stage.directory.path().join(&recipe.name);
    let mut command = stage.programs.supra();
    command.arg("up").arg(&path);
    command.args(["--workers", "2", "--device", "cpu", "--state"]);
    command.arg(&state);
    let output = run(command, LIMIT)?;
    let runs = fs::read_dir(state.join("runs"))?;
    let mut receipt = Value::Null;
    for run in runs {
        let file = run?.path().join("checkpoints").join("receipt.json");
        receipt = serde_json::from_slice(&fs::read(file)?)?;
    }
    Ok((output, receipt))
}

#[test]
fn a_run_that_stands_its_chaos_passes_and_says_what_it_stood() -> Result<()> {
    let stage = Stage::new()?;
    let recipe = TinyRecipe {
        name: "chaos".to_owned(),
        // Long enough for the first fault on a fast machine; the others come as soon as the run has recovered.
        budget: 512 * 600,
        checkpoint_every: 512 * 100,
        workers: (1, 2),
        repeat: true,
        more: "chaos: { faults: 4, every: 1 s, kinds: [kill, drain, stop], seed: 3 }\n".to_owned(),
        ..TinyRecipe::default()
    };
    let (output, receipt) = up(&stage, &recipe)?;
    output.expect_code(0)?.expect_words(&[
        "breaks its own workers on purpose",
        "Chaos passed: 4 faults survived",
    ])?;
    let chaos = &receipt["chaos"];
    assert_eq!(chaos["mark"]["passed"], true, "{chaos}");
    let faults = chaos["faults"].as_array().map(Vec::len);
    assert_eq!(faults, Some(4), "{chaos}");
    Ok(())
}

#[test]
fn a_run_without_room_for_its_chaos_fails_its_mark_with_exit_code_4() -> Result<()> {
    let stage = Stage::new()?;
    let recipe = TinyRecipe {
        name: "short".to_owned(),
        more: "chaos: { faults: 50, every: 30 s }\n".to_owned(),
        ..TinyRecipe::default()
    };
    let (output, receipt) = up(&stage, &recipe)?;
    output
        .expect_code(4)?
        .expect_words(&["finished", "Chaos failed: only 0 of 50 faults fitted"])?;
    assert_eq!(receipt["outcome"], "finished");
    assert_eq!(receipt["chaos"]["mark"]["passed"], false);
    Ok(())
}
