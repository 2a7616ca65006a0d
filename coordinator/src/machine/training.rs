//! What members of a generation report while it lives.

use std::path::{Component, Path};

use supra_proto::v1::{
    CheckpointBegun, CheckpointPublished, CheckpointWritten, Fault, FaultKind, Formed, LedgerHead,
    Left, LeftReason, PublishCheckpoint, coordinator_message::Body as Down,
};
use supra_recipes::plan::Plan;
use supra_recipes::plan::snapshots;
use supra_recipes::schema::{Chaos, CheckpointInterval, Recipe, Sharding};

use super::aside::Blame;
use super::ending::Severity;
use super::fact::Fact;
use super::generation::Stage;
use super::pacing::Pacing;
use super::state::{Checkpoint, RunNumber};
use super::{Action, Machine, agreement};
use crate::ledger::{Body, Hash, Open};

/// What a generation trains, once its ranks agree.
struct Ground {
    plan: Plan,
    open: Open,
    interval: CheckpointInterval,
    chaos: Option<Chaos>,
    target_loss: Option<f64>,
    verify_steps: u64,
    /// Its ranks can leave all of the state in memory.
    whole: bool,
}

impl Machine {
    pub(super) fn formed(&mut self, rank: usize, formed: Formed) {
        let Some(generation) = self
            .generation
            .as_mut()
            .filter(|generation| generation.stage == Stage::Forming)
        else {
            return;
        };
        generation.members[rank].formed.get_or_insert(formed);
        self.agree();
    }

    /// Begins to apply steps once all ranks have formed and agree.
    pub(super) fn agree(&mut self) {
        let Some(run) = self.generation.as_ref().map(|generation| generation.run) else {
            return;
        };
        match self.ground() {
            None => {}
            Some(Ok(ground)) => self.begin(run, ground),
            Some(Err(cause)) => {
                let number = self
                    .generation
                    .as_ref()
                    .map_or(0, |generation| generation.number);
                self.break_up(
                    format!("generation {number} cannot train: {cause}"),
                    Severity::Fatal,
                    None,
                );
            }
        }
    }

    /// Once all ranks have formed: the plan that they agree on and the opening of a ledger for it, or why they do not.
    fn ground(&self) -> Option<Result<Ground, String>> {
        let generation = self.generation.as_ref()?;
        let run = self.state.run(generation.run)?;
        let said = generation.all_formed()?;
        let world = said.len() as u32;
        let plan = || {
            let from_held = generation.from_held.as_ref();
            let (from_step, open) = (generation.from_step, run.open.as_ref());
            let ground = agreement::formed(&said, from_step, from_held, open)?;
            if from_held.is_none() {
                let hash = said.first().map(|(_, _, formed)| &formed.replica_hash[..]);
                run.holds_what_was_adopted(
                    generation.restores.as_deref(),
                    hash.unwrap_or_default(),
                )?;
            }
            let recipe = Recipe::parse(&run.recipe, &run.id).map_err(|error| error.to_string())?;
            let plan = Plan::new(&recipe, ground.windows, ground.manifest_hash)
                .map_err(|error| error.to_string())?;
            let open = Open {
                run: run.id.clone(),
                recipe_hash: *blake3::hash(run.recipe.as_bytes()).as_bytes(),
                manifest_hash: ground.manifest_hash,
                windows: ground.windows,
                sequence_length: plan.sequence_length,
                batch_samples: plan.batch_samples,
                samples: plan.samples,
                steps: plan.steps,
            };
            Ok(Ground {
                plan,
                open,
                whole: recipe.optimizer.sharding == Sharding::None
                    || world == 1
                    || snapshots::every(&recipe, world) > 0,
                interval: recipe.checkpoint.every_tokens,
                verify_steps: recipe.resume.verify_steps.into(),
                chaos: recipe.chaos,
                target_loss: recipe.eval.and_then(|eval| eval.target_loss),
            })
        };
        Some(plan())
    }

