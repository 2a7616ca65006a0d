//! The state machine: `(state, event, now) -> actions`.
//!
//! Pure: no async, clock, socket, file or randomness; time, wall clock and a fresh random key come with every event.
//! What must survive is in [`State`], changed only by [`Fact`]s that the machine decides and the journal keeps; the
//! rest (attached workers, what ranks reported) begins anew when the coordinator restarts, and workers say it again.
//!
//! The life of a generation: enough workers are idle -> each gets its assignment -> every rank says that it has formed
//! and all agree -> steps are applied when all ranks have reported the same -> checkpoints are journalled, then
//! published -> the last one ends the run. Anything that breaks it ends it for all: the others are told at once, and when
//! all have left the next generation forms, from the newest state that one of its workers still holds. When none holds
//! any, the steps after the newest journalled checkpoint are void.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use supra_proto::v1::{self, coordinator_message::Body as Down, worker_message::Body as Up};

mod adopt;
mod agreement;
mod aside;
mod attach;
mod away;
mod chaos;
mod clients;
mod ending;
mod evaluations;
mod fact;
mod forming;
mod generation;
mod keeping;
mod muster;
mod pacing;
mod proofs;
mod pulse;
mod recovery;
mod regroup;
mod replicas;
mod retention;
#[cfg(test)]
mod rig;
mod snapshots;
mod state;
mod steps;
mod stuck;
#[cfg(test)]
mod tests;
mod training;
mod verify;
mod view;
mod worker;

pub use adopt::Adoption;
pub use clients::{Refused, Submission};
pub use fact::{Fact, Outcome};
pub use proofs::Found;
pub use state::{
    Adopted, Aside, Checkpoint, Damaged, Failures, Run, RunNumber, RunPhase, State, Workers,
};
pub use verify::Logged;
pub use view::FindError;
pub use worker::Conn;

use crate::interval;
use crate::ledger::{Body, Hash};
use aside::Conduct;
use generation::Generation;
use proofs::Proofs;
use steps::Unapplied;
use stuck::Watch;
use worker::Worker;

/// Times and counts that the machine decides with.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Time between heartbeats that workers are asked for.
    pub heartbeat: Duration,
    /// A worker that is silent for longer is lost.
    pub silence: Duration,
    /// A member that has not left a void generation after this long is dropped.
    pub leave: Duration,
    /// The same after the last step or a stop, where nothing is wrong.
    pub farewell: Duration,
    /// How long lost members of the last generation are waited for.
    pub rejoin: Duration,
    /// Generations in a row that may fail at the same step.
    pub failures: u32,
    /// A generation that takes longer to form is stuck.
    pub load: Duration,
    /// The same for the first step of a generation.
    pub first_step: Duration,
    /// The same for a checkpoint.
    pub checkpoint: Duration,
    /// The same for measuring the state behind a step.
    pub evaluation: Duration,
    /// A later step is stuck after so many times the usual time of a step, and the slack.
    pub stuck_factor: u32,
    /// What a step may take beyond that: a short checkpoint, a slow read, a lost heartbeat.
    pub stuck_slack: Duration,
    /// Between what the interval of checkpoints stays that the coordinator asks for.
    pub interval: interval::Bounds,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            heartbeat: Duration::from_secs(1),
            silence: Duration::from_secs(10),
            leave: Duration::from_secs(10),
            farewell: Duration::from_secs(30),
            rejoin: Duration::from_secs(3),
            failures: 3,
            load: Duration::from_secs(1800),
            first_step: Duration::from_secs(600),
            checkpoint: Duration::from_secs(1800),
            evaluation: Duration::from_secs(1800),
            stuck_factor: 10,
            stuck_slack: Duration::from_secs(30),
            interval: interval::Bounds::default(),
        }
    }
}

/// What a worker has to match to be let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Version and commit of the program.
    pub build: String,
    /// Version of the plan.
    pub plan_version: u32,
    /// Digest of a fixed plan evaluation.
    pub plan_probe: Vec<u8>,
}

