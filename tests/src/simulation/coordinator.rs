//! The simulated coordinator's process: the real machine, its journal, and the order in which it writes and tells.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::RngExt;
use supra_coordinator::interval::Bounds;
use supra_coordinator::ledger::Body;
use supra_coordinator::machine::{self, Action, Conn, Fact, Found, Limits, Machine, Moment};
use supra_proto::v1::{
    CoordinatorMessage, WorkerMessage, coordinator_message::Body as Down,
    worker_message::Body as Up,
};

use super::World;
use super::ground;
use super::mutant::Mutant;
use super::network::Item;
use super::queue::{Event, MS, SECOND, Time};

/// Time between ticks.
pub(super) const TICK: Time = 250 * MS;

/// A wait that every message of the worker has told of.
const LONG: Time = 15 * SECOND;

/// Facts that a lying disk may lose.
const LOST: usize = 6;

/// Where in a journal write the coordinator dies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Death {
    Unwritten,
    Unsynced,
    Untold,
}

/// As they are, but for runs of a quarter of a minute.
fn limits() -> Limits {
    let interval = Bounds {
        least: Duration::from_secs(2),
        most: Duration::from_secs(5),
    };
    Limits {
        interval,
        ..Limits::default()
    }
}

#[derive(Default)]
pub(super) struct Coordinator {
    /// None while it is down.
    pub machine: Option<Machine>,
    /// Counts its lives.
    pub epoch: u32,
    pub started: Time,
    pub paused_until: Time,
    /// It dies in its next journal write.
    pub armed: Option<Death>,
    /// Milliseconds by which the wall clock is wrong.
    pub wall_error: i64,
    conns: BTreeMap<Conn, usize>,
    next_conn: Conn,
}

impl World {
    pub(super) fn moment(&mut self) -> Moment {
        let wall = 1_700_000_000_000 + (self.now / MS) as i64 + self.coordinator.wall_error;
        Moment {
            now: Duration::from_micros(self.now.saturating_sub(self.coordinator.started)),
            unix_ms: wall.max(0) as u64,
            key: self.random.random(),
        }
    }

    pub(super) fn coordinator_starts(&mut self) {
        if self.coordinator.machine.is_some() {
            return;
        }
        self.coordinator.epoch += 1;
        self.coordinator.started = self.now;
        self.coordinator.conns.clear();
        self.watch.forget_reports();
        self.say(|| "the coordinator starts".into());
        let moment = self.moment();
        let state = self.journal.replayed();
        let (machine, actions) = Machine::new(state, limits(), ground::identity(), &moment);
        self.coordinator.machine = Some(machine);
        self.carry_out(actions);
    }

    /// The coordinator's process is gone, and what its disk had not taken.
    pub(super) fn coordinator_dies(&mut self) {
        if self.coordinator.machine.take().is_none() {
            return;
        }
        self.coordinator.armed = None;
        let lying = if self.mutant == Some(Mutant::LoseSynced) {
            LOST
        } else {
            0
        };
        self.journal.crash(&mut self.random, lying);
        self.watch.rewind(self.journal.facts());
        self.coordinator_gone();
    }

    fn coordinator_gone(&mut self) {
        self.say(|| "the coordinator is gone".into());
        let reset = self.random.random_bool(0.7);
        for stream in 0..self.streams.len() {
            if self.streams[stream].coordinator_epoch == self.coordinator.epoch {
                self.cut(stream, reset);
            }
        }
        // Mostly the workers wait for it while they train, at times for too long.
        let longest = [6 * SECOND, 6 * SECOND, 30 * SECOND][self.random.random_range(0..3)];
        let back = self.random.random_range(300 * MS..longest);
        self.queue.push(self.now + back, Event::CoordinatorStarts);
    }

    /// Hands an event to the machine; false when a client's wish was refused.
    pub(super) fn happen(&mut self, event: machine::Event) -> bool {
        let moment = self.moment();
        let Some(machine) = &mut self.coordinator.machine else {
            return false;
        };
        match machine.handle(event, &moment) {
            Ok(actions) => {
                self.carry_out(actions);
                self.look_at_state();
                true
            }
            Err(_) => false,
        }
    }

