//! The task that owns the machine: events in, actions carried out in order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use supra_checkpoint::Store;
use supra_proto::v1::{self, CoordinatorMessage, LogEntry, coordinator_message::Body as Down};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::ServiceError;
use super::accounts::Accounts;
use super::audits;
use super::handle::{Ask, Handle};
use super::receipt::Receipts;
use super::speed::Speed;
use super::verifier::Verifier;
use crate::journal::{Journal, JournalError};
use crate::ledger::Body;
use crate::machine::{
    Action, Conn, Event, Fact, FindError, Identity, Limits, Machine, Moment, Refused, Run,
    RunNumber, RunPhase,
};
use crate::telemetry::Telemetry;

/// Events that may wait for the owner.
const INBOX: usize = 1024;

/// Log lines that a slow `supra logs --follow` may be behind.
const LOG_BACKLOG: usize = 1024;

/// Time between ticks of the machine.
const TICK: Duration = Duration::from_millis(250);

/// The queue down to a worker.
pub(super) type Downstream = mpsc::Sender<Result<CoordinatorMessage, tonic::Status>>;

/// How a coordinator ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// A run that was training was stopped and can be resumed.
    pub stopped_a_run: bool,
}

/// Why a coordinator had to stop.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// What cannot be written down must not be done.
    #[error("stopped, since nothing can be promised without the journal: {0}")]
    Journal(#[from] JournalError),
    /// A bug.
    #[error("the coordinator's owner task broke down; the journal is whole, start it again")]
    Broken,
}

/// The queue down to one worker and the number of its last message.
struct Link {
    down: Downstream,
    sequence: u64,
}

/// The machine and all that it acts on.
pub(super) struct Owner {
    machine: Machine,
    journal: Journal,
    telemetry: Telemetry,
    started: Instant,
    /// The wall clock when it started, milliseconds since the Unix epoch.
    started_unix_ms: u64,
    links: BTreeMap<Conn, Link>,
    next_conn: Conn,
    /// Events that carrying out actions brought up.
    aftermath: VecDeque<Event>,
    speeds: BTreeMap<RunNumber, Speed>,
    accounts: Accounts,
    receipts: Receipts,
    /// Runs whose ledger is to be audited, and where it is.
    unaudited: Vec<RunNumber>,
    state: PathBuf,
    changed: watch::Sender<u64>,
    logs: broadcast::Sender<(RunNumber, LogEntry)>,
    verifier: Verifier,
    events: mpsc::WeakSender<Ask>,
    stopped_a_run: bool,
    exit: bool,
}