/// When an event happens, and the randomness that its decisions may use.
#[derive(Clone, Debug, Default)]
pub struct Moment {
    /// Monotonic time since the coordinator started. The only time that decisions are made with.
    pub now: Duration,
    /// Wall clock, milliseconds since the Unix epoch. Only kept and shown.
    pub unix_ms: u64,
    /// Fresh random bytes: the data-plane key of a generation, should one form.
    pub key: [u8; 32],
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A stream opened with a Hello.
    Hello {
        /// The stream.
        conn: Conn,
        /// Where it comes from.
        peer: String,
        /// Who it is.
        hello: v1::Hello,
    },
    /// A worker said something else.
    Message {
        /// The stream.
        conn: Conn,
        /// What it said.
        message: v1::WorkerMessage,
    },
    /// A stream is gone.
    Lost {
        /// The stream.
        conn: Conn,
        /// Why, as far as known.
        cause: String,
    },
    /// A client submits a validated recipe.
    Submit(Submission),
    /// A client has a run rebuilt from one of its checkpoints.
    Adopt(Box<Adoption>),
    /// A client wants a run stopped.
    Cancel(RunNumber),
    /// A client wants a stopped run continued.
    Resume {
        /// Run.
        run: RunNumber,
        /// A damaged checkpoint is to stop it.
        strict: bool,
    },
    /// A client wants the checkpoint of a step kept under a name.
    NameCheckpoint {
        /// Run.
        run: RunNumber,
        /// Step of the checkpoint.
        step: u64,
        /// The name.
        name: String,
    },
    /// A client drops such a name.
    DropName {
        /// Run.
        run: RunNumber,
        /// The name.
        name: String,
    },
    /// A client wants old and damaged checkpoints deleted.
    Prune {
        /// Run.
        run: RunNumber,
        /// So many of the newest stay; none = as many as the recipe says.
        keep: Option<u32>,
    },
    /// A client wants no generation to take the worker of this name any more.
    Drain(String),
    /// The coordinator is to end.
    Shutdown(String),
    /// The directory of a retired checkpoint is gone.
    Deleted {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
    },
    /// A checkpoint was read again.
    Verified {
        /// Run.
        run: RunNumber,
        /// Number that came with [`Action::Verify`].
        attempt: u64,
        /// What it showed.
        found: Found,
    },
    /// The ledger of a run that spent its budget under `chaos` was audited.
    Audited {
        /// Run.
        run: RunNumber,
        /// Whether it proves that every sample was trained exactly once; else the first break, in one line.
        result: Result<(), String>,
    },
    /// Time passed.
    Tick,
}

impl Event {
    /// It is noted and changes no decision: a heartbeat or a line of a log.
    fn is_chatter(&self) -> bool {
        let Event::Message { message, .. } = self else {
            return false;
        };
        matches!(message.body, Some(Up::Heartbeat(_) | Up::Log(_)))
    }
}

/// What is to be done, in order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Write the fact down. An urgent one has to be on disk before any later action of the list is carried out.
    Journal(Fact),
    /// Have all facts so far on disk before any later action of the list is carried out.
    Sync,
    /// Tell a worker.
    Send {
        /// The stream.
        conn: Conn,
        /// Run that the message speaks of; empty for none.
        run: String,
        /// Generation that the message speaks of.
        generation: u64,
        /// What.
        body: Down,
    },
    /// End a stream after what was sent.
    Close(Conn),
    /// Delete the directory of a retired checkpoint, then say [`Event::Deleted`].
    Delete {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
        /// Its directory.
        directory: PathBuf,
    },
    /// Read all of a published checkpoint, then say [`Event::Verified`].
    Verify {
        /// Run.
        run: RunNumber,
        /// Number of the attempt.
        attempt: u64,
        /// Directory of the checkpoint.
        directory: PathBuf,
        /// BLAKE3 of its manifest.
        manifest_hash: Hash,
    },
    /// Keep the metrics of an applied step.
    Measured {
        /// Run.
        run: RunNumber,
        /// The metrics.
        metrics: v1::StepMetrics,
    },
    /// Account for the time that training stood still to be measured.
    StoodStill {
        /// Run.
        run: RunNumber,
        /// Seconds.
        seconds: f64,
    },
    /// Tell people.
    Log {
        /// Run that it is about.
        run: Option<RunNumber>,
        /// The line.
        entry: v1::LogEntry,
    },
    /// All is written and everybody is told: end the process.
    Exit,
}