    /// The coordinator knows what its journal says and nothing else. Bugs at the boundary of the two would all show here first.
    fn look_at_state(&mut self) {
        let live = self.coordinator.machine.as_ref().map(Machine::state);
        if self.mutant.is_none() && live.is_some_and(|state| state != self.journal.state()) {
            self.watch
                .broken("the journal does not give the coordinator's state");
        }
    }

    /// In the order of the real owner: facts are written before what follows them is told.
    fn carry_out(&mut self, actions: Vec<Action>) {
        let early = self.mutant == Some(Mutant::TellEarly);
        let mut facts = Vec::new();
        for action in actions {
            match action {
                Action::Journal(fact) => facts.push(fact),
                Action::Send {
                    conn,
                    run,
                    generation,
                    body,
                } => {
                    if !early && !self.write_down(&mut facts) {
                        return;
                    }
                    self.tell(conn, run, generation, body);
                }
                Action::Sync => {
                    if !self.write_down(&mut facts) {
                        return;
                    }
                    self.journal.sync();
                }
                Action::Close(conn) => {
                    if let Some(stream) = self.coordinator.conns.remove(&conn) {
                        self.send(stream, Item::EndOfDown);
                    }
                }
                Action::Delete { run, path, .. } => {
                    if !self.write_down(&mut facts) {
                        return;
                    }
                    let after = self.random.random_range(MS..SECOND);
                    let epoch = self.coordinator.epoch;
                    self.queue
                        .push(self.now + after, Event::Deleted { epoch, run, path });
                }
                Action::Verify {
                    run,
                    attempt,
                    directory,
                    manifest_hash,
                } => {
                    let path = directory.file_name().unwrap_or_default();
                    let path = path.to_string_lossy().into_owned();
                    let after = self.random.random_range(MS..2 * SECOND);
                    let epoch = self.coordinator.epoch;
                    self.queue.push(
                        self.now + after,
                        Event::Verified {
                            epoch,
                            run,
                            attempt,
                            path,
                            manifest_hash,
                        },
                    );
                }
                Action::Exit => {
                    if self.write_down(&mut facts) {
                        self.journal.sync();
                        self.coordinator.machine = None;
                        self.coordinator_gone();
                    }
                    return;
                }
                Action::Log { entry, .. } => self.say(|| format!("coordinator: {}", entry.text)),
                Action::Measured { .. } | Action::StoodStill { .. } => {}
            }
        }
        self.write_down(&mut facts);
    }

    /// False when the coordinator died of it.
    fn write_down(&mut self, facts: &mut Vec<Fact>) -> bool {
        if facts.is_empty() {
            return true;
        }
        let death = self.coordinator.armed.take();
        if matches!(death, Some(Death::Unwritten)) {
            self.coordinator_dies();
            return false;
        }
        let urgent = facts.iter().any(Fact::urgent);
        for fact in std::mem::take(facts) {
            let copies = match (self.mutant, &fact) {
                (Some(Mutant::SkipVoid), Fact::Recorded { record, .. })
                    if matches!(record.body, Body::Void { .. }) =>
                {
                    0
                }
                (Some(Mutant::CommitTwice), Fact::Recorded { record, .. })
                    if matches!(record.body, Body::Step(_)) =>
                {
                    2
                }
                _ => 1,
            };
            for _ in 0..copies {
                self.say(|| format!("journal: {fact:?}"));
                self.watch.journalled(self.now, &fact, &self.checkpoints);
                self.look_at_blame(&fact);
                self.journal.append([fact.clone()]);
            }
        }
        if matches!(death, Some(Death::Unsynced)) {
            self.coordinator_dies();
            return false;
        }
        if urgent {
            self.journal.sync();
        }
        if death.is_some() {
            self.coordinator_dies();
            return false;
        }
        true
    }