impl Owner {
    /// Opens the state directory and starts the task.
    pub fn start(
        state: &Path,
        limits: Limits,
        identity: Identity,
    ) -> Result<(Handle, JoinHandle<Result<Ending, OwnerError>>), ServiceError> {
        let telemetry_error = |cause| ServiceError::Telemetry {
            path: state.join("telemetry.db"),
            cause,
        };
        let (journal, remembered) = Journal::open(state)?;
        let telemetry = Telemetry::open(state).map_err(telemetry_error)?;
        let reader = telemetry.reader().map_err(telemetry_error)?;
        let mut speeds = BTreeMap::new();
        for run in remembered.runs() {
            let newest = reader.newest(run.number).map_err(telemetry_error)?;
            speeds.extend(newest.map(|metrics| (run.number, Speed::resumed(metrics))));
        }
        let started = Instant::now();
        let now = moment(started);
        let accounts =
            Accounts::resumed(remembered.runs(), &reader, now.unix_ms).map_err(telemetry_error)?;
        let owing = remembered.runs().iter().filter(|run| run.owes_mark());
        let unaudited = owing.map(|run| run.number).collect();
        let build = identity.build.clone();
        let (machine, actions) = Machine::new(remembered, limits, identity, &now);
        let (asks, inbox) = mpsc::channel(INBOX);
        let (changed, changes) = watch::channel(0);
        let (logs, _) = broadcast::channel(LOG_BACKLOG);
        let handle = Handle {
            asks: asks.clone(),
            changed: changes,
            state: state.to_owned(),
        };
        let owner = Owner {
            machine,
            journal,
            telemetry,
            started,
            started_unix_ms: now.unix_ms,
            links: BTreeMap::new(),
            next_conn: 1,
            aftermath: VecDeque::new(),
            speeds,
            accounts,
            receipts: Receipts::new(build),
            unaudited,
            state: state.to_owned(),
            changed,
            logs,
            verifier: Verifier::default(),
            events: asks.downgrade(),
            stopped_a_run: false,
            exit: false,
        };
        Ok((handle, tokio::spawn(owner.run(inbox, actions))))
    }

    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Ask>,
        actions: Vec<Action>,
    ) -> Result<Ending, OwnerError> {
        self.carry_out(actions).await?;
        self.audit();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !self.exit {
            tokio::select! {
                ask = inbox.recv() => match ask {
                    Some(ask) => self.answer(ask).await?,
                    None => break,
                },
                _ = ticks.tick() => {
                    self.journal.check()?;
                    self.happen(Event::Tick).await?;
                    self.accounts.note(&self.telemetry, self.unix_ms());
                }
            }
        }
        self.verifier.stop();
        self.journal.sync().await?;
        self.accounts.note(&self.telemetry, self.unix_ms());
        self.telemetry.written().await;
        self.receipts.written().await;
        Ok(Ending {
            stopped_a_run: self.stopped_a_run,
        })
    }

    async fn answer(&mut self, ask: Ask) -> Result<(), OwnerError> {
        match ask {
            Ask::Attach {
                peer,
                hello,
                down,
                reply,
            } => {
                let conn = self.next_conn;
                self.next_conn += 1;
                self.links.insert(conn, Link { down, sequence: 0 });
                let _ = reply.send(conn);
                self.happen(Event::Hello {
                    conn,
                    peer,
                    hello: *hello,
                })
                .await?;
            }
            Ask::Event(event) => {
                self.happen(event).await?;
            }
            Ask::Client { event, reply } => {
                let result = self.wish(event).await?;
                let _ = reply.send(result);
            }
            Ask::Look(look) => look(self),
        }
        Ok(())
    }

    /// Lets an event happen that cannot be refused.
    async fn happen(&mut self, event: Event) -> Result<(), OwnerError> {
        self.wish(event)
            .await?
            .unwrap_or_else(|refused| tracing::debug!("refused: {refused}"));
        Ok(())
    }

    /// Lets an event happen, and what it brings up; a client's may be refused.
    async fn wish(&mut self, event: Event) -> Result<Result<(), Refused>, OwnerError> {
        let actions = match self.machine.handle(event, &moment(self.started)) {
            Ok(actions) => actions,
            Err(refused) => return Ok(Err(refused)),
        };
        self.carry_out(actions).await?;
        while let Some(event) = self.aftermath.pop_front() {
            if let Ok(actions) = self.machine.handle(event, &moment(self.started)) {
                self.carry_out(actions).await?;
            }
        }
        Ok(Ok(()))
    }

    async fn carry_out(&mut self, actions: Vec<Action>) -> Result<(), OwnerError> {
        let at = self.unix_ms();
        self.accounts.seen(self.machine.pulse(), at);
        if actions.is_empty() {
            return Ok(());
        }
        let mut facts = Vec::new();
        for action in actions {
            match action {
                Action::Journal(fact) => {
                    self.note(&fact, at);
                    facts.push(fact);
                }
                Action::Measured { run, metrics } => {
                    self.speeds
                        .entry(run)
                        .or_default()
                        .measured(Instant::now(), &metrics);
                    self.accounts.measured(run, &metrics, at);
                    self.telemetry.measured(run, metrics);
                }
                Action::StoodStill { run, seconds } => {
                    self.accounts.stood_still(run, seconds, at);
                }
                Action::Log { run, entry } => self.log(run.unwrap_or(0), entry),
                Action::Send {
                    conn,
                    run,
                    generation,
                    body,
                } => {
                    self.write_down(&mut facts).await?;
                    self.send(conn, run, generation, body);
                }
                Action::Sync => {
                    self.write_down(&mut facts).await?;
                    self.journal.sync().await?;
                }
                Action::Close(conn) => {
                    self.links.remove(&conn);
                }
                Action::Delete {
                    run,
                    path,
                    directory,
                } => {
                    self.write_down(&mut facts).await?;
                    self.delete(run, path, directory);
                }
                Action::Verify {
                    run,
                    attempt,
                    directory,
                    manifest_hash,
                } => {
                    self.verifier
                        .read(run, attempt, directory, manifest_hash, &self.events);
                }
                Action::Exit => self.exit = true,
            }
        }
        self.write_down(&mut facts).await?;
        self.audit();
        self.receipts.hand_out(self.machine.state(), &self.accounts);
        self.changed.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Hands facts to the journal, and waits for the disk if one of them must not be lost.
    async fn write_down(&mut self, facts: &mut Vec<Fact>) -> Result<(), OwnerError> {
        if facts.is_empty() {
            return Ok(());
        }
        let urgent = facts.iter().any(Fact::urgent);
        self.journal.append(std::mem::take(facts))?;
        if urgent {
            self.journal.sync().await?;
        }
        Ok(())
    }

    /// Keeps what is not the machine's in step with a fact.
    fn note(&mut self, fact: &Fact, at: u64) {
        self.accounts.decided(fact, at);
        match fact {
            Fact::Recorded { run, record } => {
                if let Body::Void { after_step, .. } = record.body {
                    self.telemetry.void(*run, after_step);
                }
            }
            Fact::Formed { run, .. } => self.speeds.entry(*run).or_default().pause(),
            Fact::StopAsked { .. } => self.stopped_a_run = true,
            Fact::Ended { run, .. } => {
                let ended = self.machine.state().run(*run);
                if ended.is_some_and(Run::owes_mark) {
                    // The receipt says it, too.
                    self.unaudited.push(*run);
                } else {
                    self.receipts.owe(*run);
                }
            }
            Fact::ChaosMarked { run, .. } => self.receipts.owe(*run),
            _ => {}
        }
    }

    /// Sends without waiting: a worker whose queue is full is lost.
    fn send(&mut self, conn: Conn, run: String, generation: u64, body: Down) {
        let Some(link) = self.links.get_mut(&conn) else {
            return;
        };
        link.sequence += 1;
        let message = CoordinatorMessage {
            run,
            generation,
            sequence: link.sequence,
            body: Some(body),
        };
        if let Err(mpsc::error::TrySendError::Full(_)) = link.down.try_send(Ok(message)) {
            self.links.remove(&conn);
            self.aftermath.push_back(Event::Lost {
                conn,
                cause: "it does not read what it is sent".into(),
            });
        }
    }

    fn log(&mut self, run: RunNumber, entry: LogEntry) {
        let LogEntry {
            source,
            level,
            text,
            ..
        } = &entry;
        match level.as_str() {
            "ERROR" => tracing::error!(source, "{text}"),
            "WARN" => tracing::warn!(source, "{text}"),
            _ => tracing::info!(source, "{text}"),
        }
        self.telemetry.log(run, entry.clone());
        // Fails only when nobody follows.
        let _ = self.logs.send((run, entry));
    }

    /// Deletes a retired checkpoint in the background. What fails is tried again by the next coordinator.
    fn delete(&self, run: RunNumber, path: String, directory: PathBuf) {
        let events = self.events.clone();
        let directory = directory.display().to_string();
        let remove = move || Store::open(&directory).and_then(|store| store.remove_dir(""));
        tokio::task::spawn_blocking(move || match remove() {
            Err(error) => tracing::warn!("cannot delete an old checkpoint: {error}"),
            Ok(()) => {
                if let Some(events) = events.upgrade() {
                    let _ = events.blocking_send(Ask::Event(Event::Deleted { run, path }));
                }
            }
        });
    }

    /// Audits in the background what has ended and owes a mark.
    fn audit(&mut self) {
        for number in std::mem::take(&mut self.unaudited) {
            let run = self.machine.state().run(number);
            let Some(run) = run.filter(|run| run.owes_mark()) else {
                continue;
            };
            let (state, head, events) = (self.state.clone(), run.ledger.head, self.events.clone());
            let written = self.journal.written();
            tokio::spawn(async move {
                written.await;
                let audit = move || audits::audit(&state, number, head);
                let result = tokio::task::spawn_blocking(audit).await;
                let result = result.unwrap_or_else(|error| Err(error.to_string()));
                if let Some(events) = events.upgrade() {
                    let run = number;
                    let _ = events
                        .send(Ask::Event(Event::Audited { run, result }))
                        .await;
                }
            });
        }
    }

    /// The wall clock as it was at the start, and the time since: durations do not step with it.
    fn unix_ms(&self) -> u64 {
        let since = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.started_unix_ms.saturating_add(since)
    }

    pub fn find(&self, prefix: &str) -> Result<RunNumber, FindError> {
        self.machine.find(prefix)
    }

    /// Ids of all runs.
    pub fn run_ids(&self) -> BTreeSet<String> {
        let runs = self.machine.state().runs().iter();
        runs.map(|run| run.id.clone()).collect()
    }

    /// All run numbers, newest first.
    pub fn newest_first(&self) -> Vec<RunNumber> {
        (1..self.machine.state().next_number()).rev().collect()
    }

    /// Status of a run with its metrics.
    pub fn status(&self, run: RunNumber) -> v1::RunStatus {
        let mut status = self.machine.status(run).unwrap_or_default();
        if let Some(speed) = self.speeds.get(&run) {
            speed.show(&mut status, Instant::now());
        }
        self.accounts.show(run, &mut status, self.unix_ms());
        status
    }

    /// Nothing about the run changes any more, unless it is resumed.
    pub fn ended(&self, run: RunNumber) -> bool {
        let run = self.machine.state().run(run);
        run.is_none_or(|run| run.phase != RunPhase::Queued && !run.owes_mark())
    }

    pub fn checkpoints(&self, run: RunNumber) -> Vec<v1::Checkpoint> {
        self.machine.checkpoints(run)
    }

    /// Checkpoints that a user may have deleted now.
    pub fn prunable(&self, run: RunNumber, keep: Option<u32>) -> Vec<v1::Checkpoint> {
        self.machine.prunable(run, keep)
    }

    /// Puts held-out losses beside the metrics of the steps that they are behind.
    pub fn add_heldout_losses(&self, run: RunNumber, rows: &mut [v1::StepMetrics]) {
        if let Some(run) = self.machine.state().run(run) {
            run.add_heldout_losses(rows);
        }
    }

    pub fn workers(&self) -> Vec<v1::WorkerStatus> {
        self.machine.worker_list()
    }

    /// New log lines.
    pub fn new_logs(&self) -> broadcast::Receiver<(RunNumber, LogEntry)> {
        self.logs.subscribe()
    }

    /// Ready when all facts so far can be read from the journal's file, or never will.
    pub fn journal_written(&self) -> impl Future<Output = ()> + Send + use<> {
        self.journal.written()
    }

    /// Ready when all metrics and lines so far can be read from the telemetry's file, or never will.
    pub fn telemetry_written(&self) -> impl Future<Output = ()> + Send + use<> {
        self.telemetry.written()
    }

    pub fn telemetry(&self) -> rusqlite::Result<crate::telemetry::TelemetryReader> {
        self.telemetry.reader()
    }
}

/// Now. Decisions are made with the monotonic clock; the wall clock is only shown, so it may step as it likes.
fn moment(started: Instant) -> Moment {
    let unix_ms = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    Moment {
        now: started.elapsed(),
        unix_ms: u64::try_from(unix_ms).unwrap_or(u64::MAX),
        key: rand::random(),
    }
}
