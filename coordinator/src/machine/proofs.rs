//! Whether published checkpoints are what was written: the coordinator reads them again.
//!
//! It does so itself, for it is the one that deletes: what it reads is what would be left. Reading goes on in a thread of its
//! process, beside training, one checkpoint of a run at a time and the newest first, so that a slow store delays deletions and
//! nothing else. What a worker finds damaged when it is to start from it is read again before anything is decided: where the
//! coordinator reads it well, the worker or its way to the storage is broken, and the checkpoint is not.

use std::collections::{BTreeMap, BTreeSet};

use supra_proto::v1::{CheckpointAfterStep, Fault, coordinator_message::Body as Down};

use super::ending::Severity;
use super::fact::{Fact, Outcome};
use super::generation::Stage;
use super::state::{Checkpoint, Run, RunNumber};
use super::{Action, Machine, retention};
use crate::ledger::Body;

/// What reading a checkpoint again has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// All files are what was written.
    Whole,
    /// A file is not, or is missing: which and how, in one line.
    Damaged(String),
    /// It cannot be read here: why, in one line.
    Unread(String),
}

/// What is being read, and what is known of it.
#[derive(Debug, Default)]
pub(crate) struct Proofs {
    attempts: u64,
    /// By run.
    under_way: BTreeMap<RunNumber, Proof>,
    /// Checkpoints that were read in vain: this coordinator does not try again by itself.
    tried: BTreeSet<(RunNumber, String)>,
}

#[derive(Debug)]
struct Proof {
    attempt: u64,
    path: String,
    doubt: Option<Doubt>,
}

/// A worker that was to start from a checkpoint says that it is damaged.
#[derive(Clone, Debug)]
pub(crate) struct Doubt {
    worker: String,
    instance: String,
    step: u64,
    /// File and cause, as the worker says it.
    problem: String,
}

impl Proofs {
    /// Why no generation of a run forms before a checkpoint is read again.
    pub fn doubt(&self, run: RunNumber) -> Option<String> {
        let doubt = self.under_way.get(&run)?.doubt.as_ref()?;
        Some(format!(
            "reading the checkpoint of step {} again, which {} has found damaged",
            doubt.step, doubt.worker
        ))
    }
}

