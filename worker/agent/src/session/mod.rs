//! What the worker does with every message: a state machine without clock, socket or thread.
//!
//! [`Session::handle`] takes one [`Input`] and gives the [`Action`]s for it, in order. The control
//! thread does what they say and knows nothing of generations.
//!
//! A worker has at most one place in a generation. It is *preparing* it (rank 0 publishes the
//! checkpoint to start from, if the generation before did not get to it), *working*, or *leaving*:
//! void, but the training loop is not back yet. An assignment that arrives meanwhile waits.
//!
//! When the stream breaks while it works, it goes on for `coordinator.away` of its recipe. To the coordinator that it then
//! finds it says where it works, and again what that may not have written down.

mod down;
mod standing;
mod up;

use std::time::{Duration, Instant};

use supra_checkpoint::Store;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{
    CheckpointWritten, CoordinatorMessage, Fault, FaultKind, Heartbeat, Held, Left, LeftReason,
    OrderedFaultKind, Phase, Place as Standpoint,
};

use crate::link::Tagged;
use crate::place::Place;
use crate::unfinished::Unfinished;
pub use crate::unfinished::Unwritten;
pub use crate::unpublished::Unpublished;
use crate::worker::Exit;
use standing::Standing;

/// Something happened.
#[derive(Debug)]
pub enum Input {
    /// The coordinator said something.
    Message(CoordinatorMessage),
    /// The stream to the coordinator broke.
    Detached,
    /// The training loop said something.
    Report(Tagged),
    /// A publication has ended.
    Published {
        /// Job that asked for it.
        job: u64,
        /// Step of the checkpoint.
        step: u64,
        /// Hash of its manifest.
        manifest_hash: [u8; 32],
        /// How it went.
        result: Result<(), Unpublished>,
    },
    /// The manifest of a checkpoint is written, or is not.
    Finished {
        /// Job that wrote the rest.
        job: u64,
        /// How it went.
        result: Result<CheckpointWritten, Unwritten>,
    },
    /// The user, or something that cannot be repaired, ends the worker; says why on one line.
    Interrupted(String),
    /// For how long the training loop has waited in an exchange for other ranks; zero when it does not.
    Waited(Duration),
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
        body: Box<Up>,
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
    /// Ask the job that was started last to end after its step, for another membership.
    RequestRegroup,
    /// Ask the job that was started last for a checkpoint after its step, unless it has begun one newer than this step's.
    RequestCheckpoint(u64),
    /// Break this worker in this way, for so long where that has a meaning: the recipe's `chaos` orders it.
    Break(OrderedFaultKind, Duration),
    /// Publish a checkpoint and tell of it with [`Input::Published`].
    Publish {
        /// Job that asks.
        job: u64,
        /// Step of the checkpoint.
        step: u64,
        /// Root of the run's checkpoints.
        root: Store,
        /// Directory below it, as it came over the wire.
        path: String,
        /// Hash of the manifest.
        manifest_hash: [u8; 32],
    },
    /// Tell the job that was started last that its checkpoint is published.
    TellPublished(u64),
    /// Get the ledger from the coordinator, write it and the manifest of a checkpoint with its head, and tell of it with
    /// [`Input::Finished`].
    Finish {
        /// Job that wrote the rest.
        job: u64,
        /// Run whose ledger it is.
        run: String,
        /// Root of the run's checkpoints.
        root: Store,
        /// What is there.
        unfinished: Box<Unfinished>,
        /// The ledger's head behind its step.
        head: [u8; 32],
    },
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
    /// The last place that the training loop got.
    standing: Option<Standing>,
    /// Since when the worker has been working without a coordinator.
    away_since: Option<Instant>,
    /// Assignment that waits for the training loop to leave the one before.
    next: Option<Place>,
    /// Run and generation that were assigned last: a repeat is ignored.
    last: (String, u64),
    /// State that the training loop keeps while it is idle.
    held: Option<Held>,
    ending: Option<Exit>,
    phase: (Phase, u64),
    phase_since: Instant,
    waited: Duration,
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
    root: Store,
    stage: Stage,
    /// A stop was asked for.
    stop: bool,
    /// A regrouping was asked for.
    regroup: bool,
    /// Checkpoints that wait for the ledger's head, and those that wait to be published.
    unfinished: Vec<Unfinished>,
    written: Vec<CheckpointWritten>,
    /// Number of the last fault that was ordered.
    fault: u32,
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
            standing: None,
            away_since: None,
            next: None,
            last: (String::new(), 0),
            held: None,
            ending: None,
            phase: (Phase::Idle, 0),
            phase_since: now,
            waited: Duration::ZERO,
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
            Input::Finished { job, result } => self.on_finished(job, result, now, &mut actions),
            Input::Interrupted(why) => {
                self.end(Exit::Interrupted, Some(why), now, &mut actions);
            }
            Input::Waited(waited) => self.waited = waited,
            Input::Tick => self.on_tick(now, &mut actions),
        }
        actions
    }

    /// State that this worker has in memory and can start from; none while the training loop works.
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// The last place of this worker, for Hello; none when no coordinator could take it up again.
    pub fn place(&self) -> Option<Box<Standpoint>> {
        let standing = self.standing.as_ref()?;
        standing.place().cloned().map(Box::new)
    }

    /// Messages that may be said at once when the next stream opens.
    pub fn backlog(&self) -> usize {
        self.standing.as_ref().map_or(0, Standing::len)
    }

    /// Whether the worker goes on without a coordinator.
    pub fn away(&self) -> bool {
        self.away_since.is_some()
    }

    /// Whether the training loop is not back yet from a generation that is over.
    pub fn leaving(&self) -> bool {
        let stage = self.current.as_ref().map(|current| &current.stage);
        matches!(stage, Some(Stage::Leaving { .. }))
    }

    fn on_detached(&mut self, now: Instant, actions: &mut Actions) {
        self.heartbeats = None;
        self.next = None;
        if self.ending.is_none() && !self.patience().is_zero() {
            self.away_since.get_or_insert(now);
            return;
        }
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

    /// How long the worker may go on without a coordinator.
    fn patience(&self) -> Duration {
        let working = self
            .current
            .as_ref()
            .filter(|current| matches!(current.stage, Stage::Working));
        let standing = self
            .standing
            .as_ref()
            .filter(|it| working.is_some_and(|current| it.is(current.job)));
        standing.map_or(Duration::ZERO, Standing::patience)
    }

    fn on_tick(&mut self, now: Instant, actions: &mut Actions) {
        let patience = self.patience();
        if self
            .away_since
            .take_if(|since| now.duration_since(*since) >= patience)
            .is_some()
        {
            self.leave(None, now, actions);
        }
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
                    waiting_ms: self.waited.as_millis() as u64,
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
        let fault = self.fault_here(kind, message);
        self.send(run, generation, Up::Fault(fault), actions);
    }

    /// A fault in the phase and step in hand.
    fn fault_here(&self, kind: FaultKind, message: String) -> Fault {
        let (phase, step) = self.phase;
        Fault {
            kind: kind.into(),
            message,
            phase: phase.into(),
            step,
            culprit: None,
        }
    }

    fn left(&self, run: &str, generation: u64, reason: LeftReason, actions: &mut Actions) {
        self.send(run, generation, self.left_body(reason), actions);
    }

    fn left_body(&self, reason: LeftReason) -> Up {
        Up::Left(Left {
            reason: reason.into(),
            held: self.held.clone(),
        })
    }

    /// Says something of the current place that a coordinator may have to hear again.
    fn report(&mut self, body: Up, actions: &mut Actions) {
        let heard = self.heartbeats.is_some();
        if let Some(standing) = &mut self.standing {
            standing.say(body.clone(), heard);
        }
        self.send_for_current(body, actions);
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
                body: Box::new(body),
            });
        }
    }
}
