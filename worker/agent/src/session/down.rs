//! What the coordinator says.

use std::time::{Duration, Instant};

use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{
    CoordinatorMessage, FaultKind, LedgerHead, LeftReason, OrderedFault, Phase, PublishCheckpoint,
    Welcome,
};

use super::{Action, Actions, Current, Heartbeats, Session, Stage, Standing};
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
            Down::Welcome(welcome) => self.on_welcome(&welcome, now, actions),
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
            Down::Checkpoint(checkpoint) if mine => {
                actions.push(Action::RequestCheckpoint(checkpoint.newest));
            }
            Down::OrderedFault(fault) if mine => self.on_ordered_fault(&fault, actions),
            Down::Publish(_)
            | Down::LedgerHead(_)
            | Down::Checkpoint(_)
            | Down::OrderedFault(_) => {}
        }
    }

    fn on_welcome(&mut self, welcome: &Welcome, now: Instant, actions: &mut Actions) {
        // Whatever the coordinator says, neither a flood nor silence.
        let every = Duration::try_from_secs_f64(welcome.heartbeat_seconds);
        let every = every.unwrap_or(Duration::from_secs(1));
        let every = every.clamp(Duration::from_millis(100), Duration::from_secs(60));
        let again = self.heartbeats.replace(Heartbeats { every, due: now });
        if again.is_none() {
            self.repeat(welcome.known_step, actions);
        }
    }

    /// Says again what the coordinator may not have written down, or could not hear.
    fn repeat(&mut self, known: u64, actions: &mut Actions) {
        self.away_since = None;
        let Some(standing) = &self.standing else {
            return;
        };
        let Some(place) = standing.place() else {
            return;
        };
        if let Some(Current {
            job,
            stage: Stage::Leaving { reason, .. },
            ..
        }) = &mut self.current
            && standing.is(*job)
        {
            // Hello said that the worker has this place.
            reason.get_or_insert(LeftReason::Void);
        }
        let (run, generation) = (&place.run, place.generation);
        for body in standing.repeat(known) {
            self.send(run, generation, body.clone(), actions);
        }
        if let Some(current) = self.current.as_ref().filter(|it| standing.is(it.job)) {
            for written in &current.written {
                let body = Up::CheckpointWritten(written.clone());
                self.send(run, generation, body, actions);
            }
            if let Some((step, hash)) = current.published {
                self.tell_published(step, hash, actions);
            }
        }
        for body in standing.farewell() {
            self.send(run, generation, body.clone(), actions);
        }
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
        self.standing = None;
        self.set_phase(Phase::Forming, 0, now);
        let mut current = Current {
            job,
            run: place.run.clone(),
            generation: place.generation,
            root: place.checkpoint_root.clone(),
            stage: Stage::Working,
            stop: place.stop,
            regroup: place.regroup,
            unfinished: Vec::new(),
            written: Vec::new(),
            fault: 0,
            published: None,
        };
        match &place.restore {
            Some(restore) if place.rank == 0 => {
                actions.push(Action::Publish {
                    job,
                    step: restore.step,
                    root: current.root.clone(),
                    path: restore.path.clone(),
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
        self.standing = Some(Standing::new(current.job, &place));
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

    fn on_ordered_fault(&mut self, fault: &OrderedFault, actions: &mut Actions) {
        let Some(current) = self
            .current
            .as_mut()
            .filter(|current| current.fault < fault.number)
        else {
            return;
        };
        current.fault = fault.number;
        let lasts = Duration::try_from_secs_f64(fault.seconds).unwrap_or_default();
        actions.push(Action::Break(fault.kind(), lasts));
    }

    fn on_ledger_head(&mut self, head: &LedgerHead, now: Instant, actions: &mut Actions) {
        let Ok(hash) = head.hash.as_slice().try_into() else {
            let message = format!("was given a ledger head of {} bytes", head.hash.len());
            return self.fail(FaultKind::Transient, message, now, actions);
        };
        let Some(current) = &mut self.current else {
            return;
        };
        let mut waiting = current.unfinished.iter();
        // It has been given before.
        let Some(place) = waiting.position(|it| it.step == head.step) else {
            return;
        };
        actions.push(Action::Finish {
            job: current.job,
            run: current.run.clone(),
            root: current.root.clone(),
            unfinished: Box::new(current.unfinished.remove(place)),
            head: hash,
        });
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
            .iter()
            .find(|w| w.step == step && w.manifest_hash == publish.manifest_hash);
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
