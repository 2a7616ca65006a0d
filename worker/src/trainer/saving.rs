//! When and how the training loop writes checkpoints.

use std::time::Instant;

use supra_agent::{Job, Phase, Unfinished};
use supra_checkpoint::{
    Manifest,
    manifest::{FORMAT, Seeds},
    store,
};
use supra_recipes::plan::VERSION;

use super::{TrainError, Trainer};
use crate::checkpoint::{self, write::Contents};

impl Trainer<'_> {
    /// Writes the checkpoint that was due where this generation took a state over, if the one before did not get to it.
    pub(super) fn catch_up(&mut self) -> Result<(), TrainError> {
        let Job {
            donation, restore, ..
        } = self.job;
        let there = restore.as_ref().map_or(0, |restore| restore.step);
        if donation.is_some() && there < self.step && self.plan.checkpoint_due(self.step) {
            self.checkpoint(self.step == self.plan.steps)?;
        }
        Ok(())
    }

    /// Writes a checkpoint of the step just done. With `wait`, returns when it is published, on all ranks.
    pub(super) fn checkpoint(&mut self, wait: bool) -> Result<(), TrainError> {
        self.job.link.phase(Phase::Checkpointing, self.step);
        let replica_hash = self.prints()?.whole;
        if self.job.rank == 0 {
            self.sweep();
            self.write_checkpoint(replica_hash)?;
            if wait {
                self.job.link.await_published(self.step)?;
            }
        } else {
            checkpoint::write::hand_over(&mut self.replica, self.exchange.collective())?;
        }
        if wait {
            self.exchange.host().barrier()?;
        }
        // Nobody trained meanwhile: this is no part of a step.
        self.exchange.forget_waits();
        Ok(())
    }

    fn write_checkpoint(&mut self, replica_hash: [u8; 32]) -> Result<(), TrainError> {
        let clock = Instant::now();
        let (job, recipe) = (self.job, &self.job.recipe);
        let manifest = Manifest {
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
            replica_hash: blake3::Hash::from_bytes(replica_hash).to_hex().to_string(),
            // The agent puts it in: nobody knows it yet.
            ledger_head: String::new(),
            recipe: recipe.to_yaml(),
            dataset: self.dataset.hash.clone(),
            tokenizer: self.dataset.tokenizer.clone(),
            environment: self.environment.clone(),
            tensors: Default::default(),
            files: Default::default(),
        };
        let contents = Contents {
            replica: &mut self.replica,
            collective: self.exchange.collective(),
            config: &self.config,
            base: recipe.base.directory(),
            manifest,
        };
        let receipt = checkpoint::write::write(&job.checkpoint_root, contents)?;
        job.link.checkpoint_filled(Unfinished {
            step: self.step,
            path: receipt.relative,
            bytes: receipt.bytes,
            manifest: receipt.manifest,
            seconds: clock.elapsed().as_secs_f64(),
        });
        Ok(())
    }

    /// Removes what crashed writers left. That it could not is worth a line, not the run.
    fn sweep(&self) {
        let job = self.job;
        if job.donation.is_some() && job.restore.is_none() {
            // One of them may be journalled, and this generation was not told.
            return;
        }
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
