//! The training loop: one, readable from top to bottom.
//!
//! A generation connects its ranks, checks the store, takes the state that some of them kept or loads
//! the base or a checkpoint, and then runs step after step: this rank's samples, forward and backward in micro-batches, meanwhile the sum of
//! all gradients, one decision that all ranks take alike, AdamW, a report, and the held-out loss and a checkpoint where they
//! are due. Losses are sums over targets and are divided once, by the number of targets of all ranks.

mod beside;
mod environment;
mod error;
mod evaluation;
mod host_memory;
mod kept;
mod micro;
mod policy;
mod replay;
mod saving;
mod snapshots;
mod start;
mod tally;
mod witness;

use std::{rc::Rc, time::Instant};

use supra_agent::{FaultKind, Formed, Job, Outcome, Phase, StepReport, Voided};
use supra_checkpoint::Environment;
use supra_data::{Batch, Loader, Prefetch};
use supra_recipes::{
    Plan,
    plan::{memory::gib, snapshots::every},
};
use tch::Tensor;

use beside::Beside;
use environment::environment;
pub use error::TrainError;
use evaluation::Heldout;
pub use kept::Kept;
pub use micro::{HostBatch, Layout, LayoutError};
use replay::MicroLoss;
pub use replay::{MicroBatch, Replayed, replay};
use saving::{Begun, saver};
use snapshots::Snapshots;
use start::Start;
pub use start::check_data;
use tally::{Tally, Wish};

use crate::{
    checkpoint::{probe, saver::Saver},
    collective,
    device::Place,
    failure::chain,
    kernels::Kernels,
    model::ModelConfig,
    optim::{AdamW, Exchange, Part, Prints, Replica, clip},
    step::Step,
};

/// Steps whose samples are read ahead.
const READ_AHEAD: usize = 2;

/// Trains one generation of a run until it ends, one way or the other. `build` is the program's version and commit. `kept`
/// is what this process has in memory of an earlier generation, and gets what it has of this one, if another generation may
/// start from it; the link is told, too.
pub fn train(job: Job, place: &Place, build: &str, kept: &mut Option<Kept>) -> Outcome {
    train_with(job, place, build, kept, |kernels| kernels)
}

/// [`train`] with other kernels: `wrap` gets those that the device has, and gives those that compute.
pub fn train_with(
    mut job: Job,
    place: &Place,
    build: &str,
    kept: &mut Option<Kept>,
    wrap: impl FnOnce(Rc<dyn Kernels>) -> Rc<dyn Kernels>,
) -> Outcome {
    let (link, rank) = (job.link.clone(), job.rank);
    kept.iter_mut().for_each(|kept| kept.enter(&job));
    let ended = match Trainer::form(&mut job, place, build, kept, wrap) {
        Ok(trainer) => trainer.run(kept),
        Err(error) => Err(error),
    };
    let outcome = match ended {
        Ok(outcome) => outcome,
        Err(error @ TrainError::Hardware { .. }) => Outcome::Hardware {
            culprit: error.culprit(),
            message: chain(&error),
        },
        // Whatever else broke: in a void generation it broke because of that.
        Err(_) if link.void() => Outcome::Voided,
        Err(TrainError::Void(_)) => Outcome::Voided,
        Err(error) => Outcome::Fault {
            kind: error.fault_kind(),
            message: chain(&error),
        },
    };
    if !goes_on(&outcome, rank) {
        *kept = None;
    }
    kept.iter().for_each(|kept| link.held(kept.held()));
    outcome
}

/// Whether another generation may go on from where this one ended, by what this rank has. What is in the memory of a broken
/// device is not to be trusted.
fn goes_on(outcome: &Outcome, rank: u32) -> bool {
    match outcome {
        Outcome::Regrouped | Outcome::Voided => true,
        Outcome::Finished | Outcome::Stopped => false,
        Outcome::Fault { kind, .. } => {
            matches!(kind, FaultKind::Transient | FaultKind::Peer)
        }
        Outcome::Hardware { culprit, .. } => *culprit != Some(rank),
    }
}

