//! A step run again: `supra-worker replay` is started beside this program, since only it has libtorch.

use std::path::Path;
use std::process::Stdio;

use serde::Deserialize;
use tokio::process::Command;

use crate::cli::checkpoints::Checkpoint;
use crate::cli::failure::{Exit, Failure};
use crate::cli::format;
use crate::cli::up::launch::Programs;

/// What the worker answers.
#[derive(Debug, Deserialize)]
pub struct Answer {
    /// Step, generation and workers of the checkpoint.
    pub from_step: u64,
    pub generation: u64,
    pub world: u32,
    pub device: String,
    /// What keeps the bits from being those of the checkpoint's generation.
    pub differences: Vec<String>,
    /// The steps behind the checkpoint, in order.
    pub steps: Vec<Step>,
    /// Of the last step, in order.
    pub micro_batches: Vec<Micro>,
}

/// A step that was run again.
#[derive(Debug, Deserialize)]
pub struct Step {
    pub step: u64,
    pub first_sample: u64,
    pub samples: u64,
    /// What was fed, hexadecimal.
    pub digest: String,
    pub skipped: bool,
    pub loss: Number,
    pub grad_norm: Number,
    pub learning_rate: Number,
}

/// A micro-batch that was run again.
#[derive(Debug, Deserialize)]
pub struct Micro {
    pub first_sample: u64,
    pub samples: u64,
    pub targets: u64,
    /// Mean over the targets, nats; none when it is not finite.
    pub loss: Option<f64>,
}

/// A number, to the bit. Decimal digits on their way through JSON may not be.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "Bits")]
pub struct Number(pub f64);

#[derive(Deserialize)]
struct Bits {
    bits: String,
}

impl TryFrom<Bits> for Number {
    type Error = std::num::ParseIntError;

    fn try_from(Bits { bits }: Bits) -> Result<Number, Self::Error> {
        u64::from_str_radix(&bits, 16).map(|bits| Number(f64::from_bits(bits)))
    }
}

/// Where to compute, as `supra-worker` takes it.
#[derive(clap::Args, Clone, Debug)]
pub struct Compute {
    /// Where --rerun computes: cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", requires = "rerun")]
    device: String,
    /// Threads of one operation on the processor [default: as many as the run had]
    #[arg(long, value_name = "N", requires = "rerun")]
    threads: Option<u32>,
}

/// Trains the steps behind a checkpoint up to `step` again. When the worker cannot, it has said why on stderr, and its exit
/// code is ours.
///
/// # Errors
/// A worker that is missing, cannot be started, or answers something else.
pub async fn run(
    from: &Checkpoint,
    step: u64,
    data: &Path,
    compute: &Compute,
) -> Result<Result<Answer, Exit>, Failure> {
    let programs = Programs::beside_this_one()?;
    programs.probe().await?;
    let worker = programs.worker.display();
    let mut command = Command::new(&programs.worker);
    command
        .arg("replay")
        .arg("--checkpoint")
        .arg(&from.path)
        .arg("--manifest-hash")
        .arg(format::hex(&from.manifest_hash))
        .args(["--step", &step.to_string()])
        .arg("--data")
        .arg(data)
        .args(["--device", &compute.device])
        .args(compute.threads.iter().flat_map(|threads| {
            let threads = threads.to_string();
            ["--threads".to_owned(), threads]
        }))
        .arg("--json")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let cannot = |error| Failure::failed(format!("cannot run {worker}: {error}."));
    let started = command.spawn().map_err(cannot)?;
    let output = started.wait_with_output().await.map_err(cannot)?;
    match output.status.code() {
        Some(0) => {
            let answer = serde_json::from_slice(&output.stdout).map_err(|error| {
                Failure::failed(format!(
                    "`{worker} replay` answers something else than this program reads: {error}. Build both from one commit."
                ))
            })?;
            Ok(Ok(answer))
        }
        Some(2) => Ok(Err(Exit::Input)),
        Some(4) => Ok(Err(Exit::Broken)),
        Some(_) => Ok(Err(Exit::Failed)),
        None => Err(Failure::failed(format!(
            "`{worker} replay` was ended by {}.",
            output.status
        ))),
    }
}
