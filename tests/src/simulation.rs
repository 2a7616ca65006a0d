//! The whole system without processes: the real machine of the coordinator and the real sessions of workers, in simulated
//! time, over a simulated network and simulated disks, with everything going wrong that a seed says.
//!
//! Everything follows from the seed, so a failure can be looked at again with `scripts/prove simulation --seed N`.

use std::time::Instant;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use supra_coordinator::audit::{Options, Outcome as Judgement, Remembered, audit};
use supra_coordinator::machine::{self, Outcome};
use supra_proto::v1::{coordinator_message::Body as Down, worker_message::Body as Up};

mod compute;
mod coordinator;
mod disk;
mod fault;
mod ground;
mod held;
mod mutant;
mod network;
mod queue;
mod watch;
mod worker;

pub use fault::{Coverage, Kind, Phase};
pub use mutant::Mutant;

use coordinator::Coordinator;
use disk::{Checkpoints, Journal};
use fault::Faults;
use ground::ground;
use queue::{Event, MS, Queue, SECOND, Time};
use watch::Watch;
use worker::Worker;

/// Sessions of the smallest simulation.
const WORKERS: usize = 8;

/// Sessions of the largest.
const MOST_WORKERS: usize = 12;

/// Runs that a client submits while things go wrong.
const RUNS: usize = 4;

/// Time between two looks of the client.
const LOOK: Time = 2 * SECOND;

/// From the calm, or the end of a generation, to when every worker knows of it.
const KNOWN: Time = 60 * SECOND;

/// From the calm to the end of all runs.
const ENDED: Time = 400 * SECOND;

/// What a simulation showed.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Events beside the ticks of clocks.
    pub events: u64,
    /// The first broken promise.
    pub violation: Option<String>,
    /// What was hit when.
    pub coverage: Coverage,
    /// What happened, line by line, if that was asked for.
    pub trace: Vec<String>,
}

/// Simulates what a seed says, with a bug if one is given.
pub fn simulate(seed: u64, mutant: Option<Mutant>, trace: bool) -> Verdict {
    let mut world = World::new(seed, mutant, trace);
    world.run();
    Verdict {
        events: world.events,
        violation: world.watch.violation,
        coverage: world.faults.coverage,
        trace: world.trace.unwrap_or_default(),
    }
}

struct World {
    now: Time,
    /// The instant that sessions take for the beginning.
    birth: Instant,
    queue: Queue,
    random: ChaCha8Rng,
    mutant: Option<Mutant>,
    coordinator: Coordinator,
    journal: Journal,
    checkpoints: Checkpoints,
    streams: Vec<network::Stream>,
    workers: Vec<Worker>,
    rings: std::collections::BTreeMap<(String, u64), compute::Ring>,
    /// The next step that was never trained is not finite.
    nonfinite: bool,
    /// In the next step a device gives nothing finite where others do.
    hardware: bool,
    /// The next step comes to something else than it should, on all ranks.
    drift: bool,
    /// Steps that were trained, by run: whether they are not finite, whoever trains them.
    skips: std::collections::BTreeMap<(String, u64), bool>,
    /// Workers that runs need and may have.
    room: (u32, u32),
    /// They divide the state.
    divided: bool,
    faults: Faults,
    calm: bool,
    calm_at: Time,
    watch: Watch,
    events: u64,
    trace: Option<Vec<String>>,
}

impl World {
    fn new(seed: u64, mutant: Option<Mutant>, trace: bool) -> World {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let count = random.random_range(8..20);
        let calm_at = random.random_range(40 * SECOND..80 * SECOND);
        let rooms = [(1, 8), (2, 8), (4, 6), (8, 8), (3, 3)];
        let room = rooms[random.random_range(0..rooms.len())];
        let divided = random.random_bool(0.5);
        let mut world = World {
            now: 0,
            birth: Instant::now(),
            queue: Queue::default(),
            faults: Faults::plan(&mut random, count),
            random,
            mutant,
            coordinator: Coordinator::default(),
            journal: Journal::default(),
            checkpoints: Checkpoints::default(),
            streams: Vec::new(),
            workers: Vec::new(),
            rings: std::collections::BTreeMap::new(),
            nonfinite: false,
            hardware: false,
            drift: false,
            skips: std::collections::BTreeMap::new(),
            room,
            divided,
            calm: false,
            calm_at,
            watch: Watch::default(),
            events: 0,
            trace: trace.then(Vec::new),
        };
        for number in 0..count {
            let at = world.random.random_range(SECOND..calm_at - 5 * SECOND);
            world.queue.push(at, Event::Fault(number));
        }
        (0..WORKERS).for_each(|_| world.worker_joins());
        world.queue.push(0, Event::CoordinatorStarts);
        world.queue.push(0, Event::CoordinatorTick);
        world.queue.push(MS, Event::Client);
        world.queue.push(calm_at, Event::Calm);
        world
    }

