//! What the worker does with every message: a state machine without clock, socket or thread.
//!
//! [`Session::handle`] takes one [`Input`] and gives the [`Action`]s for it, in order. The control
//! thread does what they say and knows nothing of generations.
//!
//! A worker has at most one place in a generation. It is *preparing* it (rank 0 publishes the
//! checkpoint to start from, if the generation before did not get to it), *working*, or *leaving*:
//! void, but the training loop is not back yet. An assignment that arrives meanwhile waits.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{
    CheckpointPublished, CheckpointWritten, CoordinatorMessage, Fault, FaultKind, Heartbeat, Left,
    LeftReason, Phase, PublishCheckpoint,
};

use crate::job::Outcome;
use crate::link::{Report, Tagged};
use crate::place::Place;
use crate::worker::Exit;

/// Something happened.
#[derive(Debug)]
pub enum Input {
    /// The coordinator said something.
    Message(CoordinatorMessage),
    /// The stream to the coordinator broke.
    Detached,
    /// The training loop said something.
    Report(Tagged),
    /// A publication has ended; the error is one line.
    Published {
        /// Job that asked for it.
        job: u64,
        /// Step of the checkpoint.
        step: u64,
        /// Hash of its manifest.
        manifest_hash: [u8; 32],
        /// How it went.
        result: Result<(), String>,
    },
    /// The user, or something that cannot be repaired, ends the worker; says why on one line.
    Interrupted(String),
    /// Time has passed.
    Tick,
}

/// Something has to be done.
#[derive(Debug)]
pub enum Action {
    /// Send this up the stream.
    Send {
        /// Run that it speaks of.
        run: String,
        /// Generation that it speaks of.
        generation: u64,
        /// What it says.
        body: Up,
    },
    /// Hand this place to the training loop, which is idle.
    Start {
        /// Number of the job; its reports carry it.
        job: u64,
        /// What to do.
        place: Box<Place>,
    },
    /// Void the job that was started last.
    Void,
    /// Ask the job that was started last to stop after its step.
    RequestStop,
    /// Publish a checkpoint and tell of it with [`Input::Published`].
    Publish {
        /// Job that asks.
        job: u64,
        /// Step of the checkpoint.
        step: u64,
        /// Root of the run's checkpoints.
        root: PathBuf,
        /// Directory below it, as it came over the wire.
        path: String,
        /// Hash of the manifest.
        manifest_hash: [u8; 32],
    },
    /// Tell the job that was started last that its checkpoint is published.
    TellPublished(u64),
    /// End the worker: the training loop is idle.
    End(Exit),
    /// End the process: the training loop does not come back. With an exit when the worker was about
    /// to end anyway.
    Die(Option<Exit>),
}

/// State of a worker.
#[derive(Debug)]
pub struct Session {
    abort_limit: Duration,
    /// None while the stream is down.
    heartbeats: Option<Heartbeats>,
    /// Jobs begun so far; the number of the last one.
    jobs: u64,
    current: Option<Current>,
    /// Assignment that waits for the training loop to leave the one before.
    next: Option<Place>,
    /// Run and generation that were assigned last: a repeat is ignored.
    last: (String, u64),
    ending: Option<Exit>,
    phase: (Phase, u64),
    phase_since: Instant,
}

#[derive(Debug)]
struct Heartbeats {
    every: Duration,
    due: Instant,
}

/// The place that the worker has.
#[derive(Debug)]
struct Current {
    job: u64,
    run: String,
    generation: u64,
    root: PathBuf,
    stage: Stage,
    /// A stop was asked for.
    stop: bool,
    written: Option<CheckpointWritten>,
    published: Option<(u64, [u8; 32])>,
}

#[derive(Debug)]
enum Stage {
    /// The training loop is idle; it gets this place after a publication.
    Preparing(Box<Place>),
    Working,
    /// The training loop has been told and has to come back.
    Leaving {
        since: Instant,
        /// What to tell the coordinator then; none when it is another stream by now.
        reason: Option<LeftReason>,
    },
}

type Actions = Vec<Action>;

impl Session {
    /// A worker that is not attached. `abort_limit`: how long leaving may take.
    pub fn new(abort_limit: Duration, now: Instant) -> Session {
        Session {
            abort_limit,
            heartbeats: None,
            jobs: 0,
            current: None,
            next: None,
            last: (String::new(), 0),
            ending: None,
            phase: (Phase::Idle, 0),
            phase_since: now,
        }
    }