/// A rank at work.
struct Trainer<'a> {
    job: &'a Job,
    place: Place,
    environment: Environment,
    // Before the replica, whose memory it works on until it is dropped.
    exchange: Exchange,
    /// Copies of the parts of the state; none where every rank has all of it.
    snapshots: Option<Snapshots>,
    plan: Plan,
    layout: Layout,
    batches: Prefetch<Result<HostBatch, LayoutError>>,
    dataset: DatasetFacts,
    /// None where nothing is measured.
    heldout: Option<Heldout>,
    config: ModelConfig,
    kernels: Rc<dyn Kernels>,
    passes: Step,
    replica: Replica,
    /// The part of the gradient whose squares this rank adds up.
    squared: Vec<Tensor>,
    adamw: AdamW,
    /// Writes this rank's part of checkpoints.
    saver: Saver,
    /// The checkpoint that is under way: on rank 0.
    begun: Option<Begun>,
    /// Step that the replica's state is behind.
    step: u64,
    /// Whether an update was begun and not ended: then the state is behind no step.
    torn: bool,
    /// Of the step at which a replay ends.
    micro_losses: Vec<MicroLoss>,
}

/// What checkpoints say about the data.
struct DatasetFacts {
    hash: String,
    tokenizer: String,
}

impl<'a> Trainer<'a> {
    /// Connects the ranks, checks the store, takes or loads the state and tells the coordinator.
    fn form(
        job: &'a mut Job,
        place: &Place,
        build: &str,
        kept: &mut Option<Kept>,
        wrap: impl FnOnce(Rc<dyn Kernels>) -> Rc<dyn Kernels>,
    ) -> Result<Trainer<'a>, TrainError> {
        job.link.phase(Phase::Forming, 0);
        let mut host = job.connect()?;
        let aside = match every(&job.recipe, job.world) {
            0 => None,
            _ => job.connect_aside(host.as_mut())?,
        };
        let job: &Job = job;
        if job.until.is_none() {
            probe::probe(&job.checkpoint_root, job.generation, host.as_mut())?;
        }
        let mut collective = collective::connect(host, place, job.recipe.reduction, &job.link)?;

