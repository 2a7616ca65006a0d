//! A run whose coordinator is gone, rebuilt from one of its checkpoints.
//!
//! All that is decided here is journalled at once, in one transaction: the run as if it had been submitted, the records of its
//! ledger as they were, a void of all that the old coordinator may have applied since, and the checkpoints. From there on it is
//! a run like any other that stands at its newest checkpoint.

use super::Machine;
use super::clients::{Refused, Submission};
use super::fact::Fact;
use super::state::{Checkpoint, Damaged, Run, RunNumber};
use crate::ledger::{self, Body, Hash, Record};

/// Generations that a coordinator may have formed since its last checkpoint, before it was lost. Workers of one may still live
/// and write to folders whose names hold step and generation: they must never be those of a generation that forms here.
const UNKNOWN_GENERATIONS: u64 = 1000;

/// A run as one of its checkpoints tells of it; all of that is proved.
#[derive(Clone, Debug)]
pub struct Adoption {
    /// Its id and recipe, and where its checkpoints are.
    pub submission: Submission,
    /// The ledger up to the head that the checkpoint remembers.
    pub ledger: Vec<Record>,
    /// What it goes on from. Every file was read.
    pub checkpoint: Checkpoint,
    /// Older checkpoints, in order, that the ledger calls durable.
    pub older: Vec<Checkpoint>,
    /// Others of the run that are there, and why nothing starts from them.
    pub passed_over: Vec<Damaged>,
    /// Hash of the state in `checkpoint`, as its manifest states it.
    pub replica_hash: Hash,
    /// The greatest number of a generation that the ledger, a manifest or the name of a folder there knows.
    pub generation: u64,
}

impl Machine {
    pub(super) fn adopt(&mut self, adoption: Adoption) -> Result<(), Refused> {
        self.not_ending()?;
        let Adoption {
            submission,
            ledger,
            checkpoint,
            older,
            passed_over,
            replica_hash,
            generation,
        } = adoption;
        let known = self.state.runs().iter();
        if known.map(|run| &run.id).any(|id| *id == submission.id) {
            return Err(Refused::Known(submission.id));
        }
        let run = self.state.next_number();
        let from = submission.checkpoint_root.join(&checkpoint.path);
        let shown = from.display().to_string();
        self.submit(submission)?;
        for record in ledger {
            self.decide(Fact::Recorded { run, record });
        }
        let generation = (generation / UNKNOWN_GENERATIONS + 1) * UNKNOWN_GENERATIONS;
        let step = checkpoint.step;
        // Also when it takes no step back: no generation that the old coordinator formed may apply another.
        self.record(
            run,
            Body::Void {
                generation,
                after_step: step,
                reason: format!("adopted from {shown}"),
            },
        );
        self.decide(Fact::Adopted {
            run,
            path: checkpoint.path.clone(),
            replica_hash,
            generation,
            at: self.moment.unix_ms,
        });
        for Damaged {
            checkpoint,
            problem,
        } in passed_over
        {
            self.pass_over(run, checkpoint, problem);
        }
        for checkpoint in older {
            self.keep_older(run, checkpoint);
        }
        let path = checkpoint.path.clone();
        self.decide(Fact::Written { run, checkpoint });
        let published = path.clone();
        self.decide(Fact::Published {
            run,
            path: published,
        });
        self.decide(Fact::Verified { run, path });
        let text = format!(
            "adopted from {shown}: it goes on after step {step}, with generations from {} on",
            generation + 1
        );
        self.log(Some(run), "INFO", text);
        self.settle(run);
        Ok(())
    }

    fn pass_over(&mut self, run: RunNumber, checkpoint: Checkpoint, problem: String) {
        let (step, path) = (checkpoint.step, checkpoint.path.clone());
        let text = format!("nothing starts from the checkpoint of step {step}: {problem}");
        self.log(Some(run), "ERROR", text);
        self.decide(Fact::Written { run, checkpoint });
        self.decide(Fact::Damaged { run, path, problem });
    }

    /// The name that a user may have given it was in the journal that is gone, so each gets one: only a user lets go of them.
    fn keep_older(&mut self, run: RunNumber, checkpoint: Checkpoint) {
        let Checkpoint {
            step, generation, ..
        } = checkpoint;
        let path = checkpoint.path.clone();
        self.decide(Fact::Written { run, checkpoint });
        self.decide(Fact::Published {
            run,
            path: path.clone(),
        });
        let name = format!("adopted-{step}-gen-{generation}");
        self.decide(Fact::Named { run, path, name });
    }
}

impl Run {
    /// Whether ranks that say this hash of their state, which they have from the checkpoint in `path`, have what was written.
    ///
    /// # Errors
    /// They have something else: the manifest of the checkpoint that the run was adopted from is not what was written.
    pub(super) fn holds_what_was_adopted(
        &self,
        path: Option<&str>,
        replica_hash: &[u8],
    ) -> Result<(), String> {
        let from = self.adopted.as_ref();
        match from.filter(|adopted| path == Some(adopted.path.as_str())) {
            Some(adopted) if adopted.replica_hash != replica_hash => Err(format!(
                "the state in the checkpoint {} has the hash {}, and its manifest says {}: the manifest was altered since it was \
                 written. Adopt the run from an older checkpoint, with another state directory",
                adopted.path,
                ledger::hex(replica_hash),
                ledger::hex(&adopted.replica_hash),
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