    fn worker_joins(&mut self) {
        let number = self.workers.len();
        if number == MOST_WORKERS {
            return;
        }
        let rate = self.random.random_range(0.97..1.03);
        self.workers.push(Worker::new(number, rate));
        let at = self.now + self.random.random_range(MS..2 * SECOND);
        self.queue.push(at, Event::WorkerStarts { worker: number });
        self.queue.push(at, Event::WorkerTick(number));
    }

    fn run(&mut self) {
        while let Some((at, event)) = self.queue.pop() {
            self.now = at;
            if let Some(until) = self.paused(&event) {
                self.queue.push(until, event);
                continue;
            }
            let tick = matches!(event, Event::WorkerTick(_) | Event::CoordinatorTick);
            self.events += u64::from(!tick);
            self.dispatch(event);
            self.strike();
            if self.watch.violation.is_some() || (self.calm && self.over()) {
                break;
            }
        }
        if self.watch.violation.is_none() {
            self.judge();
        }
    }

    /// Until when whoever is to handle an event stands still.
    fn paused(&self, event: &Event) -> Option<Time> {
        let worker = match event {
            Event::WorkerTick(worker)
            | Event::Work { worker, .. }
            | Event::Errand { worker, .. }
            | Event::Interrupt { worker, .. }
            | Event::Attach { worker, .. } => Some(*worker),
            Event::Deliver { stream, item } => match item {
                network::Item::Down(_) | network::Item::EndOfDown => {
                    Some(self.streams[*stream].worker)
                }
                network::Item::Up(_) | network::Item::EndOfUp => None,
            },
            Event::Noticed { stream, by_worker } => by_worker.then(|| self.streams[*stream].worker),
            Event::Unanswered { stream } => Some(self.streams[*stream].worker),
            Event::CoordinatorTick
            | Event::Deleted { .. }
            | Event::Verified { .. }
            | Event::Client => None,
            _ => return None,
        };
        let until = worker.map_or(self.coordinator.paused_until, |worker| {
            self.workers[worker].paused_until
        });
        (until > self.now).then_some(until)
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::WorkerTick(worker) => self.worker_ticks(worker),
            Event::CoordinatorTick => {
                self.queue
                    .push(self.now + coordinator::TICK, Event::CoordinatorTick);
                self.happen(machine::Event::Tick);
                self.look_around();
            }
            Event::Deliver { stream, item } => self.deliver(stream, item),
            Event::Noticed { stream, by_worker } => self.noticed(stream, by_worker),
            Event::Unstall { stream, up } => self.unstall(stream, up),
            Event::KeepAlive { stream } => self.keep_alive(stream),
            Event::WorkerStarts { worker } => self.worker_starts(worker),
            Event::Attach { worker, epoch } => self.attach(worker, epoch),
            Event::Unanswered { stream } => self.unanswered(stream),
            Event::Work {
                worker,
                epoch,
                job,
                work,
            } => self.works(worker, epoch, job, work),
            Event::Errand {
                worker,
                epoch,
                input,
            } => {
                if self.workers[worker].epoch == epoch {
                    self.input(worker, *input);
                }
            }
            Event::Interrupt { worker, epoch } => self.interrupt(worker, epoch),
            Event::CoordinatorStarts => self.coordinator_starts(),
            Event::Deleted { epoch, run, path } => self.deleted(epoch, run, path),
            Event::Verified {
                epoch,
                run,
                attempt,
                path,
                manifest_hash,
            } => self.verified(epoch, run, attempt, &path, manifest_hash),
            Event::Client => self.client(),
            Event::Fault(number) => self.faults.due(number),
            Event::Calm => self.calm_down(),
        }
    }

    /// The client wants all its runs finished, and submits more while things go wrong. Who is put aside he starts anew.
    fn client(&mut self) {
        self.queue.push(self.now + LOOK, Event::Client);
        let coordinator = self.coordinator.machine.as_ref();
        let known = coordinator
            .map(machine::Machine::worker_list)
            .unwrap_or_default();
        for status in known.iter().filter(|status| !status.aside.is_empty()) {
            let named = |worker: &Worker| worker.name == status.name;
            if let Some(number) = self.workers.iter().position(named) {
                self.worker_dies(number, true, true);
            }
        }
        let count = self.watch.accounts.len();
        let busy = self.watch.unfinished().next().is_some();
        if count == 0 || (!busy && !self.calm && count < RUNS) {
            let submission =
                ground::submission(count + 1, self.room, self.divided, &mut self.random);
            self.happen(machine::Event::Submit(submission));
        }
        let stopped: Vec<_> = (1..)
            .zip(&self.watch.accounts)
            .filter(|(_, account)| {
                account
                    .outcome
                    .is_some_and(|outcome| outcome != Outcome::Finished)
            })
            .map(|(run, _)| run)
            .collect();
        for run in stopped {
            self.happen(machine::Event::Resume { run, strict: false });
        }
    }

    fn over(&self) -> bool {
        self.watch.unfinished().next().is_none() && !self.watch.accounts.is_empty()
    }

    /// What has to be so some time after the last fault.
    fn look_around(&mut self) {
        if !self.calm {
            return;
        }
        if self.now > self.calm_at + ENDED {
            return self
                .watch
                .broken("the runs do not end, though nothing goes wrong any more");
        }
        if self.now < self.calm_at + KNOWN {
            return;
        }
        for number in 0..self.workers.len() {
            let worker = &self.workers[number];
            if !worker.attached {
                let what = format!("worker {number} does not get back to the coordinator");
                return self.watch.broken(what);
            }
            let Some(job) = &worker.job else { continue };
            let (run, generation) = (&job.place.run, job.place.generation);
            let over = self.watch.over_since(run, generation);
            if over.is_some_and(|since| self.now > since + KNOWN) {
                let what =
                    format!("worker {number} still trains generation {generation}, which is void");
                return self.watch.broken(what);
            }
        }
    }

    /// All runs have ended: the accounts have to be right, and the weights what they say.
    fn judge(&mut self) {
        if let Some(machine) = &self.coordinator.machine
            && *machine.state() != self.journal.replayed()
        {
            self.watch
                .broken("the journal does not give the coordinator's state");
        }
        let mut wrong = Vec::new();
        for account in &self.watch.accounts {
            let id = &account.id;
            let remembered = self.checkpoints.published(id);
            let checkpoints = remembered.map(|(path, saved)| Remembered {
                manifest: path.to_owned(),
                head: saved.head,
            });
            let options = Options {
                checkpoints: checkpoints.collect(),
                ..Options::default()
            };
            let verdict = audit(account.records.iter().cloned(), options);
            if verdict.verdict != Judgement::Ok || !verdict.finished {
                wrong.push(format!("{id}: the audit says {:?}", verdict.breaks));
            }
            if verdict.tokens != verdict.budget_tokens {
                wrong.push(format!("{id}: ended after {} tokens", verdict.tokens));
            }
            let model = account.model();
            let last = self
                .checkpoints
                .published(id)
                .any(|(_, saved)| saved.model == model);
            if !last || model.step != ground().plan.steps {
                wrong.push(format!(
                    "{id}: no checkpoint holds what the ledger says was trained"
                ));
            }
        }
        wrong.into_iter().for_each(|what| self.watch.broken(what));
    }

    /// Adds a line to the trace.
    fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let seconds = self.now as f64 / SECOND as f64;
            trace.push(format!("{seconds:10.4} {}", line()));
        }
    }
}