    fn begin(&mut self, number: RunNumber, ground: Ground) {
        if self.state.run(number).is_some_and(|run| run.open.is_none()) {
            self.record(number, Body::Open(ground.open));
        }
        let now = self.moment.now;
        let Some(generation) = &mut self.generation else {
            return;
        };
        let world = generation.members.len();
        generation.stage = Stage::Training;
        generation.plan = Some(ground.plan);
        generation.verify_steps = ground.verify_steps;
        generation.whole = ground.whole;
        generation.pacing = (ground.interval == CheckpointInterval::Auto).then_some(Pacing {
            since: now,
            asked: false,
        });
        generation.chaos = ground.chaos;
        generation.target_loss = ground.target_loss;
        let from_memory = generation.from_held.is_some();
        let generation = generation.number;
        self.begin_chaos(number);
        self.log(
            Some(number),
            "INFO",
            format!("generation {generation} trains with {world} workers"),
        );
        if ground.verify_steps > 0 {
            self.announce_verification(number, from_memory);
        }
        let unpublished = self
            .state
            .run(number)
            .and_then(|run| run.recovery())
            .filter(|known| !known.published)
            .cloned();
        match unpublished {
            None => {}
            // Its own, from before the coordinator was away: what was told then may be lost.
            Some(known) if known.generation == generation => {
                let (step, manifest_hash) = (known.step, known.manifest_hash.to_vec());
                let publish = PublishCheckpoint {
                    step,
                    manifest_hash,
                };
                self.tell(0, Down::Publish(publish));
            }
            // Before it starts, rank 0 publishes the newest checkpoint, if the last generation could not.
            Some(known) => {
                let path = known.path;
                self.decide(Fact::Published { run: number, path });
            }
        }
        self.settle(number);
        self.release(number);
        self.apply_steps(number);
    }

    /// Does what waited for a step to be applied: what was measured behind it is written down, rank 0 gets the ledger's head,
    /// and the held checkpoint is journalled.
    pub(super) fn release(&mut self, number: RunNumber) {
        self.account_for_measured(number);
        let Some(run) = self.state.run(number) else {
            return;
        };
        let (applied, head) = (run.step, run.ledger.head);
        let Some(generation) = &mut self.generation else {
            return;
        };
        let waiting = generation.begun.split_off(&(applied + 1));
        for step in std::mem::replace(&mut generation.begun, waiting) {
            let hash = head.to_vec();
            // A manifest holds it for good, so no crash may take it back.
            self.out.push(Action::Sync);
            self.tell(0, Down::LedgerHead(LedgerHead { step, hash }));
        }
        let Some(generation) = &mut self.generation else {
            return;
        };
        let due = |held: &mut CheckpointWritten| held.step <= applied;
        let due: Vec<CheckpointWritten> = generation.held.extract_if(.., due).collect();
        for held in due {
            self.accept(number, held);
        }
    }

    pub(super) fn begun(&mut self, rank: usize, number: RunNumber, begun: CheckpointBegun) {
        if rank != 0 {
            let cause = format!("rank {rank} began a checkpoint, which is rank 0's task");
            return self.break_up(cause, Severity::Transient, None);
        }
        if let Some(generation) = self
            .generation
            .as_mut()
            .filter(|generation| !generation.leaving())
        {
            generation.begun.insert(begun.step);
            self.release(number);
        }
    }

    pub(super) fn written(&mut self, rank: usize, number: RunNumber, written: CheckpointWritten) {
        let Some(generation) = self
            .generation
            .as_mut()
            .filter(|generation| !generation.leaving())
        else {
            return;
        };
        let who = format!("rank {rank} ({})", generation.members[rank].name);
        if rank != 0 {
            return self.break_up(
                format!("{who} wrote a checkpoint, which is rank 0's task"),
                Severity::Transient,
                None,
            );
        }
        if !inside(&written.path) || written.manifest_hash.len() != crate::ledger::HASH_BYTES {
            let cause = format!(
                "{who} wrote a checkpoint to {:?}, which is not below the run's directory",
                written.path
            );
            return self.break_up(cause, Severity::Fatal, None);
        }
        let applied = self.state.run(number).map_or(0, |run| run.step);
        // Before all ranks have reported its step a checkpoint holds samples that nobody has accounted for.
        if generation.stage != Stage::Training || written.step > applied {
            generation.held.push(written);
        } else {
            self.accept(number, written);
        }
    }

