//! What follows from a recipe, evaluated alike by coordinator and workers: which samples a step holds, which windows
//! they are, the learning rate, and when checkpoints and evaluations are due. Pure functions of the recipe and the dataset's size and hash.

mod checkpoint_copy;
mod digest;
mod flat;
pub mod memory;
mod needs;
mod order;
mod policy;
mod probe;
mod shape;
mod sizes;
pub mod snapshots;

use std::ops::Range;

pub use checkpoint_copy::CheckpointCopy;
pub use digest::Digest;
pub use memory::Memory;
pub use needs::{Fit, Needs, Rank};
pub use order::Pool;
pub use policy::Policy;
pub use probe::probe;
pub use shape::{ModelShape, ShapeError};
pub use snapshots::Snapshots;

use crate::schema::Recipe;
use order::Order;

/// Version of the plan: changes whenever any function of this module changes its result.
pub const VERSION: u32 = 1;

/// A budget that the dataset cannot serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Not even one window.
    #[error(
        "the dataset holds no window of {sequence_length} tokens: tokenize more text, or choose a smaller batch.sequence_length"
    )]
    Empty {
        /// Tokens per window.
        sequence_length: u64,
    },
    /// Fewer windows than the budget's samples.
    #[error(
        "the budget takes {samples} samples of {sequence_length} tokens but the dataset holds {windows}: lower the budget, add data, or set data.repeat: true"
    )]
    Short {
        /// Samples of the budget.
        samples: u64,
        /// Windows of the dataset.
        windows: u64,
        /// Tokens per window.
        sequence_length: u64,
    },
    /// Not even one sample.
    #[error("the budget of {budget} tokens is smaller than one sample of {sequence_length} tokens")]
    Budget {
        /// Tokens of the budget.
        budget: u64,
        /// Tokens per sample.
        sequence_length: u64,
    },
}

/// The evaluated recipe: every step of the run, computed on demand.
///
/// Steps count from 1; samples and windows from 0. A step outside `1..=steps` holds no samples.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Tokens per sample.
    pub sequence_length: u64,
    /// Samples per full step.
    pub batch_samples: u64,
    /// Samples of the whole budget.
    pub samples: u64,
    /// Steps of the whole budget; the last may be smaller.
    pub steps: u64,
    /// Windows per pass over the dataset.
    pub windows: u64,
    order: Order,
    lr: f64,
    final_lr: f64,
    warmup_tokens: u64,
    checkpoint_tokens: u64,
    replica_check_steps: u64,
    /// None: the run is not evaluated.
    evaluation_tokens: Option<u64>,
}

impl Plan {
    /// Plans `recipe` over a dataset of `windows` windows whose manifest hashes to `manifest_hash`.
    ///
    /// # Errors
    /// When the dataset holds no window, or fewer than the budget's samples without `data.repeat`.
    pub fn new(recipe: &Recipe, windows: u64, manifest_hash: [u8; 32]) -> Result<Plan, PlanError> {
        let sequence_length = u64::from(recipe.batch.sequence_length.max(1));
        let budget = recipe.budget.tokens();
        let samples = budget / sequence_length;
        if samples == 0 {
            return Err(PlanError::Budget {
                budget,
                sequence_length,
            });
        }
        if windows == 0 {
            return Err(PlanError::Empty { sequence_length });
        }
        if windows < samples && !recipe.data.repeat {
            return Err(PlanError::Short {
                samples,
                windows,
                sequence_length,
            });
        }
        let batch_samples = recipe.batch.samples().max(1);
        Ok(Plan {
            sequence_length,
            batch_samples,
            samples,
            steps: samples.div_ceil(batch_samples),
            windows,
            order: Order::new(windows, manifest_hash, sequence_length, recipe.data.seed),
            lr: recipe.optimizer.lr,
            final_lr: recipe.optimizer.final_lr,
            warmup_tokens: recipe
                .optimizer
                .warmup
                .tokens(batch_samples * sequence_length)
                .unwrap_or(u64::MAX),
            checkpoint_tokens: recipe.checkpoint.every_tokens.tokens().unwrap_or(u64::MAX),
            replica_check_steps: recipe.replica_check.every_steps.max(1),
            evaluation_tokens: recipe.eval.as_ref().map(|eval| eval.every_tokens.get()),
        })
    }

    /// Samples of step `step`.
    pub fn step_samples(&self, step: u64) -> Range<u64> {
        self.samples_after(step.saturating_sub(1))..self.samples_after(step)
    }

    /// Samples of step `step` that rank `rank` of `world` trains: contiguous, the remainder goes to the first ranks.
    pub fn rank_samples(&self, step: u64, rank: u32, world: u32) -> Range<u64> {
        let all = self.step_samples(step);
        let (rank, world) = (u64::from(rank), u64::from(world.max(1)));
        let (share, rest) = ((all.end - all.start) / world, (all.end - all.start) % world);
        let first_of = |rank: u64| all.end.min(all.start + rank * share + rank.min(rest));
        first_of(rank)..first_of(rank + 1)
    }

    /// The window that sample `sample` is. Sample numbers run on over passes; each pass has its own order.
    pub fn window(&self, sample: u64) -> u64 {
        self.order.window(sample)
    }

    /// The pool that sample `sample` is drawn from.
    pub fn pool_of(&self, sample: u64) -> Pool {
        self.order.pool_of(sample)
    }

    /// Tokens trained when step `step` is done.
    pub fn tokens_after(&self, step: u64) -> u64 {
        self.samples_after(step) * self.sequence_length
    }

    /// Learning rate of step `step`: linear in tokens up to `lr`, then a cosine that reaches `final_lr` with the last step.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let (done, warmup) = (self.tokens_after(step), self.warmup_tokens);
        if done < warmup {
            return self.lr * (done as f64 / warmup as f64);
        }
        let end = self.samples * self.sequence_length;
        if end <= warmup {
            return self.lr;
        }
        let progress = (done - warmup) as f64 / (end - warmup) as f64;
        // Weighed like this, both ends come out exactly; libm's cosine has the same bits on every machine.
        let rest = 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress));
        self.lr * rest + self.final_lr * (1.0 - rest)
    }

    /// Whether a checkpoint is due after step `step`: it reached a multiple of `checkpoint.every_tokens`, or is the last. With
    /// `auto` only the last is; the coordinator asks for the others.
    pub fn checkpoint_due(&self, step: u64) -> bool {
        step == self.steps || self.reaches_multiple(step, self.checkpoint_tokens)
    }

    /// Whether the state behind step `step` is evaluated: step 0 is before the first, then those that reach a multiple of
    /// `eval.every_tokens`, then the last.
    pub fn evaluation_due(&self, step: u64) -> bool {
        self.evaluation_tokens.is_some_and(|tokens| {
            step == 0 || step == self.steps || self.reaches_multiple(step, tokens)
        })
    }

    /// Whether replicas compare their parameters after step `step`.
    pub fn replica_check_due(&self, step: u64) -> bool {
        step == self.steps || (step > 0 && step.is_multiple_of(self.replica_check_steps))
    }

    /// Whether the tokens trained reach a multiple of `tokens` with step `step`.
    fn reaches_multiple(&self, step: u64, tokens: u64) -> bool {
        let count = |step: u64| self.tokens_after(step) / tokens.max(1);
        count(step) > count(step.saturating_sub(1))
    }

    fn samples_after(&self, step: u64) -> u64 {
        step.saturating_mul(self.batch_samples).min(self.samples)
    }
}
