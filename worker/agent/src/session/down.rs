//! What the coordinator says.

use std::time::{Duration, Instant};

use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::{
    CoordinatorMessage, FaultKind, LedgerHead, LeftReason, Phase, PublishCheckpoint,
};

use super::{Action, Actions, Current, Heartbeats, Session, Stage};
use crate::place::Place;
use crate::worker::Exit;

impl Session {
    pub(super) fn on_message(
        &mut self,
        message: CoordinatorMessage,
        now: Instant,
        actions: &mut Actions,
    ) {
        let CoordinatorMessage {
            run,
            generation,
            body,
            sequence: _,
        } = message;
        let Some(body) = body else { return };
        let mine = self
            .current
            .as_ref()
            .is_some_and(|c| c.run == run && c.generation == generation);
        match body {
            Down::Welcome(welcome) => self.on_welcome(welcome.heartbeat_seconds, now),
            Down::Refusal(refusal) => self.end(Exit::Refused(refusal.message), None, now, actions),
            Down::Goodbye(_) => self.end(Exit::Goodbye, None, now, actions),
            Down::Assignment(assignment) => {
                let stale = run == self.last.0 && generation <= self.last.1;
                if stale || self.ending.is_some() {
                    return;
                }
                self.last = (run.clone(), generation);
                match Place::parse(&run, generation, assignment) {
                    Ok(place) => self.assign(place, now, actions),
                    Err(message) => {
                        self.fault(&run, generation, FaultKind::Input, message, actions);
                        self.left(&run, generation, LeftReason::Fault, actions);
                    }
                }
            }
            Down::Void(_) if mine => self.leave(Some(LeftReason::Void), now, actions),
            Down::Void(_) => {
                if self
                    .next
                    .take_if(|next| next.run == run && next.generation == generation)
                    .is_some()
                {
                    self.left(&run, generation, LeftReason::Void, actions);
                }
            }
            Down::Stop(_) => self.on_stop(&run, generation, actions),
            Down::Regroup(_) => self.on_regroup(&run, generation, actions),
            Down::Publish(publish) if mine => self.on_publish(&publish, now, actions),
            Down::LedgerHead(head) if mine => self.on_ledger_head(&head, now, actions),
            Down::Publish(_) | Down::LedgerHead(_) => {}
        }
    }

    fn on_welcome(&mut self, seconds: f64, now: Instant) {
        // Whatever the coordinator says, neither a flood nor silence.
        let every = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::from_secs(1));
        let every = every.clamp(Duration::from_millis(100), Duration::from_secs(60));
        self.heartbeats = Some(Heartbeats { every, due: now });
    }

    fn assign(&mut self, place: Place, now: Instant, actions: &mut Actions) {
        if self.current.is_some() {
            // The void of the generation before is on its way, or lost with it.
            self.leave(Some(LeftReason::Void), now, actions);
        }
        if self.current.is_some() {
            self.next = Some(place);
        } else {
            self.begin(place, now, actions);
        }
    }

    pub(super) fn begin(&mut self, place: Place, now: Instant, actions: &mut Actions) {
        self.jobs += 1;
        let job = self.jobs;
        self.set_phase(Phase::Forming, 0, now);
        let mut current = Current {
            job,
            run: place.run.clone(),
            generation: place.generation,
            root: place.checkpoint_root.clone(),
            stage: Stage::Working,
            stop: place.stop,
            regroup: place.regroup,
            written: None,
            published: None,
        };
        match &place.restore {
            Some(restore) if place.rank == 0 => {
                actions.push(Action::Publish {
                    job,
                    step: restore.step,
                    root: current.root.clone(),
                    path: restore.relative.clone(),
                    manifest_hash: restore.manifest_hash,
                });
                current.stage = Stage::Preparing(Box::new(place));
                self.current = Some(current);
            }
            _ => {
                self.current = Some(current);
                self.start(Box::new(place), actions);
            }
        }
    }

    pub(super) fn start(&mut self, place: Box<Place>, actions: &mut Actions) {
        let Some(current) = &mut self.current else {
            return;
        };
        current.stage = Stage::Working;
        self.held = None;
        actions.push(Action::Start {
            job: current.job,
            place,
        });
        if current.stop {
            actions.push(Action::RequestStop);
        }
        if current.regroup {
            actions.push(Action::RequestRegroup);
        }
    }

    fn on_stop(&mut self, run: &str, generation: u64, actions: &mut Actions) {
        if let Some(current) = self
            .current
            .as_mut()
            .filter(|c| c.run == run && c.generation == generation)
        {
            if !current.stop && matches!(current.stage, Stage::Working) {
                actions.push(Action::RequestStop);
            }
            current.stop = true;
        } else if let Some(next) = self
            .next
            .as_mut()
            .filter(|n| n.run == run && n.generation == generation)
        {
            next.stop = true;
        }
    }

    fn on_regroup(&mut self, run: &str, generation: u64, actions: &mut Actions) {
        if let Some(current) = self
            .current
            .as_mut()
            .filter(|c| c.run == run && c.generation == generation)
        {
            if !current.regroup && matches!(current.stage, Stage::Working) {
                actions.push(Action::RequestRegroup);
            }
            current.regroup = true;
        } else if let Some(next) = self
            .next
            .as_mut()
            .filter(|n| n.run == run && n.generation == generation)
        {
            next.regroup = true;
        }
    }

    fn on_ledger_head(&mut self, head: &LedgerHead, now: Instant, actions: &mut Actions) {
        match head.hash.as_slice().try_into() {
            Ok(hash) => actions.push(Action::TellLedgerHead(head.step, hash)),
            Err(_) => {
                let message = format!("was given a ledger head of {} bytes", head.hash.len());
                self.fail(FaultKind::Transient, message, now, actions);
            }
        }
    }

    fn on_publish(&mut self, publish: &PublishCheckpoint, now: Instant, actions: &mut Actions) {
        let Some(current) = self
            .current
            .as_ref()
            .filter(|c| matches!(c.stage, Stage::Working))
        else {
            return;
        };
        let step = publish.step;
        let hash: Option<[u8; 32]> = publish.manifest_hash.as_slice().try_into().ok();
        let written = current
            .written
            .as_ref()
            .filter(|w| w.step == step && w.manifest_hash == publish.manifest_hash);
        match (hash, written) {
            (Some(manifest_hash), Some(written)) => actions.push(Action::Publish {
                job: current.job,
                step,
                root: current.root.clone(),
                path: written.path.clone(),
                manifest_hash,
            }),
            (Some(hash), None) if current.published == Some((step, hash)) => {
                self.tell_published(step, hash, actions)
            }
            _ => {
                let message = format!(
                    "asked to publish a checkpoint of step {step} that this worker did not write"
                );
                self.fail(FaultKind::Transient, message, now, actions);
            }
        }
    }
}
