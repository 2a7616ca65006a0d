//! `supra-worker replay`: steps of a run again, from one of its checkpoints.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
};

use clap::Args;
use serde::{Serialize, Serializer};
use supra_agent::{FaultKind, StepReport};
use supra_checkpoint::{Manifest, Store, verify};
use supra_proto::BUILD;
use supra_recipes::Recipe;
use supra_worker::trainer::{self, MicroBatch, Replayed, TrainError};

use super::{failure::Failure, options::DeviceOptions, out};

/// Trains the steps behind a checkpoint again, up to one of them, alone and without a coordinator, and prints what they came
/// to: what was fed, loss, gradient norm, learning rate, and the loss of every micro-batch of the last step. Nothing is
/// written. `supra replay --rerun` compares it with what the run logged.
#[derive(Debug, Args)]
pub struct Replay {
    /// Directory or URL of one checkpoint (`supra checkpoints` lists them)
    #[arg(long, value_name = "DIR|URL")]
    checkpoint: String,
    /// Last step to train
    #[arg(long, value_name = "STEP")]
    step: u64,
    /// BLAKE3 that the checkpoint's manifest has to have, hexadecimal [default: any]
    #[arg(long, value_name = "HASH")]
    manifest_hash: Option<blake3::Hash>,
    /// Where the training data is [default: where the run's recipe says]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The JSON answer; `supra replay` reads it.
#[derive(Serialize)]
struct Answer<'a> {
    run: &'a str,
    /// The checkpoint's step, generation and workers.
    from_step: u64,
    generation: u64,
    world: u32,
    device: String,
    /// What keeps the bits from being those of the checkpoint's generation.
    differences: &'a [String],
    steps: Vec<Step>,
    /// Of the last step.
    micro_batches: Vec<Micro>,
}

#[derive(Serialize)]
struct Step {
    step: u64,
    first_sample: u64,
    samples: u64,
    /// Sum of the digests of what was fed, hexadecimal.
    digest: String,
    targets: u64,
    skipped: bool,
    /// Mean over the targets, nats.
    loss: Number,
    /// L2 norm of the gradient of the mean loss before clipping.
    grad_norm: Number,
    learning_rate: Number,
}

#[derive(Serialize)]
struct Micro {
    first_sample: u64,
    samples: u64,
    targets: u64,
    /// Mean over the targets, nats; `null` when it is not finite.
    loss: Option<f64>,
}

/// A number to compare to the bit, which readers of JSON may round: its value, `null` when it is not finite, and its bits.
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bits = format!("{:016x}", self.0.to_bits());
        serde_json::json!({ "value": self.0, "bits": bits }).serialize(serializer)
    }
}

impl Replay {
    /// Trains and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let store = &Store::open(&self.checkpoint)?;
        let hash = match &self.manifest_hash {
            Some(hash) => *hash.as_bytes(),
            None => verify::manifest_hash(store, "")?,
        };
        let manifest = verify::manifest(store, "", Some(&hash))?;
        let mut recipe = Recipe::parse(&manifest.recipe, &manifest.run)
            .map_err(|error| Failure::input(error.to_string()))?;
        if let Some(data) = self.data {
            recipe.data.train = data;
        }
        // Bits depend on the threads: those of the run, unless asked otherwise.
        let options = DeviceOptions {
            threads: self.device.threads.or(Some(manifest.environment.threads)),
            ..self.device
        };
        let place = options.open()?;
        let (first, last) = (manifest.step + 1, self.step);
        let show = std::io::stderr().is_terminal();
        let progress = |report: &StepReport| {
            if show {
                let end = if report.step == last { "\n" } else { "" };
                let _ = write!(
                    std::io::stderr(),
                    "\rstep {} of {first} to {last}{end}",
                    report.step
                );
            }
        };
        let replayed = trainer::replay(
            store,
            (&manifest, hash),
            recipe,
            last,
            (&place, BUILD),
            progress,
        )
        .map_err(failure)?;
        let device = place.name().to_string();
        if self.json {
            out::json(&answer(&manifest, device, &replayed))
        } else {
            out::write(&render(&manifest, &replayed))
        }
    }
}

/// Whoever has to act on a fault of training, as exit codes say it.
fn failure(error: TrainError) -> Failure {
    match error {
        TrainError::Checkpoint(error) => error.into(),
        error => match error.fault_kind() {
            FaultKind::Input => Failure::input(supra_worker::failure::chain(&error)),
            _ => Failure::failed(supra_worker::failure::chain(&error)),
        },
    }
}

fn answer<'a>(manifest: &'a Manifest, device: String, replayed: &'a Replayed) -> Answer<'a> {
    let step = |report: &StepReport| Step {
        step: report.step,
        first_sample: report.first_sample,
        samples: report.samples,
        digest: hex(&report.step_digest),
        targets: report.targets,
        skipped: report.skipped,
        loss: Number(mean(report.loss_sum, report.targets)),
        grad_norm: Number(report.grad_norm),
        learning_rate: Number(report.learning_rate),
    };
    let micro = |micro: &MicroBatch| Micro {
        first_sample: micro.first_sample,
        samples: micro.samples,
        targets: micro.targets,
        loss: Some(mean(micro.loss_sum, micro.targets)).filter(|loss| loss.is_finite()),
    };
    Answer {
        run: &manifest.run,
        from_step: manifest.step,
        generation: manifest.generation,
        world: manifest.world,
        device,
        differences: &replayed.differences,
        steps: replayed.steps.iter().map(step).collect(),
        micro_batches: replayed.micro_batches.iter().map(micro).collect(),
    }
}

fn render(manifest: &Manifest, replayed: &Replayed) -> String {
    let mut text = format!("run {} from step {}\n", manifest.run, manifest.step);
    for difference in &replayed.differences {
        text += &format!("  not as the checkpoint's generation: {difference}\n");
    }
    for step in &replayed.steps {
        let skipped = if step.skipped { ", skipped" } else { "" };
        text += &format!(
            "step {}: loss {:.6}, gradient norm {:.6}, learning rate {:e}, {} targets{skipped}, fed {}\n",
            step.step,
            mean(step.loss_sum, step.targets),
            step.grad_norm,
            step.learning_rate,
            step.targets,
            hex(&step.step_digest)
        );
    }
    for micro in &replayed.micro_batches {
        text += &format!(
            "  samples {} to {}: loss {:.6} over {} targets\n",
            micro.first_sample,
            micro.first_sample + micro.samples - 1,
            mean(micro.loss_sum, micro.targets),
            micro.targets
        );
    }
    text
}

/// As the coordinator logs it.
fn mean(sum: f64, targets: u64) -> f64 {
    sum / targets as f64
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
