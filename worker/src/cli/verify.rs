//! `supra-worker verify`: whether a model directory is what was written.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use supra_checkpoint::sums;

use super::{failure::Failure, out};

/// Reads every file of a model that `export` or `convert` has written and compares its BLAKE3 with that in BLAKE3SUMS beside it; ends
/// with 4 when one is altered, missing or new. `b3sum --check BLAKE3SUMS` does nearly the same without this program.
#[derive(Debug, Args)]
pub struct Verify {
    /// Model directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The JSON answer.
#[derive(Serialize)]
struct Answer<'a> {
    dir: &'a Path,
    files: u64,
    bytes: u64,
}

impl Verify {
    /// Hashes, compares and tells.
    pub fn execute(self) -> Result<(), Failure> {
        let sums::Proved { files, bytes } = sums::verify(&self.dir)?;
        if self.json {
            return out::json(&Answer {
                dir: &self.dir,
                files,
                bytes,
            });
        }
        out::line(&format!(
            "{}: {files} files of {bytes} bytes together, all as they were written",
            self.dir.display()
        ))
    }
}