    /// A generation that is stuck is so because of those of its ranks that stand still, and of none that waits for them.
    fn look_at_blame(&mut self, fact: &Fact) {
        let Fact::Broke {
            run,
            generation,
            cause,
            ..
        } = fact
        else {
            return;
        };
        let Some((subject, _)) = cause
            .split_once(" stuck: ")
            .or(cause.split_once(" wait for each other: "))
        else {
            return;
        };
        let id = self.watch.id(*run);
        for worker in &self.workers {
            let Some(job) = &worker.job else { continue };
            if (&job.place.run, job.place.generation) != (&id, *generation) {
                continue;
            }
            let blamed = subject.contains(&format!("({})", worker.name));
            if job.stands_still() && !blamed {
                let what = format!("{} stands still, but {cause}", worker.name);
                self.watch.broken(what);
            }
            let waits = job.waits_since.is_some_and(|since| since + LONG < self.now);
            if waits && blamed {
                let what = format!("{} only waits for others, but {cause}", worker.name);
                self.watch.broken(what);
            }
        }
    }

    fn tell(&mut self, conn: Conn, run: String, generation: u64, body: Down) {
        self.watch
            .told(self.journal.safe(), &run, generation, &body);
        let Some(&stream) = self.coordinator.conns.get(&conn) else {
            return;
        };
        self.streams[stream].sequence_down += 1;
        let message = CoordinatorMessage {
            run,
            generation,
            sequence: self.streams[stream].sequence_down,
            body: Some(body),
        };
        self.send(stream, Item::Down(Box::new(message)));
    }

    pub(super) fn coordinator_hears(&mut self, stream: usize, mut message: WorkerMessage) {
        if self.coordinator.machine.is_none()
            || self.streams[stream].coordinator_epoch != self.coordinator.epoch
        {
            return;
        }
        if let Some(Up::Hello(hello)) = message.body {
            let worker = self.streams[stream].worker;
            let again = std::mem::replace(&mut self.workers[worker].known, true);
            let repeat = self.streams[stream].conn.is_some();
            if repeat || (again && self.mutant == Some(Mutant::LoseReconnect)) {
                return;
            }
            self.coordinator.next_conn += 1;
            let conn = self.coordinator.next_conn;
            self.coordinator.conns.insert(conn, stream);
            self.streams[stream].conn = Some(conn);
            let peer = format!("{}:9", hello.name);
            self.happen(machine::Event::Hello { conn, peer, hello });
            return;
        }
        let Some(conn) = self.streams[stream].conn else {
            return;
        };
        if let Some(Up::Step(report)) = &mut message.body {
            if self.mutant == Some(Mutant::HideDrift) {
                report.loss_sum = ground::loss_sum(report.samples);
            }
            let (run, generation) = (&message.run, message.generation);
            self.watch.reported(run, generation, report.step, stream);
            if self.mutant == Some(Mutant::TakeOldReports)
                && let Some((live, generation)) = self.watch.live()
                && live == *run
            {
                message.generation = generation;
            }
        }
        self.happen(machine::Event::Message { conn, message });
    }

    pub(super) fn coordinator_loses(&mut self, stream: usize, cause: &str) {
        let line = &self.streams[stream];
        if line.coordinator_epoch != self.coordinator.epoch {
            return;
        }
        let Some(conn) = line.conn else { return };
        self.coordinator.conns.remove(&conn);
        let cause = cause.to_owned();
        self.happen(machine::Event::Lost { conn, cause });
    }

    /// A checkpoint was read again.
    pub(super) fn verified(
        &mut self,
        epoch: u32,
        run: u32,
        attempt: u64,
        path: &str,
        manifest_hash: [u8; 32],
    ) {
        if epoch != self.coordinator.epoch {
            return;
        }
        let id = self.watch.id(run);
        let found = match self.checkpoints.read(&id, path, manifest_hash) {
            Some(_) => Found::Whole,
            None => Found::Damaged(format!("{path} is not what was written")),
        };
        self.happen(machine::Event::Verified {
            run,
            attempt,
            found,
        });
    }

    pub(super) fn deleted(&mut self, epoch: u32, run: u32, path: String) {
        if epoch != self.coordinator.epoch {
            return;
        }
        let id = self.watch.id(run);
        self.checkpoints.delete(&id, &path);
        self.happen(machine::Event::Deleted { run, path });
    }
}
