//! Regrouping: a generation that trains well ends in order, so that another membership goes on from what it leaves in
//! memory. No step is void, and no checkpoint is needed.

use supra_proto::v1::{Regroup, coordinator_message::Body as Down};

use super::Machine;
use super::generation::Stage;

/// Steps before the end of the budget that another membership is not worth forming for.
pub(super) const LAST_STEPS: u64 = 1;

impl Machine {
    /// Asks the generation in hand to finish its step and leave. Does nothing when it does not train, was asked already,
    /// or ends soon anyway.
    pub(super) fn regroup(&mut self, reason: String) {
        let ends = self.shutdown.is_some();
        let Some(generation) = self
            .generation
            .as_mut()
            .filter(|generation| generation.stage == Stage::Training && !ends)
        else {
            return;
        };
        let Some(run) = self.state.run(generation.run) else {
            return;
        };
        let steps = generation.plan.as_ref().map_or(0, |plan| plan.steps);
        let stops = run.stop.is_some() || steps.saturating_sub(run.step) <= LAST_STEPS;
        if stops || generation.regroup.is_some() {
            return;
        }
        generation.regroup = Some(reason.clone());
        let (run, number) = (generation.run, generation.number);
        self.log(
            Some(run),
            "INFO",
            format!("generation {number} is to regroup: {reason}"),
        );
        self.tell_all(&Down::Regroup(Regroup { reason }), None);
    }

    /// Lets the generation in hand regroup when a member is drained, or when workers wait that it could have.
    pub(super) fn reconsider(&mut self) {
        let drained = self.generation.as_ref().and_then(|it| self.drained(it));
        match drained.map(str::to_owned) {
            Some(name) => self.regroup(format!("worker {name} is drained")),
            None => self.welcome(),
        }
    }

    /// Takes in who waits. A generation that would lose its steps by it goes on alone.
    fn welcome(&mut self) {
        let Some(generation) = self
            .generation
            .as_ref()
            .filter(|generation| generation.stage == Stage::Training && generation.whole)
        else {
            return;
        };
        let world = generation.members.len();
        // All members are attached while they train. Every message asks: nobody is looked at when there is nobody else.
        if self.workers.len() == world {
            return;
        }
        let Some(workers) = self.state.run(generation.run).map(|run| run.workers) else {
            return;
        };
        let full = world >= workers.max as usize;
        let quiet = self.moment.now.saturating_sub(self.attached_at);
        if full || generation.regroup.is_some() || quiet < workers.grace {
            return;
        }
        let mut names: Vec<&str> = self
            .idle()
            .map(|(_, worker)| worker.hello.name.as_str())
            .collect();
        names.sort_unstable();
        let reason = match names.as_slice() {
            [] => return,
            [name] => format!("worker {name} joins"),
            names => format!("workers {} join", names.join(", ")),
        };
        self.regroup(reason);
    }
}
