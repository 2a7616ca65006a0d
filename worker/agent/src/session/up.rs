//! What the training loop and the publications say.

use std::time::Instant;

use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{
    CheckpointBegun, CheckpointPublished, CheckpointWritten, Fault, FaultKind, LeftReason, Phase,
};

use super::{Action, Actions, Session, Stage, Unpublished, Unwritten};
use crate::job::Outcome;
use crate::link::{Report, Tagged};

impl Session {
    pub(super) fn on_report(&mut self, tagged: Tagged, now: Instant, actions: &mut Actions) {
        let Some(current) = self
            .current
            .as_mut()
            .filter(|current| current.job == tagged.job)
        else {
            return;
        };
        let working = matches!(current.stage, Stage::Working);
        match tagged.report {
            Report::Done(outcome) => self.on_done(outcome, now, actions),
            Report::Log(line) => self.send_for_current(Up::Log(line), actions),
            // Of a void generation, too: it may be done on all ranks and need not be trained again.
            Report::Step(step) => self.report(Up::Step(step), actions),
            Report::Evaluated(evaluated) => self.report(Up::Evaluated(evaluated), actions),
            Report::Gates(gates) => self.report(Up::Gates(gates), actions),
            Report::Held(held) => self.held = Some(held),
            // The coordinator has no use for the rest of a void generation.
            _ if !working => {}
            Report::Phase(phase, step) => self.set_phase(phase, step, now),
            Report::Formed(formed) => {
                if let Some(standing) = &mut self.standing {
                    standing.formed(formed.clone());
                }
                self.send_for_current(Up::Formed(formed), actions);
            }
            Report::SnapshotTaken(taken) => {
                self.send_for_current(Up::SnapshotTaken(taken), actions);
            }
            Report::CheckpointFilled(unfinished) => {
                let step = unfinished.step;
                current.unfinished.push(unfinished);
                self.report(Up::CheckpointBegun(CheckpointBegun { step }), actions);
            }
        }
    }

    pub(super) fn on_finished(
        &mut self,
        job: u64,
        result: Result<CheckpointWritten, Unwritten>,
        now: Instant,
        actions: &mut Actions,
    ) {
        let Some(current) = self
            .current
            .as_mut()
            .filter(|it| it.job == job && matches!(it.stage, Stage::Working))
        else {
            return;
        };
        match result {
            Err(Unwritten::Refused(message)) => {
                self.fail(FaultKind::Transient, message, now, actions);
            }
            Err(Unwritten::NoLedger(unfinished)) => {
                let step = unfinished.step;
                current.unfinished.push(*unfinished);
                // Without a stream, this is said again when there is the next one.
                self.send_for_current(Up::CheckpointBegun(CheckpointBegun { step }), actions);
            }
            Ok(written) => {
                current.written.push(written.clone());
                if let Some(standing) = &mut self.standing {
                    standing.has_head(written.step);
                }
                self.send_for_current(Up::CheckpointWritten(written), actions);
            }
        }
    }

    pub(super) fn on_published(
        &mut self,
        job: u64,
        step: u64,
        hash: [u8; 32],
        result: Result<(), Unpublished>,
        now: Instant,
        actions: &mut Actions,
    ) {
        let Some(current) = self.current.as_mut().filter(|current| current.job == job) else {
            return;
        };
        if matches!(current.stage, Stage::Leaving { .. }) {
            return;
        }
        if let Err(Unpublished { kind, message }) = result {
            let kind = match current.stage {
                // Nothing can start from a checkpoint that is not there.
                Stage::Preparing(_) => kind,
                _ => FaultKind::Transient,
            };
            return self.fail(kind, message, now, actions);
        }
        match std::mem::replace(&mut current.stage, Stage::Working) {
            Stage::Preparing(place) => self.start(place, actions),
            _ => {
                current.written.retain(|written| written.step > step);
                current.published = Some((step, hash));
                actions.push(Action::TellPublished(step));
                self.tell_published(step, hash, actions);
            }
        }
    }

    pub(super) fn tell_published(&self, step: u64, hash: [u8; 32], actions: &mut Actions) {
        let body = Up::CheckpointPublished(CheckpointPublished {
            step,
            manifest_hash: hash.to_vec(),
        });
        self.send_for_current(body, actions);
    }

    /// The training loop is back.
    fn on_done(&mut self, outcome: Outcome, now: Instant, actions: &mut Actions) {
        let Some(current) = self.current.take() else {
            return;
        };
        let (run, generation) = (current.run, current.generation);
        let mut farewell = Vec::new();
        let reason = match (current.stage, outcome) {
            // What it says of a void generation is an echo of the abort.
            (Stage::Leaving { reason, .. }, _) => reason,
            (_, Outcome::Finished) => Some(LeftReason::Finished),
            (_, Outcome::Stopped) => Some(LeftReason::Stopped),
            (_, Outcome::Regrouped) => Some(LeftReason::Regrouped),
            (_, Outcome::Voided) => Some(LeftReason::Void),
            (_, Outcome::Fault { kind, message }) => {
                farewell.push(Up::Fault(self.fault_here(kind, message)));
                Some(LeftReason::Fault)
            }
            (_, Outcome::Hardware { culprit, message }) => {
                farewell.push(Up::Fault(Fault {
                    culprit,
                    ..self.fault_here(FaultKind::Hardware, message)
                }));
                Some(LeftReason::Fault)
            }
        };
        farewell.push(self.left_body(reason.unwrap_or(LeftReason::Void)));
        if reason.is_some() {
            for body in farewell.clone() {
                self.send(&run, generation, body, actions);
            }
        }
        self.away_since = None;
        if let Some(standing) = self.standing.as_mut().filter(|it| it.is(current.job)) {
            standing.leave(farewell);
        }
        self.set_phase(Phase::Idle, 0, now);
        if let Some(exit) = self.ending.clone() {
            actions.push(Action::End(exit));
        } else if let Some(next) = self.next.take() {
            self.begin(next, now, actions);
        }
    }
}
