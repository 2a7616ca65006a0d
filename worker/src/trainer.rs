//! The training loop: one, readable from top to bottom.
//!
//! A generation connects its ranks, checks the store, loads the base or a checkpoint, and then runs
//! step after step: this rank's samples, forward and backward in micro-batches, the sum of all
//! gradients, one decision that all ranks take alike, AdamW, a report, and a checkpoint when one is
//! due. Losses are sums over targets and are divided once, by the number of targets of all ranks.

mod error;
mod micro;
mod policy;
mod start;
mod tally;

use std::{rc::Rc, time::Instant};

use supra_agent::{CheckpointWritten, Formed, Job, Outcome, Phase, StepReport, Voided};
use supra_data::{Batch, Loader, Prefetch};
use supra_recipes::{
    Plan,
    plan::{VERSION, memory::gib},
};

pub use error::TrainError;
pub use micro::{HostBatch, Layout, LayoutError};
use start::Start;
pub use start::check_data;
use tally::Tally;

use crate::{
    checkpoint::{
        self, Environment,
        manifest::{FORMAT, Seeds},
        store,
        write::Contents,
    },
    collective::{self, DeviceCollective},
    device::{self, Place},
    failure::chain,
    kernels::{self, Choice, Kernels},
    model::ModelConfig,
    optim::{AdamW, Replica, clip},
    step::{Step, StepError},
};

/// Steps whose samples are read ahead.
const READ_AHEAD: usize = 2;

/// Trains one generation of a run until it ends, one way or the other. `build` is the program's version and commit.
pub fn train(job: Job, place: &Place, build: &str) -> Outcome {
    let link = job.link.clone();
    match Trainer::form(job, place, build).and_then(Trainer::run) {
        Ok(outcome) => outcome,
        // Whatever broke: in a void generation it broke because of that.
        Err(_) if link.void() => Outcome::Voided,
        Err(TrainError::Void(_)) => Outcome::Voided,
        Err(error) => Outcome::Fault {
            kind: error.fault_kind(),
            message: chain(&error),
        },
    }
}

/// A rank at work.
struct Trainer {
    job: Job,
    place: Place,
    environment: Environment,
    collective: Box<dyn DeviceCollective>,
    plan: Plan,
    batches: Prefetch<Result<HostBatch, LayoutError>>,
    dataset: DatasetFacts,
    config: ModelConfig,
    kernels: Rc<dyn Kernels>,
    passes: Step,
    replica: Replica,
    adamw: AdamW,
    /// Step that the replica's state is behind.
    step: u64,
    /// Skipped steps in a row.
    skipped: u32,
}

/// What checkpoints say about the data.
struct DatasetFacts {
    hash: String,
    tokenizer: String,
}

impl Trainer {
    /// Connects the ranks, checks the store, loads the state and tells the coordinator.
    fn form(mut job: Job, place: &Place, build: &str) -> Result<Trainer, TrainError> {
        job.link.phase(Phase::Forming, 0);
        let mut host = job.connect()?;
        store::probe(&job.checkpoint_root, job.generation, host.as_mut())?;
        let collective = collective::connect(host, place, job.recipe.reduction, &job.link)?;

        job.link.phase(Phase::Loading, 0);
        let environment = Environment {
            build: build.to_owned(),
            libtorch: device::LIBTORCH.to_owned(),
            device: if place.device.is_cuda() {
                "cuda"
            } else {
                "cpu"
            }
            .to_owned(),
            model: place.model.clone(),
            threads: place.threads,
        };
        let Start {
            plan,
            reader,
            config,
            policy,
            replica,
            step,
            notes,
        } = Start::load(&job, place, &environment)?;
        if job.rank == 0 {
            notes.iter().for_each(|note| job.link.log("WARN", note));
        }
        let manifest = reader.manifest();
        let dataset = DatasetFacts {
            hash: blake3::Hash::from_bytes(manifest.hash())
                .to_hex()
                .to_string(),
            tokenizer: manifest.tokenizer_hash().to_owned(),
        };
        job.link.formed(Formed {
            step,
            replica_hash: replica.hash().to_vec(),
            windows: plan.windows,
            manifest_hash: manifest.hash().to_vec(),
        });
        let kind = replica.params().kind();
        let Choice { kernels, note } = kernels::on(place.device, kind, &config)?;
        if job.rank == 0 {
            note.iter().for_each(|note| job.link.log("WARN", note));
        }
        let loader = Loader::new(reader, plan.clone());
        let layout = Layout {
            vocabulary: config.vocab,
            reset_at_document: job.recipe.data.reset_at_document,
            rows: job.recipe.batch.micro_batch.max(1) as usize,
            device: place.device,
        };
        let lay_out = move |batch: Batch| layout.lay_out(&batch.samples);
        Ok(Trainer {
            batches: Prefetch::start(loader, step + 1, job.rank, job.world, READ_AHEAD, lay_out),
            adamw: AdamW::new(&job.recipe.optimizer, job.recipe.seed),
            passes: Step::new(config.clone(), kernels.clone(), policy, place.device),
            config,
            kernels,
            skipped: 0,
            place: place.clone(),
            job,
            environment,
            collective,
            plan,
            dataset,
            replica,
            step,
        })
    }

