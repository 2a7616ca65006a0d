//! Steps seen again: the one loop, alone, from a checkpoint up to a step, with nothing written.

use std::thread;

use supra_agent::{
    Job, Restore, StepReport,
    collective::Solo,
    link::{self, Report},
};
use supra_checkpoint::{Manifest, Store};
use supra_recipes::{Plan, Recipe};
use tch::Kind;

use super::{TrainError, Trainer, environment::environment, start::differences};
use crate::{device::Place, model::LossInput, step::Step};

/// What a replay came to.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// The steps behind the checkpoint's, in order.
    pub steps: Vec<StepReport>,
    /// Of the last step, in order.
    pub micro_batches: Vec<MicroBatch>,
    /// What keeps the bits from being those of the run, as far as the checkpoint knows; empty if nothing does.
    pub differences: Vec<String>,
}

/// One micro-batch of a step, before the step's update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MicroBatch {
    /// Number of its first sample.
    pub first_sample: u64,
    /// Samples in it.
    pub samples: u64,
    /// Targets that count.
    pub targets: u64,
    /// Sum of the cross-entropy over them, nats. Not a number from the first micro-batch on that has none.
    pub loss_sum: f64,
}

/// What a micro-batch left behind.
#[derive(Clone, Copy, Debug)]
pub struct MicroLoss {
    targets: u64,
    /// With those of the micro-batches before it: the step's sum must not be formed in another order.
    loss_sum: f64,
}

impl MicroLoss {
    /// When `passes` have just been over `input`.
    pub fn after(passes: &Step, input: &LossInput) -> MicroLoss {
        MicroLoss {
            targets: input.mask_bt.sum(Kind::Int64).int64_value(&[]) as u64,
            loss_sum: passes.cross_entropy_so_far(),
        }
    }
}

/// Trains `recipe`, which is the manifest's with paths that hold here, from the checkpoint that `store` is to step `until`, and
/// hands every step to `tell` when it is done. `build` is the program's version and commit.
///
/// # Errors
///
/// `Checkpoint` when the manifest does not hash to `manifest_hash`, or a file is not what it says; `Mismatch` when `until` is
/// not behind the checkpoint, or beyond the plan; those of training.
pub fn replay(
    store: &Store,
    (manifest, manifest_hash): (&Manifest, [u8; 32]),
    recipe: Recipe,
    until: u64,
    (place, build): (&Place, &str),
    mut tell: impl FnMut(&StepReport) + Send,
) -> Result<Replayed, TrainError> {
    if until <= manifest.step {
        return Err(TrainError::Mismatch(format!(
            "{} is the state behind step {}: only later steps can be run from there, not step {until}. Take an earlier \
             checkpoint",
            store.url(),
            manifest.step
        )));
    }
    let restore = Restore {
        step: manifest.step,
        store: store.clone(),
        path: String::new(),
        manifest_hash,
    };
    let (link, _control, mut reports) = link::pair();
    let alone = Box::new(Solo);
    let mut job = Job::local(
        manifest.run.as_str(),
        recipe,
        Some(restore),
        store.clone(),
        link,
        alone,
    );
    job.generation = manifest.generation;
    job.until = Some(until);
    let differences = differences(manifest, &environment(place, job.world, build), job.world);
    thread::scope(|scope| {
        let listening = scope.spawn(move || {
            let mut steps = Vec::new();
            while let Some(report) = reports.recv() {
                if let Report::Step(step) = report {
                    tell(&step);
                    steps.push(step);
                }
            }
            steps
        });
        // On this thread, which has opened the device. The link goes with the job, and the listener with the link.
        let trained = train(job, place, build);
        let steps = listening
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(Replayed {
            steps,
            micro_batches: trained?,
            differences,
        })
    })
}

fn train(mut job: Job, place: &Place, build: &str) -> Result<Vec<MicroBatch>, TrainError> {
    let mut trainer = Trainer::form(&mut job, place, build, &mut None, |kernels| kernels)?;
    let Trainer { plan, job, .. } = &trainer;
    let until = job.until.unwrap_or(plan.steps);
    if until > plan.steps {
        return Err(TrainError::Mismatch(format!(
            "there is no step {until}: the run has steps 1 to {}",
            plan.steps
        )));
    }
    trainer.train()?;
    let rows = u64::from(trainer.job.recipe.batch.micro_batch.max(1));
    Ok(cut(&trainer.plan, until, rows, &trainer.micro_losses))
}

/// Gives each micro-batch of `rows` samples its own part of the sums.
fn cut(plan: &Plan, step: u64, rows: u64, losses: &[MicroLoss]) -> Vec<MicroBatch> {
    let samples = plan.step_samples(step);
    let firsts = samples.clone().step_by(rows as usize);
    let mut before = 0.0;
    let micro_batch = |(first_sample, loss): (u64, &MicroLoss)| {
        let loss_sum = loss.loss_sum - before;
        before = loss.loss_sum;
        MicroBatch {
            first_sample,
            samples: rows.min(samples.end - first_sample),
            targets: loss.targets,
            loss_sum,
        }
    };
    firsts.zip(losses).map(micro_batch).collect()
}