    /// What to do about `input`.
    pub fn handle(&mut self, input: Input, now: Instant) -> Actions {
        let mut actions = Vec::new();
        match input {
            Input::Message(message) => self.on_message(message, now, &mut actions),
            Input::Detached => self.on_detached(now, &mut actions),
            Input::Report(tagged) => self.on_report(tagged, now, &mut actions),
            Input::Published {
                job,
                step,
                manifest_hash,
                result,
            } => {
                self.on_published(job, step, manifest_hash, result, now, &mut actions);
            }
            Input::Interrupted(why) => {
                self.end(Exit::Interrupted, Some(why), now, &mut actions);
            }
            Input::Tick => self.on_tick(now, &mut actions),
        }
        actions
    }

    fn on_message(&mut self, message: CoordinatorMessage, now: Instant, actions: &mut Actions) {
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
            Down::Publish(publish) if mine => self.on_publish(&publish, now, actions),
            Down::Publish(_) => {}
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

    fn begin(&mut self, place: Place, now: Instant, actions: &mut Actions) {
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

    fn start(&mut self, place: Box<Place>, actions: &mut Actions) {
        let Some(current) = &mut self.current else {
            return;
        };
        current.stage = Stage::Working;
        actions.push(Action::Start {
            job: current.job,
            place,
        });
        if current.stop {
            actions.push(Action::RequestStop);
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

    fn on_published(
        &mut self,
        job: u64,
        step: u64,
        hash: [u8; 32],
        result: Result<(), String>,
        now: Instant,
        actions: &mut Actions,
    ) {
        let Some(current) = self.current.as_mut().filter(|current| current.job == job) else {
            return;
        };
        if matches!(current.stage, Stage::Leaving { .. }) {
            return;
        }
        if let Err(message) = result {
            let kind = match current.stage {
                // Nothing can start from a checkpoint that is not there.
                Stage::Preparing(_) => FaultKind::Input,
                _ => FaultKind::Transient,
            };
            return self.fail(kind, message, now, actions);
        }
        match std::mem::replace(&mut current.stage, Stage::Working) {
            Stage::Preparing(place) => self.start(place, actions),
            _ => {
                current.written = None;
                current.published = Some((step, hash));
                actions.push(Action::TellPublished(step));
                self.tell_published(step, hash, actions);
            }
        }
    }

    fn tell_published(&self, step: u64, hash: [u8; 32], actions: &mut Actions) {
        let body = Up::CheckpointPublished(CheckpointPublished {
            step,
            manifest_hash: hash.to_vec(),
        });
        self.send_for_current(body, actions);
    }

    fn on_report(&mut self, tagged: Tagged, now: Instant, actions: &mut Actions) {
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
            // The coordinator has no use for the rest of a void generation.
            _ if !working => {}
            Report::Phase(phase, step) => self.set_phase(phase, step, now),
            Report::Formed(formed) => self.send_for_current(Up::Formed(formed), actions),
            Report::Step(step) => self.send_for_current(Up::Step(step), actions),
            Report::CheckpointWritten(written) => {
                current.written = Some(written.clone());
                self.send_for_current(Up::CheckpointWritten(written), actions);
            }
        }
    }

    /// The training loop is back.
    fn on_done(&mut self, outcome: Outcome, now: Instant, actions: &mut Actions) {
        let Some(current) = self.current.take() else {
            return;
        };
        let (run, generation) = (current.run, current.generation);
        let reason = match (current.stage, outcome) {
            // What it says of a void generation is an echo of the abort.
            (Stage::Leaving { reason, .. }, _) => reason,
            (_, Outcome::Finished) => Some(LeftReason::Finished),
            (_, Outcome::Stopped) => Some(LeftReason::Stopped),
            (_, Outcome::Voided) => Some(LeftReason::Void),
            (_, Outcome::Fault { kind, message }) => {
                self.fault(&run, generation, kind, message, actions);
                Some(LeftReason::Fault)
            }
        };
        if let Some(reason) = reason {
            self.left(&run, generation, reason, actions);
        }
        self.set_phase(Phase::Idle, 0, now);
        if let Some(exit) = self.ending.clone() {
            actions.push(Action::End(exit));
        } else if let Some(next) = self.next.take() {
            self.begin(next, now, actions);
        }
    }

    fn on_detached(&mut self, now: Instant, actions: &mut Actions) {
        self.heartbeats = None;
        self.next = None;
        self.leave(None, now, actions);
        if let Some(Current {
            stage: Stage::Leaving { reason, .. },
            ..
        }) = &mut self.current
        {
            // The next stream begins with nothing to leave.
            *reason = None;
        }
    }

    fn on_tick(&mut self, now: Instant, actions: &mut Actions) {
        if let Some(Current {
            stage: Stage::Leaving { since, .. },
            ..
        }) = &self.current
            && now.duration_since(*since) >= self.abort_limit
        {
            actions.push(Action::Die(self.ending.clone()));
        }
        if let Some(heartbeats) = self
            .heartbeats
            .as_mut()
            .filter(|heartbeats| heartbeats.due <= now)
        {
            heartbeats.due = now + heartbeats.every;
            let (phase, step) = self.phase;
            let in_phase_ms = now.duration_since(self.phase_since).as_millis() as u64;
            self.send_for_current(
                Up::Heartbeat(Heartbeat {
                    phase: phase.into(),
                    step,
                    in_phase_ms,
                }),
                actions,
            );
        }
    }

    /// Ends the worker as soon as the training loop is idle; `why` is a fault to tell of.
    fn end(&mut self, exit: Exit, why: Option<String>, now: Instant, actions: &mut Actions) {
        self.next = None;
        self.ending.get_or_insert(exit);
        match why {
            Some(message) if self.current.is_some() => {
                self.fail(FaultKind::Transient, message, now, actions)
            }
            _ => self.leave(Some(LeftReason::Void), now, actions),
        }
        if let (None, Some(exit)) = (&self.current, &self.ending) {
            actions.push(Action::End(exit.clone()));
        }
    }

    /// Reports a fault of the current place and leaves it.
    fn fail(&mut self, kind: FaultKind, message: String, now: Instant, actions: &mut Actions) {
        let Some(current) = &self.current else { return };
        if !matches!(current.stage, Stage::Leaving { .. }) {
            let (run, generation) = (current.run.clone(), current.generation);
            self.fault(&run, generation, kind, message, actions);
        }
        self.leave(Some(LeftReason::Fault), now, actions);
    }

    /// Leaves the current place, if there is one that is not being left already. Where the training
    /// loop has not begun, the place is left at once.
    fn leave(&mut self, reason: Option<LeftReason>, now: Instant, actions: &mut Actions) {
        let Some(current) = &mut self.current else {
            return;
        };
        match current.stage {
            Stage::Leaving { .. } => {}
            Stage::Working => {
                current.stage = Stage::Leaving { since: now, reason };
                actions.push(Action::Void);
                self.set_phase(Phase::Leaving, 0, now);
            }
            Stage::Preparing(_) => {
                let (run, generation) = (current.run.clone(), current.generation);
                self.current = None;
                self.set_phase(Phase::Idle, 0, now);
                if let Some(reason) = reason {
                    self.left(&run, generation, reason, actions);
                }
            }
        }
    }

    /// The time in a phase begins anew with every step: alive is not progress.
    fn set_phase(&mut self, phase: Phase, step: u64, now: Instant) {
        if self.phase != (phase, step) {
            self.phase = (phase, step);
            self.phase_since = now;
        }
    }

    fn fault(
        &self,
        run: &str,
        generation: u64,
        kind: FaultKind,
        message: String,
        actions: &mut Actions,
    ) {
        let (phase, step) = self.phase;
        let body = Up::Fault(Fault {
            kind: kind.into(),
            message,
            phase: phase.into(),
            step,
        });
        self.send(run, generation, body, actions);
    }

    fn left(&self, run: &str, generation: u64, reason: LeftReason, actions: &mut Actions) {
        self.send(
            run,
            generation,
            Up::Left(Left {
                reason: reason.into(),
            }),
            actions,
        );
    }

    fn send_for_current(&self, body: Up, actions: &mut Actions) {
        match &self.current {
            Some(current) => self.send(&current.run, current.generation, body, actions),
            None => self.send("", 0, body, actions),
        }
    }

    /// Without a stream there is nobody to tell.
    fn send(&self, run: &str, generation: u64, body: Up, actions: &mut Actions) {
        if self.heartbeats.is_some() {
            actions.push(Action::Send {
                run: run.to_owned(),
                generation,
                body,
            });
        }
    }
}