    /// Trains to the end of the budget, or to the step at which a stop is agreed on.
    fn run(mut self) -> Result<Outcome, TrainError> {
        while self.step < self.plan.steps {
            let step = self.step + 1;
            self.job.link.phase(Phase::Training, step);
            let clock = Instant::now();

            let waiting = Instant::now();
            let batch = self.next_batch(step)?;
            let data_seconds = waiting.elapsed().as_secs_f64();
            let loss_sum = self.forward_backward(&batch)?;

            let waiting = Instant::now();
            self.replica.reduce_gradient(self.collective.as_mut())?;
            let mine = Tally {
                loss_sum,
                targets: batch.targets,
                grad_norm: self.kernels.squared_norm(&self.replica.gradient).sqrt(),
                stop: self.job.link.stop_requested(),
            };
            let all = mine.gather(self.collective.host())?;
            let comm_seconds = waiting.elapsed().as_secs_f64();

            let mut report = self.update(step, &batch, &all)?;
            self.step = step;
            report.data_seconds = data_seconds;
            report.comm_seconds = comm_seconds;
            report.seconds = clock.elapsed().as_secs_f64();
            let grad_norm = report.grad_norm;
            self.job.link.step(report);

            if self.skipped > self.job.recipe.nonfinite.max {
                let steps = self.skipped;
                return Err(TrainError::Diverged {
                    steps,
                    step,
                    loss_sum: all.loss_sum,
                    targets: all.targets,
                    grad_norm,
                });
            }
            let last = step == self.plan.steps;
            if all.stop || self.plan.checkpoint_due(step) {
                self.checkpoint(all.stop || last)?;
            }
            if all.stop && !last {
                return self.leave(Outcome::Stopped);
            }
        }
        self.leave(Outcome::Finished)
    }

    /// Parts from the other ranks in order.
    fn leave(self, outcome: Outcome) -> Result<Outcome, TrainError> {
        // What libtorch has taken it keeps, so this is the most that there was.
        if let Some(bytes) = self.place.memory_in_use() {
            let text = format!("memory of the GPU in use: {bytes} bytes, {}", gib(bytes));
            self.job.link.log("INFO", text);
        }
        self.collective.finish()?;
        Ok(outcome)
    }

