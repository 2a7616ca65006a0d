//! Whole trainings: from a recipe to the last checkpoint of a run whose ledger was audited.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cluster::{Cluster, Device};
use crate::failure::{Result, While};
use crate::models::Text;

const LIMIT: Duration = Duration::from_secs(600);
/// More steps of warmup are of no use to models of this size.
const MOST_WARMUP: u64 = 200;

/// What trainings that are compared have in common.
#[derive(Clone, Copy)]
pub struct Training<'a> {
    /// Where they run.
    pub cluster: &'a Cluster,
    /// Kind of the workers' devices: bf16 on GPUs; fp32 on processors, many of which multiply bf16 ten times slower.
    pub device: Device,
    /// Ranks.
    pub ranks: u32,
    /// What they train on, as often as the budget takes.
    pub text: &'a Text,
    /// How large their steps are.
    pub steps: Steps,
    /// For the recipes.
    pub directory: &'a Path,
}

/// The size of a training's steps.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// Tokens of a step.
    pub tokens: u64,
    /// Samples of a micro-batch.
    pub micro_batch: u32,
    /// Tokens of a sample.
    pub length: u32,
    /// The highest learning rate.
    pub lr: &'static str,
}

impl Steps {
    /// For a processor that has seconds.
    pub const QUICK: Steps = Steps {
        tokens: 2048,
        micro_batch: 8,
        length: 128,
        lr: "5e-3",
    };
}

/// A training that has ended.
#[derive(Clone, Debug)]
pub struct Trained {
    /// Its last checkpoint.
    pub checkpoint: PathBuf,
    /// Tokens trained.
    pub tokens: u64,
    /// In training steps alone.
    pub tokens_per_second: f64,
}

impl Training<'_> {
    /// Trains `base`, as a recipe has it, with `attention` on `budget` tokens. Warmup is a twentieth of them.
    pub fn run(&self, name: &str, attention: &str, base: &str, budget: u64) -> Result<Trained> {
        let path = self.directory.join(format!("{name}.yaml"));
        fs::write(&path, self.recipe(name, attention, base, budget))?;
        let cluster = self.cluster;
        let run = cluster.submit(&path)?;
        let end = cluster
            .wait_finished(&run, LIMIT)
            .while_doing(format_args!("{name}, ranks: {}", self.ranks))?;
        cluster.audit(&run)?;
        let seconds: f64 = cluster.metrics(&run)?.iter().map(|step| step.seconds).sum();
        println!(
            "{name}, ranks: {}: loss {:.4} after {} tokens, {seconds:.1} s",
            self.ranks, end.loss, end.tokens
        );
        Ok(Trained {
            checkpoint: cluster.last_checkpoint(&run)?,
            tokens: end.tokens,
            tokens_per_second: end.tokens as f64 / seconds,
        })
    }

    fn recipe(&self, name: &str, attention: &str, base: &str, budget: u64) -> String {
        let Training { ranks, steps, .. } = self;
        let precision = match self.device {
            Device::Cpu => "fp32",
            Device::Cuda => "bf16",
        };
        let warmup = (budget / steps.tokens / 20).clamp(1, MOST_WARMUP);
        format!(
            "name: {name}\n\
             base: {base}\n\
             attention: {attention}\n\
             model: {{ precision: {precision} }}\n\
             data: {{ train: {data}, repeat: true }}\n\
             budget: {{ tokens: {budget} }}\n\
             batch: {{ tokens: {tokens}, micro_batch: {micro_batch}, sequence_length: {length} }}\n\
             optimizer: {{ lr: {lr}, final_lr: 1e-4, warmup: {warmup} steps }}\n\
             checkpoint: {{ every_tokens: {budget} }}\n\
             workers: {{ min: {ranks}, max: {ranks} }}\n",
            data = self.text.train.display(),
            tokens = steps.tokens,
            micro_batch = steps.micro_batch,
            length = steps.length,
            lr = steps.lr,
        )
    }
}