/// The coordinator's decisions.
#[derive(Debug)]
pub struct Machine {
    limits: Limits,
    identity: Identity,
    state: State,
    workers: BTreeMap<Conn, Worker>,
    /// Workers that left, newest last.
    departed: VecDeque<Worker>,
    generation: Option<Generation>,
    /// What the last generation reported and the ledger does not hold.
    unapplied: Option<Unapplied>,
    watch: Watch,
    conduct: Conduct,
    proofs: Proofs,
    clock: chaos::Clock,
    /// Why the coordinator is ending, once it is.
    shutdown: Option<String>,
    said_goodbye: bool,
    /// When a worker last attached, when the last generation ended, and when the last tick came.
    attached_at: Duration,
    free_since: Duration,
    ticked_at: Duration,
    moment: Moment,
    out: Vec<Action>,
}

impl Machine {
    /// The machine of a coordinator that starts with what its journal remembers. The actions bring runs that the last
    /// coordinator left in the middle of something to where a new generation can take over.
    pub fn new(
        state: State,
        limits: Limits,
        identity: Identity,
        moment: &Moment,
    ) -> (Machine, Vec<Action>) {
        let mut machine = Machine {
            limits,
            identity,
            state,
            workers: BTreeMap::new(),
            departed: VecDeque::new(),
            generation: None,
            unapplied: None,
            watch: Watch::default(),
            conduct: Conduct::default(),
            proofs: Proofs::default(),
            clock: chaos::Clock::default(),
            shutdown: None,
            said_goodbye: false,
            attached_at: moment.now,
            free_since: moment.now,
            ticked_at: moment.now,
            moment: moment.clone(),
            out: Vec::new(),
        };
        machine.recover();
        let actions = std::mem::take(&mut machine.out);
        (machine, actions)
    }

    /// Takes an event and answers with what is to be done about it.
    ///
    /// # Errors
    /// What a client asked for cannot be done; nothing has changed then.
    pub fn handle(&mut self, event: Event, moment: &Moment) -> Result<Vec<Action>, Refused> {
        let now = self.moment.now.max(moment.now);
        self.moment = Moment {
            now,
            ..moment.clone()
        };
        let chatter = event.is_chatter();
        match event {
            Event::Hello { conn, peer, hello } => self.attach(conn, peer, hello),
            Event::Message { conn, message } => self.message(conn, message),
            Event::Lost { conn, cause } => self.drop_worker(conn, &cause),
            Event::Submit(submission) => self.submit(submission)?,
            Event::Adopt(adoption) => self.adopt(*adoption)?,
            Event::Cancel(run) => self.cancel(run)?,
            Event::Resume { run, strict } => self.resume(run, strict)?,
            Event::NameCheckpoint { run, step, name } => self.name_checkpoint(run, step, name)?,
            Event::DropName { run, name } => self.drop_name(run, &name)?,
            Event::Prune { run, keep } => self.prune(run, keep)?,
            Event::Drain(worker) => self.drain(&worker)?,
            Event::Shutdown(reason) => self.shut_down(reason),
            Event::Deleted { run, path } => self.deleted(run, path),
            Event::Verified {
                run,
                attempt,
                found,
            } => self.proved(run, attempt, found),
            Event::Audited { run, result } => self.audited(run, result),
            Event::Tick => self.tick(),
        }
        // Nothing follows from it, and there is much of it: one per second from each of thousands of workers.
        if !chatter {
            self.advance();
        }
        Ok(std::mem::take(&mut self.out))
    }

    /// What must survive.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What follows from the state as it now is: a generation that all have left is over, and the next one forms; one
    /// that others could join, or a member is to leave, regroups.
    fn advance(&mut self) {
        self.conclude();
        if self.generation.is_some() {
            return self.reconsider();
        }
        if self.shutdown.is_some() {
            self.say_goodbye();
        } else {
            self.form();
        }
    }