    fn next_batch(&mut self, step: u64) -> Result<HostBatch, TrainError> {
        match self.batches.next() {
            Some(Ok((number, batch))) if number == step => Ok(batch?),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(_)) | None => Err(TrainError::NoBatch { step }),
        }
    }

    /// Forward and backward over this rank's samples; their gradients end up summed in the replica. Returns the sum of the
    /// loss over targets.
    fn forward_backward(&mut self, batch: &HostBatch) -> Result<f64, TrainError> {
        let Job { recipe, link, .. } = &self.job;
        self.replica.zero_gradient();
        for input in batch.micro_batches() {
            if link.void() {
                return Err(Voided.into());
            }
            self.passes
                .accumulate(
                    self.replica.params(),
                    self.replica.gradients(),
                    &input,
                    recipe.optimizer.z_loss,
                    &|| link.void(),
                )
                .map_err(|error| match error {
                    StepError::Stopped => Voided.into(),
                    StepError::Kernel(error) => TrainError::Kernel(error),
                })?;
        }
        Ok(self.passes.take_loss().cross_entropy)
    }

    /// Applies the agreed gradient, or skips the step everywhere if it is not finite, and says so.
    fn update(
        &mut self,
        step: u64,
        fed: &HostBatch,
        all: &Tally,
    ) -> Result<StepReport, TrainError> {
        let scale = 1.0 / all.targets as f64;
        let grad_norm = all.grad_norm * scale;
        let skip = !(all.loss_sum * scale).is_finite() || !grad_norm.is_finite();
        let learning_rate = self.plan.learning_rate(step);
        if skip {
            self.skipped += 1;
        } else {
            self.skipped = 0;
            let clip = clip::coefficient(grad_norm, self.job.recipe.optimizer.clip);
            self.adamw.update(
                self.kernels.as_ref(),
                &mut self.replica,
                learning_rate,
                scale * clip,
            );
        }
        // Of the norm, too: one that could not be had is NaN.
        self.kernels.check()?;
        let samples = self.plan.step_samples(step);
        let hash_due = self.plan.replica_check_due(step);
        Ok(StepReport {
            step,
            first_sample: samples.start,
            samples: samples.end - samples.start,
            fed_samples: fed.samples,
            fed_digest: fed.digest.as_bytes().to_vec(),
            loss_sum: all.loss_sum,
            targets: all.targets,
            grad_norm,
            learning_rate,
            skipped: skip,
            replica_hash: if hash_due {
                self.replica.hash().to_vec()
            } else {
                Vec::new()
            },
            ..StepReport::default()
        })
    }

    /// Writes a checkpoint of the step just done. With `wait`, returns when it is published, on all ranks.
    fn checkpoint(&mut self, wait: bool) -> Result<(), TrainError> {
        self.job.link.phase(Phase::Checkpointing, self.step);
        if self.job.rank == 0 {
            self.sweep();
            self.write_checkpoint()?;
            if wait {
                self.job.link.await_published(self.step)?;
            }
        }
        if wait {
            self.collective.host().barrier()?;
        }
        Ok(())
    }

    fn write_checkpoint(&self) -> Result<(), TrainError> {
        let clock = Instant::now();
        let (job, recipe) = (&self.job, &self.job.recipe);
        let ledger_head = job.link.ledger_head(self.step)?;
        let manifest = checkpoint::Manifest {
            format: FORMAT,
            plan_version: VERSION,
            run: job.run.clone(),
            generation: job.generation,
            world: job.world,
            step: self.step,
            tokens: self.plan.tokens_after(self.step),
            next_sample: self.plan.step_samples(self.step).end,
            updates: self.replica.updates,
            seeds: Seeds {
                init: recipe.seed,
                data: recipe.data.seed,
            },
            replica_hash: blake3::Hash::from_bytes(self.replica.hash())
                .to_hex()
                .to_string(),
            ledger_head: blake3::Hash::from_bytes(ledger_head).to_hex().to_string(),
            recipe: recipe.to_yaml(),
            dataset: self.dataset.hash.clone(),
            tokenizer: self.dataset.tokenizer.clone(),
            environment: self.environment.clone(),
            tensors: Default::default(),
            files: Default::default(),
        };
        let contents = Contents {
            replica: &self.replica,
            config: &self.config,
            base: recipe.base.directory(),
            manifest,
        };
        let receipt = checkpoint::write::write(&job.checkpoint_root, contents)?;
        job.link.checkpoint_written(CheckpointWritten {
            step: self.step,
            path: receipt.relative,
            bytes: receipt.bytes,
            manifest_hash: receipt.manifest_hash.to_vec(),
            seconds: clock.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Removes what crashed writers left. That it could not is worth a line, not the run.
    fn sweep(&self) {
        let job = &self.job;
        let spare = job.restore.as_ref().map(|restore| restore.path.as_path());
        if let Err(error) = store::sweep(&job.checkpoint_root, job.generation, spare) {
            let root = job.checkpoint_root.display();
            job.link.log(
                "WARN",
                format!("cannot remove unfinished checkpoints in {root}: {error}"),
            );
        }
    }
}