    /// Journals a checkpoint of applied steps and lets rank 0 publish it.
    fn accept(&mut self, number: RunNumber, written: CheckpointWritten) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let Some(generation) = self.generation.as_ref() else {
            return;
        };
        let Ok(manifest_hash) = Hash::try_from(written.manifest_hash.as_slice()) else {
            return;
        };
        if written.step < run.recovery_step() {
            return;
        }
        let repeat = run
            .checkpoints
            .iter()
            .any(|known| known.path == written.path && known.manifest_hash == manifest_hash);
        if !repeat {
            let checkpoint = Checkpoint {
                step: written.step,
                tokens: generation
                    .plan
                    .as_ref()
                    .map_or(0, |plan| plan.tokens_after(written.step)),
                generation: generation.number,
                path: written.path,
                bytes: written.bytes,
                manifest_hash,
                published: false,
                world: generation.members.len() as u32,
                at: self.moment.unix_ms,
                verified: false,
                name: String::new(),
            };
            self.decide(Fact::Written {
                run: number,
                checkpoint,
            });
            self.gain_experience(Some(written.seconds));
        }
        let publish = PublishCheckpoint {
            step: written.step,
            manifest_hash: written.manifest_hash,
        };
        self.tell(0, Down::Publish(publish));
    }

    pub(super) fn published(&mut self, number: RunNumber, published: &CheckpointPublished) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let known = run.checkpoints.iter().find(|known| {
            known.step == published.step
                && known.manifest_hash.as_slice() == published.manifest_hash
        });
        let Some(path) = known
            .filter(|known| !known.published)
            .map(|known| known.path.clone())
        else {
            return;
        };
        self.log(
            Some(number),
            "INFO",
            format!("checkpoint of step {} is published: {path}", published.step),
        );
        self.decide(Fact::Published { run: number, path });
        self.prove_newest(number);
        self.settle(number);
    }

    pub(super) fn fault(&mut self, rank: usize, fault: &Fault) {
        match fault.kind() {
            FaultKind::Hardware => return self.hardware_fault(rank, fault),
            FaultKind::CheckpointDamaged => return self.checkpoint_fault(rank, fault),
            _ => {}
        }
        let Some(generation) = &self.generation else {
            return;
        };
        let member = &generation.members[rank];
        let doing = self.workers.get(&member.conn).map(|worker| {
            super::worker::Worker {
                phase: fault.phase(),
                step: fault.step,
                ..worker.clone()
            }
            .doing()
        });
        let cause = format!(
            "rank {rank} ({}) failed while {}: {}",
            member.name,
            doing.unwrap_or_default(),
            fault.message
        );
        let severity = match fault.kind() {
            FaultKind::Unspecified
            | FaultKind::Transient
            | FaultKind::Peer
            | FaultKind::CheckpointDamaged
            | FaultKind::Hardware => Severity::Transient,
            FaultKind::Input | FaultKind::Diverged => Severity::Fatal,
        };
        if generation.away() && fault.kind() == FaultKind::Peer {
            // It noticed that another one left when it had waited long enough.
            return self.give_up(&cause);
        }
        if severity == Severity::Transient && fault.kind() != FaultKind::Peer {
            self.accuse(rank, Blame::Failed, &cause);
        }
        self.break_up(cause, severity, Some(rank));
    }

    /// A device computes wrong: all ranks say so, and the first to be heard ends the generation.
    fn hardware_fault(&mut self, rank: usize, fault: &Fault) {
        let Some(generation) = &self.generation else {
            return;
        };
        let culprit = fault.culprit.map(|rank| rank as usize);
        let culprit = culprit.and_then(|rank| Some((rank, generation.members.get(rank)?)));
        let (who, culprit) = match culprit {
            Some((rank, member)) => (format!(" of rank {rank} ({})", member.name), Some(rank)),
            None => (String::new(), None),
        };
        let cause = format!(
            "hardware fault{who} in step {}: {}",
            fault.step, fault.message
        );
        if let Some(culprit) = culprit {
            self.accuse(culprit, Blame::Hardware, &cause);
        }
        self.break_up(cause, Severity::Transient, Some(rank));
    }

    pub(super) fn left(&mut self, rank: usize, left: Left) {
        let Some(generation) = &mut self.generation else {
            return;
        };
        let reason = left.reason();
        let away = generation.away();
        let member = &mut generation.members[rank];
        member.left = Some(reason);
        let name = member.name.clone();
        if let Some(worker) = self.workers.get_mut(&member.conn) {
            worker.held = left.held;
        }
        match reason {
            LeftReason::Finished | LeftReason::Stopped | LeftReason::Regrouped => {}
            _ if away => self.give_up(&format!("rank {rank} ({name}) left meanwhile")),
            LeftReason::Void | LeftReason::Fault | LeftReason::Unspecified => {
                self.break_up(
                    format!("rank {rank} ({name}) left the generation"),
                    Severity::Transient,
                    None,
                );
            }
        }
    }
}

/// The path stays below the directory that it is relative to, and names something in it.
fn inside(path: &str) -> bool {
    !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::inside;

    #[test]
    fn checkpoint_paths_stay_below_their_root() {
        assert!(inside("step-00000010-gen-2") && inside("a/b"));
        for path in ["", "/a", "../a", "a/../../b", ".", "./a"] {
            assert!(!inside(path), "{path}");
        }
    }
}