    fn message(&mut self, conn: Conn, message: v1::WorkerMessage) {
        let Some(worker) = self.workers.get_mut(&conn) else {
            return;
        };
        worker.heard = self.moment.now;
        let Some(body) = message.body else { return };
        match body {
            Up::Heartbeat(heartbeat) => {
                worker.phase = heartbeat.phase();
                worker.step = heartbeat.step;
                worker.waited = Duration::from_millis(heartbeat.waiting_ms);
                return;
            }
            Up::Log(line) => return self.worker_log(conn, &message.run, line),
            Up::Hello(_) => return,
            _ => {}
        }
        let (run, generation) = (message.run, message.generation);
        let Some((rank, run)) = self.place(conn, &run, generation) else {
            if let Up::Left(left) = body {
                self.left_elsewhere(conn, &run, generation, left);
            }
            return;
        };
        match body {
            Up::Formed(formed) => self.formed(rank, formed),
            Up::Step(report) => self.reported(rank, run, report),
            Up::CheckpointBegun(begun) => self.begun(rank, run, begun),
            Up::CheckpointWritten(written) => self.written(rank, run, written),
            Up::Evaluated(evaluated) => self.evaluated(run, evaluated),
            Up::Gates(gates) => self.gated(run, gates),
            Up::SnapshotTaken(taken) => self.snapshot_taken(rank, run, taken),
            Up::CheckpointPublished(published) => self.published(run, &published),
            Up::Fault(fault) => self.fault(rank, &fault),
            Up::Left(left) => self.left(rank, left),
            Up::Hello(_) | Up::Heartbeat(_) | Up::Log(_) => {}
        }
    }

    /// Rank and run of a worker that speaks of the generation in hand; what it says about any other is void.
    fn place(&self, conn: Conn, run: &str, number: u64) -> Option<(usize, RunNumber)> {
        let generation = self.generation.as_ref()?;
        let same = generation.number == number && self.state.run(generation.run)?.id == run;
        Some((generation.rank(conn).filter(|_| same)?, generation.run))
    }

    /// Applies a fact and has it written down.
    fn decide(&mut self, fact: Fact) {
        self.state.apply(&fact);
        self.out.push(Action::Journal(fact));
    }

    /// Puts a body at the end of a run's ledger.
    fn record(&mut self, run: RunNumber, body: Body) {
        if let Some(record) = self.state.run(run).map(|known| known.ledger.next(body)) {
            self.decide(Fact::Recorded { run, record });
        }
    }

    /// Tells a member of the generation in hand.
    fn tell(&mut self, rank: usize, body: Down) {
        let Some(generation) = &self.generation else {
            return;
        };
        let run = self
            .state
            .run(generation.run)
            .map(|run| run.id.clone())
            .unwrap_or_default();
        let (conn, number) = (generation.members[rank].conn, generation.number);
        self.out.push(Action::Send {
            conn,
            run,
            generation: number,
            body,
        });
    }

    /// Tells every member that is there and has not left, except `spared`.
    fn tell_all(&mut self, body: &Down, spared: Option<usize>) {
        let Some(generation) = &self.generation else {
            return;
        };
        let there = |rank: &usize| {
            let member = &generation.members[*rank];
            !member.gone() && !member.absent() && Some(*rank) != spared
        };
        let ranks: Vec<usize> = (0..generation.members.len()).filter(there).collect();
        for rank in ranks {
            self.tell(rank, body.clone());
        }
    }

    fn log(&mut self, run: Option<RunNumber>, level: &str, text: String) {
        let entry = v1::LogEntry {
            unix_ms: self.moment.unix_ms,
            source: "coordinator".to_owned(),
            level: level.to_owned(),
            text,
        };
        self.out.push(Action::Log { run, entry });
    }

    fn worker_log(&mut self, conn: Conn, run: &str, line: v1::LogLine) {
        let source = self
            .workers
            .get(&conn)
            .map(|worker| worker.hello.name.clone())
            .unwrap_or_default();
        let run = self
            .state
            .runs()
            .iter()
            .find(|known| known.id == run)
            .map(|known| known.number);
        let entry = v1::LogEntry {
            unix_ms: line.unix_ms,
            source,
            level: line.level,
            text: line.text,
        };
        self.out.push(Action::Log { run, entry });
    }
}