        job.link.phase(Phase::Loading, 0);
        let environment = environment(place, job.world, build);
        let Start {
            plan,
            reader,
            config,
            policy,
            kernels,
            replica,
            step,
            notes,
            heldout,
        } = Start::load(job, place, &environment, kept, collective.as_mut())?;
        if job.rank == 0 {
            notes.iter().for_each(|note| job.link.log("WARN", note));
        }
        let kernels = wrap(kernels);
        let manifest = reader.manifest();
        let dataset = DatasetFacts {
            hash: blake3::Hash::from_bytes(manifest.hash())
                .to_hex()
                .to_string(),
            tokenizer: manifest.tokenizer_hash().to_owned(),
        };
        let mut exchange = Exchange::new(collective, &replica);
        job.link.formed(Formed {
            step,
            replica_hash: replica.hash(kernels.as_ref(), exchange.host())?.to_vec(),
            windows: plan.windows,
            manifest_hash: manifest.hash().to_vec(),
        });
        let before = kept.take().map(Kept::into_snapshots).unwrap_or_default();
        let snapshots = Snapshots::start(job, aside, step, before)?;
        let saver = saver(job, &replica)?;
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
            torn: false,
            micro_losses: Vec::new(),
            place: place.clone(),
            environment,
            exchange,
            snapshots,
            plan,
            layout,
            dataset,
            heldout,
            saver,
            begun: None,
            squared: replica.gradient_of(Part::of_rank(job.rank, job.world)),
            replica,
            step,
            job,
        })
    }

    /// Trains until the generation ends, and leaves it.
    fn run(mut self, kept: &mut Option<Kept>) -> Result<Outcome, TrainError> {
        let ended = self.train();
        self.leave(ended, kept)
    }

    /// Trains to the end of the budget, or to the step at which a stop or another membership is agreed on.
    fn train(&mut self) -> Result<Outcome, TrainError> {
        self.evaluate()?;
        self.catch_up()?;
        if self.job.donation.is_some() {
            // What it starts from is nowhere as often as it should be.
            self.snapshot()?;
        }
        let last = self.job.until.unwrap_or(self.plan.steps);
        while self.step < last {
            let step = self.step + 1;
            self.job.link.phase(Phase::Training, step);
            let clock = Instant::now();

            let waiting = Instant::now();
            let batch = self.next_batch(step)?;
            let data_seconds = waiting.elapsed().as_secs_f64();
            let loss_sum = self.forward_backward(&batch)?;

            let mine = Tally {
                loss_sum,
                targets: batch.targets,
                squares: self.kernels.squared_norm(&self.squared),
                digest: batch.digest,
                wish: Wish::of(&self.job.link),
                unsettled: !self.settled()?,
                unsaved: !self.saver.settled()?,
            };
            let waiting = Instant::now();
            let all = mine.gather(self.exchange.host())?;
            let mut exposed = waiting.elapsed() + self.exchange.stalled()?;
            if !all.is_finite() {
                self.witness(&batch, &mine, step)?;
            }

            let mut report = self.update(step, &batch, &all)?;
            exposed += self.exchange.stalled()?;
            report.data_seconds = data_seconds;
            report.exposed_comm_ms = exposed.as_secs_f64() * 1e3;
            report.seconds = clock.elapsed().as_secs_f64();
            let grad_norm = report.grad_norm;
            self.job.link.step(report);

            self.check_progress(&all, grad_norm)?;
            let end = match all.wish {
                _ if step == last => Some(Outcome::Finished),
                Wish::Stop => Some(Outcome::Stopped),
                Wish::Regroup => Some(Outcome::Regrouped),
                Wish::GoOn | Wish::Checkpoint => None,
            };
            self.evaluate()?;
            if end == Some(Outcome::Regrouped) {
                self.snapshot_for_the_next()?;
            } else if end.is_none() && !all.unsettled && self.snapshot_due() {
                self.snapshot()?;
            }
            if !all.unsaved && self.saver.under_way().is_some() {
                self.collect_checkpoint()?;
            }
            let due =
                matches!(all.wish, Wish::Stop | Wish::Checkpoint) || self.plan.checkpoint_due(step);
            if due && self.job.until.is_none() {
                self.checkpoint()?;
            }
            if let Some(end) = end {
                self.finish_checkpoint()?;
                return Ok(end);
            }
        }
        self.finish_checkpoint()?;
        Ok(Outcome::Finished)
    }

    /// Parts from the other ranks, in order if all went well. Keeps a state that is whole where another generation may need
    /// it.
    fn leave(
        self,
        ended: Result<Outcome, TrainError>,
        kept: &mut Option<Kept>,
    ) -> Result<Outcome, TrainError> {
        // What libtorch has taken it keeps, so this is the most that there was.
        if let (Ok(_), Some(bytes)) = (&ended, self.place.memory_in_use()) {
            let text = format!("memory of the GPU in use: {bytes} bytes, {}", gib(bytes));
            self.job.link.log("INFO", text);
        }
        let ended = match ended {
            Ok(outcome) => match self.exchange.finish() {
                Ok(()) => Ok(outcome),
                Err(error) => Err(error.into()),
            },
            Err(error) => {
                // Nothing works on the replica's memory after this.
                drop(self.exchange);
                Err(error)
            }
        };
        if ended.is_err() {
            // Nobody waits for what other ranks may never send.
            self.job.link.abort_handle().abort();
        }
        let snapshots = self.snapshots.map(Snapshots::finish).unwrap_or_default();
        let spent = matches!(ended, Ok(Outcome::Finished | Outcome::Stopped));
        if !spent {
            *kept = Kept::parts(self.job, snapshots);
        }
        if !self.torn && !spent {
            let whole = Kept::whole(self.job, self.step, self.replica, self.kernels.as_ref());
            *kept = whole.or(kept.take());
        }
        ended
    }

    fn next_batch(&mut self, step: u64) -> Result<HostBatch, TrainError> {
        match self.batches.next() {
            Some(Ok((number, batch))) if number == step => Ok(batch?),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(_)) | None => Err(TrainError::NoBatch { step }),
        }
    }

    /// Forward and backward over this rank's samples; in the end the replica has its part of the gradients' sum over all
    /// ranks. Returns the sum of the loss over targets.
    fn forward_backward(&mut self, batch: &HostBatch) -> Result<f64, TrainError> {
        let Job { recipe, link, .. } = self.job;
        self.replica.zero_gradient();
        let mut micro_batches = batch.micro_batches();
        while let Some(input) = micro_batches.next() {
            if link.void() {
                return Err(Voided.into());
            }
            self.passes.accumulate(
                self.replica.params(),
                self.replica.gradients(),
                &input,
                recipe.optimizer.z_loss,
                &mut Beside {
                    link,
                    exchange: &mut self.exchange,
                    last: micro_batches.len() == 0,
                },
            )?;
            if self.job.until == Some(self.step + 1) {
                let loss = MicroLoss::after(&self.passes, &input);
                self.micro_losses.push(loss);
            }
        }
        // A rank that was fed nothing has waited for no parameters yet.
        self.exchange.all_gathered()?;
        self.exchange.reduced()?;
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
        let grad_norm = all.grad_norm();
        let skip = !all.is_finite();
        let learning_rate = self.plan.learning_rate(step);
        self.torn = true;
        if skip {
            self.replica.skipped += 1;
        } else {
            self.replica.skipped = 0;
            let clip = clip::coefficient(grad_norm, self.job.recipe.optimizer.clip);
            self.adamw.update(
                self.kernels.as_ref(),
                &mut self.replica,
                learning_rate,
                scale * clip,
                |bucket| self.exchange.gather(bucket),
            )?;
        }
        // Of the norm, too: one that could not be had is NaN.
        self.kernels.check()?;
        self.step = step;
        self.torn = false;
        let samples = self.plan.step_samples(step);
        let (replica_hash, bucket_hashes) = if self.plan.replica_check_due(step) {
            let Prints { whole, buckets } = self.prints()?;
            (whole.to_vec(), buckets)
        } else {
            Default::default()
        };
        Ok(StepReport {
            step,
            first_sample: samples.start,
            samples: samples.end - samples.start,
            fed_samples: fed.samples,
            fed_digest: fed.digest.as_bytes().to_vec(),
            step_digest: all.digest.as_bytes().to_vec(),
            loss_sum: all.loss_sum,
            targets: all.targets,
            grad_norm,
            learning_rate,
            skipped: skip,
            replica_hash,
            bucket_hashes,
            ..StepReport::default()
        })
    }

    /// Refuses to go on when too many steps in a row were skipped; `all` is of the last one.
    fn check_progress(&self, all: &Tally, grad_norm: f64) -> Result<(), TrainError> {
        let steps = self.replica.skipped;
        if steps <= self.job.recipe.nonfinite.max {
            return Ok(());
        }
        Err(TrainError::Diverged {
            steps,
            step: self.step,
            loss_sum: all.loss_sum,
            targets: all.targets,
            grad_norm,
        })
    }

    /// [`Replica::prints`] of what the step just done left.
    fn prints(&mut self) -> Result<Prints, TrainError> {
        self.exchange.all_gathered()?;
        let (kernels, host) = (self.kernels.as_ref(), self.exchange.host());
        Ok(self.replica.prints(kernels, host)?)
    }
}