impl Machine {
    /// Has the newest published checkpoint read again, unless it is known or nothing would follow from it.
    pub(super) fn prove(&mut self, number: RunNumber) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let reasons = retention::reasons(run, run.keep, run.keep_every);
        // Kept as long as none that is newer is known to be whole.
        let waits = |kept| {
            matches!(
                kept,
                retention::Kept::Verified | retention::Kept::Unverified
            )
        };
        let waited_for = reasons.into_iter().flatten().any(waits);
        if !run.ended() || waited_for {
            self.prove_newest(number);
        }
    }

    /// Has the newest published checkpoint read again, unless it is known.
    pub(super) fn prove_newest(&mut self, number: RunNumber) {
        if self.shutdown.is_some() || self.proofs.under_way.contains_key(&number) {
            return;
        }
        let Some(run) = self.state.run(number) else {
            return;
        };
        let newest = run.checkpoints.iter().rev().find(|known| known.published);
        if let Some(newest) = newest.filter(|newest| !newest.verified).cloned()
            && !self.proofs.tried.contains(&(number, newest.path.clone()))
        {
            self.read_again(number, newest, None);
        }
    }

    fn read_again(&mut self, number: RunNumber, checkpoint: Checkpoint, doubt: Option<Doubt>) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let directory = run.checkpoint_root.join(&checkpoint.path);
        self.proofs.attempts += 1;
        let attempt = self.proofs.attempts;
        let (path, manifest_hash) = (checkpoint.path, checkpoint.manifest_hash);
        let proof = Proof {
            attempt,
            path,
            doubt,
        };
        self.proofs.under_way.insert(number, proof);
        self.out.push(Action::Verify {
            run: number,
            attempt,
            directory,
            manifest_hash,
        });
    }

    /// A rank finds the checkpoint damaged that it is to start from. The generation is over; the next one waits for what the
    /// coordinator reads.
    pub(super) fn checkpoint_fault(&mut self, rank: usize, fault: &Fault) {
        let Some(generation) = &self.generation else {
            return;
        };
        let forming = generation.stage == Stage::Forming;
        let (number, restores) = (generation.run, generation.restores.clone());
        let (name, conn) = (
            generation.members[rank].name.clone(),
            generation.members[rank].conn,
        );
        let cause = format!(
            "rank {rank} ({name}) cannot start from the checkpoint: {}",
            fault.message
        );
        self.break_up(cause, Severity::Transient, Some(rank));
        let known = |run: &Run| {
            let named = |known: &&Checkpoint| Some(&known.path) == restores.as_ref();
            run.checkpoints.iter().find(named).cloned()
        };
        let checkpoint = self.state.run(number).and_then(known);
        if let Some(checkpoint) = checkpoint.filter(|_| forming) {
            let worker = self.workers.get(&conn);
            let doubt = Doubt {
                instance: worker
                    .map(|worker| worker.hello.instance.clone())
                    .unwrap_or_default(),
                worker: name,
                step: checkpoint.step,
                problem: fault.message.clone(),
            };
            // It may have been damaged since it was read, or is being read.
            self.read_again(number, checkpoint, Some(doubt));
        }
    }

    /// A checkpoint was read again.
    pub(super) fn proved(&mut self, number: RunNumber, attempt: u64, found: Found) {
        let under_way = self.proofs.under_way.get(&number);
        if under_way.is_none_or(|proof| proof.attempt != attempt) {
            return;
        }
        let Some(Proof { path, doubt, .. }) = self.proofs.under_way.remove(&number) else {
            return;
        };
        let run = self.state.run(number);
        let known = run.and_then(|run| run.checkpoints.iter().find(|known| known.path == path));
        let Some(checkpoint) = known.cloned() else {
            // A user has deleted it meanwhile, or a newer one has taken its place.
            return self.prove(number);
        };
        let step = checkpoint.step;
        match (found, doubt) {
            (Found::Whole, doubt) => {
                if !checkpoint.verified {
                    let text = format!("checkpoint of step {step} is verified: {path}");
                    self.log(Some(number), "INFO", text);
                    self.decide(Fact::Verified { run: number, path });
                }
                if let Some(doubt) = doubt {
                    self.contradict(number, &doubt);
                }
            }
            (Found::Damaged(problem), doubt) => {
                self.damaged(number, checkpoint, problem, doubt.is_some());
            }
            (Found::Unread(why), Some(doubt)) => {
                // An older checkpoint costs steps, a wrong one everything.
                let (worker, problem) = (doubt.worker, doubt.problem);
                let problem = format!("{problem} (read by {worker}, and not here: {why})");
                self.damaged(number, checkpoint, problem, true);
            }
            (Found::Unread(why), None) => {
                let text = format!(
                    "cannot verify the checkpoint of step {step}, so no older one is deleted: {why}"
                );
                self.log(Some(number), "WARN", text);
                self.proofs.tried.insert((number, path));
            }
        }
        self.settle(number);
    }

    /// The coordinator reads well what a worker has found damaged. Where others can train, they do so without that worker.
    fn contradict(&mut self, number: RunNumber, doubt: &Doubt) {
        let Doubt {
            worker,
            instance,
            step,
            problem,
        } = doubt;
        let text = format!(
            "worker {worker} found the checkpoint of step {step} damaged, and the coordinator reads what was written: what is \
             broken is the worker, or its way to the storage. It said: {problem}"
        );
        self.log(Some(number), "ERROR", text);
        let enough = self.state.run(number).map_or(0, |run| run.workers.min) as usize;
        let others = self.able().filter(|(_, it)| it.hello.name != *worker);
        let there = self
            .workers
            .values()
            .any(|it| it.hello.name == *worker && it.hello.instance == *instance);
        if there && others.count() >= enough.max(1) {
            let reason =
                format!("reads the checkpoint of step {step} otherwise than it was written");
            self.put_aside_attached(worker, &reason);
        }
    }

    /// A checkpoint is damaged. `needed`: a generation was to start from it.
    fn damaged(
        &mut self,
        number: RunNumber,
        checkpoint: Checkpoint,
        problem: String,
        needed: bool,
    ) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let (step, path) = (checkpoint.step, checkpoint.path.clone());
        let newest = run.recovery_step() <= step;
        let said = format!("the checkpoint of step {step} is damaged: {problem}");
        if run.strict {
            self.proofs.tried.insert((number, path));
            self.log(Some(number), "ERROR", said.clone());
            if needed && !run_ended(self, number) {
                let reason = format!(
                    "{said}. --strict allows no older one; put the file back, or go on from an older checkpoint with `supra \
                     resume` without --strict"
                );
                return self.end_run_as(number, Outcome::Failed, reason, true);
            }
        } else {
            self.decide(Fact::Damaged {
                run: number,
                path,
                problem: problem.clone(),
            });
            self.withdraw(number, &checkpoint, &problem);
            let next = match self.state.run(number).map(Run::recovery_step) {
                Some(0) | None => "from the beginning: there is no other".to_owned(),
                Some(older) => format!("from that of step {older}"),
            };
            let text = format!("{said}. What has to start again starts {next}");
            self.log(Some(number), "ERROR", text);
        }
        if newest {
            self.write_another(number, step);
        }
    }

    /// Has a generation that trains write another checkpoint at once in the place of the newest.
    fn write_another(&mut self, number: RunNumber, step: u64) {
        let trains = |it: &&super::Generation| it.run == number && it.stage == Stage::Training;
        if self.generation.as_ref().filter(trains).is_some() {
            let body = Down::Checkpoint(CheckpointAfterStep { newest: step });
            self.tell(0, body);
        }
    }

    /// What only a damaged checkpoint held is durable no more, and the ledger says so.
    fn withdraw(&mut self, number: RunNumber, bad: &Checkpoint, problem: &str) {
        let Some(run) = self.state.run(number).filter(|run| !run.closed) else {
            return;
        };
        let published = run.checkpoints.iter().filter(|known| known.published);
        let durable = published.map(|known| known.step).max().unwrap_or(0);
        if durable < run.durable {
            let body = Body::Lost {
                generation: bad.generation,
                step: run.durable,
                manifest_hash: bad.manifest_hash,
                durable,
                reason: problem.to_owned(),
            };
            self.record(number, body);
        }
    }
}

fn run_ended(machine: &Machine, number: RunNumber) -> bool {
    machine.state.run(number).is_none_or(Run::ended)
}