fn kind_of_down(body: &Down) -> &'static str {
    match body {
        Down::Welcome(_) => "welcome",
        Down::Refusal(_) => "refusal",
        Down::Assignment(_) => "assignment",
        Down::Void(_) => "void",
        Down::Stop(_) => "stop",
        Down::Publish(_) => "publish",
        Down::Goodbye(_) => "goodbye",
        Down::LedgerHead(_) => "ledger head",
        Down::Regroup(_) => "regroup",
        Down::Checkpoint(_) => "checkpoint",
        Down::OrderedFault(_) => "ordered fault",
    }
}

fn kind_of_up(body: &Up) -> String {
    match body {
        Up::Hello(hello) => format!("hello as {}", hello.instance),
        Up::Formed(formed) => format!("formed at step {}", formed.step),
        Up::Step(step) => format!("step {}", step.step),
        Up::CheckpointWritten(written) => format!("written {}", written.path),
        Up::CheckpointPublished(published) => format!("published step {}", published.step),
        Up::Fault(fault) => format!("fault: {}", fault.message),
        Up::Left(left) => format!("left: {:?}", left.reason()),
        Up::Heartbeat(_) => "heartbeat".into(),
        Up::Log(line) => format!("log: {}", line.text),
        Up::CheckpointBegun(begun) => format!("begun step {}", begun.step),
        Up::Evaluated(evaluated) => format!("evaluated step {}", evaluated.step),
        Up::Gates(gates) => format!("gates of step {}", gates.step),
        Up::SnapshotTaken(taken) => format!("has a snapshot of step {}", taken.step),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_start_from_whole_states_and_from_parts() {
        let lines: Vec<String> = (0..40)
            .flat_map(|seed| simulate(seed, None, true).trace)
            .collect();
        for start in [", which w", ", whose parts w"] {
            let starts = |line: &&String| line.contains("forms from step") && line.contains(start);
            let count = lines.iter().filter(starts).count();
            assert!(count >= 10, "{start}: {count}");
        }
    }

    #[test]
    fn a_seed_always_says_the_same() {
        let (first, second) = (simulate(3, None, true), simulate(3, None, true));
        assert_eq!(first.trace, second.trace);
        assert!(first.events >= 500, "{}", first.events);
    }
}
