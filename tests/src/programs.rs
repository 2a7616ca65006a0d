//! Where the programs under test are: beside this executable, as cargo lays them out.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::failure::{Failure, Result};

/// The three programs, all of one build.
#[derive(Clone, Debug)]
pub struct Programs {
    directory: PathBuf,
    environment: Vec<(String, PathBuf)>,
}

impl Programs {
    /// Finds `target/PROFILE` from `target/PROFILE/prove` or `target/PROFILE/deps/main-HASH`.
    pub fn find() -> Result<Self> {
        let executable = std::env::current_exe()?;
        let beside = executable.parent().unwrap_or(Path::new("/"));
        let directory = if beside.ends_with("deps") {
            beside.parent().unwrap_or(beside)
        } else {
            beside
        };
        let programs = Self {
            directory: directory.to_owned(),
            environment: Vec::new(),
        };
        for name in ["supra", "supra-coordinator", "supra-worker"] {
            if !programs.directory.join(name).is_file() {
                return Err(Failure::new(format!(
                    "{} is not there; build it with `cargo build --workspace --bins`",
                    programs.directory.join(name).display()
                )));
            }
        }
        Ok(programs)
    }

    /// The same programs with one more variable in their environment.
    pub fn with(&self, name: &str, value: &Path) -> Self {
        let mut programs = self.clone();
        programs
            .environment
            .push((name.to_owned(), value.to_owned()));
        programs
    }

    /// The command line.
    pub fn supra(&self) -> Command {
        self.command("supra")
    }

    /// The server.
    pub fn coordinator(&self) -> Command {
        self.command("supra-coordinator")
    }

    /// The compute program.
    pub fn worker(&self) -> Command {
        self.command("supra-worker")
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.directory.join(name));
        // What the user's shell says must not reach the tests.
        for name in [
            "COORDINATOR",
            "LISTEN",
            "LOCAL_WORKERS",
            "STATE",
            "TOKEN_FILE",
        ] {
            command.env_remove(format!("SUPRA_{name}"));
        }
        command.envs(self.environment.iter().cloned());
        command
    }
}

/// Root of the repository: the one that this was built from, or, on another machine, where the scripts run everything.
pub fn repository() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
        match built_from.filter(|root| root.is_dir()) {
            Some(root) => root.to_owned(),
            None => std::env::current_dir().unwrap_or_default(),
        }
    });
    &ROOT
}
