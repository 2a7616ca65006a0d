//! What goes wrong: kinds of faults, the phases that they are to hit, and the count of what was really hit.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use supra_agent::session::Input;
use supra_coordinator::machine;
use supra_proto::v1::FaultKind;

use super::World;
use super::compute::Work;
use super::coordinator::Death;
use super::queue::{Event, MS, SECOND, Time};

/// What a worker is doing when it is hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Without a place, while others have one or nothing is to be trained.
    Idle,
    /// Connecting to its peers.
    Forming,
    /// Reading the state to start from.
    Loading,
    /// In a step.
    Training,
    /// Writing a checkpoint, or waiting for it.
    Checkpointing,
    /// Aborting a void generation.
    Leaving,
    /// Without a place, while a run waits for its next generation.
    Mustering,
}

impl Phase {
    /// All of them.
    pub const ALL: [Phase; 7] = [
        Phase::Idle,
        Phase::Forming,
        Phase::Loading,
        Phase::Training,
        Phase::Checkpointing,
        Phase::Leaving,
        Phase::Mustering,
    ];
}

/// What can go wrong, or happen at an inconvenient moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The computing process dies; its supervisor starts another.
    Crash,
    /// The whole machine dies without a word; another one takes its name.
    Replace,
    /// The process stands still for a while.
    Pause,
    /// The stream breaks; what is under way is lost.
    Break,
    /// Nothing gets through, neither to the coordinator nor to peers.
    Partition,
    /// Nothing gets up.
    DeafCoordinator,
    /// Nothing gets down.
    DeafWorker,
    /// Every message takes longer.
    Lag,
    /// Messages arrive again, some seconds later.
    Double,
    /// The environment fails the training loop.
    Transient,
    /// The input fails the training loop: the run fails.
    Fatal,
    /// Loss or gradient is not finite.
    Nonfinite,
    /// Loss or gradient is not finite on one rank, and finite where another feeds the same samples.
    Hardware,
    /// A step comes to something else than it would if it were trained again.
    Drift,
    /// The training loop does not come back from a void in time.
    SlowAbort,
    /// The training loop stands still in mid step, and its process lives on.
    Hang,
    /// A worker joins.
    Join,
    /// A worker is asked to end.
    Leave,
    /// The coordinator dies in its next journal write.
    CoordinatorCrash,
    /// The coordinator stands still for a while.
    CoordinatorPause,
    /// The wall clock is set to another time.
    WallJump,
    /// A file of the newest published checkpoint is not what was written any more.
    Damage,
    /// A client stops the run.
    Cancel,
    /// A client drains the worker, and starts it anew later.
    Drain,
    /// A client ends the coordinator.
    Shutdown,
    /// The power fails everywhere.
    Everything,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 26] = [
        Kind::Crash,
        Kind::Replace,
        Kind::Pause,
        Kind::Break,
        Kind::Partition,
        Kind::DeafCoordinator,
        Kind::DeafWorker,
        Kind::Lag,
        Kind::Double,
        Kind::Transient,
        Kind::Fatal,
        Kind::Nonfinite,
        Kind::Hardware,
        Kind::Drift,
        Kind::SlowAbort,
        Kind::Hang,
        Kind::Join,
        Kind::Leave,
        Kind::CoordinatorCrash,
        Kind::CoordinatorPause,
        Kind::WallJump,
        Kind::Damage,
        Kind::Cancel,
        Kind::Drain,
        Kind::Shutdown,
        Kind::Everything,
    ];

    /// Whether it can hit a worker in this phase.
    pub fn reaches(self, phase: Phase) -> bool {
        use Phase::{Checkpointing, Forming, Loading, Training};
        match self {
            Kind::Transient | Kind::Fatal | Kind::SlowAbort => {
                matches!(phase, Forming | Loading | Training | Checkpointing)
            }
            Kind::Nonfinite | Kind::Hardware | Kind::Drift | Kind::Hang => phase == Training,
            _ => true,
        }
    }
}

/// How often each kind hit each phase.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage([[u64; Phase::ALL.len()]; Kind::ALL.len()]);

impl Coverage {
    fn count(&mut self, kind: Kind, phase: Phase) {
        self.0[kind as usize][phase as usize] += 1;
    }

    /// Adds what another simulation hit.
    pub fn add(&mut self, other: &Coverage) {
        let rows = self.0.iter_mut().zip(&other.0);
        rows.for_each(|(ours, theirs)| {
            ours.iter_mut()
                .zip(theirs)
                .for_each(|(our, their)| *our += their)
        });
    }

    /// How often a kind hit a phase.
    pub fn of(&self, kind: Kind, phase: Phase) -> u64 {
        self.0[kind as usize][phase as usize]
    }

    /// The reachable pair that was hit least often, and how often.
    pub fn rarest(&self) -> Option<(Kind, Phase, u64)> {
        pairs()
            .map(|(kind, phase)| (kind, phase, self.of(kind, phase)))
            .min_by_key(|(_, _, count)| *count)
    }
}

/// The reachable pairs.
fn pairs() -> impl Iterator<Item = (Kind, Phase)> {
    Kind::ALL
        .into_iter()
        .flat_map(|kind| Phase::ALL.map(|phase| (kind, phase)))
        .filter(|(kind, phase)| kind.reaches(*phase))
}

/// The faults of one simulation.
#[derive(Default)]
pub(super) struct Faults {
    plan: Vec<(Kind, Phase)>,
    /// Due, as soon as a worker is in the phase.
    waiting: Vec<(Kind, Phase)>,
    pub coverage: Coverage,
}

impl Faults {
    pub fn plan(random: &mut ChaCha8Rng, count: usize) -> Faults {
        let pairs: Vec<_> = pairs().collect();
        let plan = (0..count).map(|_| pairs[random.random_range(0..pairs.len())]);
        Faults {
            plan: plan.collect(),
            ..Faults::default()
        }
    }

    pub fn due(&mut self, number: usize) {
        self.waiting.push(self.plan[number]);
    }

    pub fn forget(&mut self) {
        self.waiting.clear();
    }
}

impl World {
    /// Lets faults happen whose phase has come.
    pub(super) fn strike(&mut self) {
        if self.faults.waiting.is_empty() {
            return;
        }
        let mustering = self.watch.mustering();
        let first = self.random.random_range(0..self.workers.len());
        let order = (0..self.workers.len()).map(|place| (first + place) % self.workers.len());
        for number in order {
            let worker = &self.workers[number];
            if worker.session.is_none() || worker.paused_until > self.now {
                continue;
            }
            let phase = worker.phase(mustering);
            let found = self
                .faults
                .waiting
                .iter()
                .position(|(kind, at)| *at == phase && self.possible(*kind, number));
            if let Some(place) = found {
                let (kind, _) = self.faults.waiting.swap_remove(place);
                self.faults.coverage.count(kind, phase);
                self.say(|| format!("fault: {kind:?} at worker {number} while {phase:?}"));
                return self.inject(kind, number);
            }
        }
    }

    /// The coordinator has to be there to be hit. A worker may hang once its generation knows how long a step takes: the
    /// limit of the first one is longer than the simulation.
    fn possible(&self, kind: Kind, number: usize) -> bool {
        if kind == Kind::Hang {
            let job = self.workers[number].job.as_ref();
            return job.is_some_and(|job| job.stepped);
        }
        let coordinators = matches!(
            kind,
            Kind::CoordinatorCrash
                | Kind::CoordinatorPause
                | Kind::Cancel
                | Kind::Drain
                | Kind::Shutdown
        );
        let there = self.coordinator.machine.is_some() && self.coordinator.paused_until <= self.now;
        !coordinators || there
    }

    fn inject(&mut self, kind: Kind, number: usize) {
        let short = self.random.random_range(50 * MS..3 * SECOND);
        let long = self.random.random_range(SECOND..20 * SECOND);
        match kind {
            Kind::Crash => {
                let reset = self.random.random_bool(0.8);
                self.worker_dies(number, reset, false);
            }
            Kind::Replace => self.worker_dies(number, false, true),
            Kind::Pause => self.workers[number].paused_until = self.now + long,
            Kind::Break => self.break_streams(number),
            Kind::Partition => {
                self.partition(number, true, long);
                self.partition(number, false, long);
                self.workers[number].ring_stalled_until = self.now + long;
            }
            Kind::DeafCoordinator => self.partition(number, true, long),
            Kind::DeafWorker => self.partition(number, false, long),
            Kind::Lag => self.slow_down(number, short),
            Kind::Double => {
                let messages = self.random.random_range(1..40);
                self.double(number, messages);
            }
            Kind::Transient => self.work(number, MS, Work::Breaks(FaultKind::Transient)),
            Kind::Fatal => self.work(number, MS, Work::Breaks(FaultKind::Input)),
            Kind::Nonfinite => self.nonfinite = true,
            Kind::Hardware => self.hardware = true,
            Kind::Drift => self.drift = true,
            Kind::SlowAbort => {
                self.workers[number].slow_abort = true;
                self.break_streams(number);
            }
            Kind::Hang => {
                if let Some(job) = &mut self.workers[number].job {
                    job.hangs = true;
                }
            }
            Kind::Join => self.worker_joins(),
            Kind::Leave => {
                let epoch = self.workers[number].epoch;
                let worker = number;
                self.queue
                    .push(self.now, Event::Interrupt { worker, epoch });
            }
            Kind::CoordinatorCrash => {
                let deaths = [Death::Unwritten, Death::Unsynced, Death::Untold];
                self.coordinator.armed = Some(deaths[self.random.random_range(0..3)]);
            }
            Kind::CoordinatorPause => self.coordinator.paused_until = self.now + long,
            Kind::WallJump => {
                self.coordinator.wall_error = self.random.random_range(-90_000_000..90_000_000);
            }
            Kind::Damage => {
                if let Some(run) = self.watch.unfinished().next() {
                    let id = self.watch.id(run);
                    self.checkpoints.damage(&id);
                }
            }
            Kind::Cancel => {
                let run = self.watch.unfinished().next();
                if let Some(run) = run {
                    self.happen(machine::Event::Cancel(run));
                }
            }
            Kind::Drain => {
                let name = self.workers[number].name.clone();
                self.happen(machine::Event::Drain(name));
            }
            Kind::Shutdown => {
                self.happen(machine::Event::Shutdown("a client asked".into()));
            }
            Kind::Everything => {
                self.coordinator_dies();
                for worker in 0..self.workers.len() {
                    self.worker_dies(worker, false, false);
                }
            }
        }
    }

    pub(super) fn break_streams(&mut self, number: usize) {
        for stream in self.streams_of(number) {
            self.cut(stream, true);
        }
    }

    fn partition(&mut self, number: usize, up: bool, long: Time) {
        self.workers[number].partition[usize::from(up)] = self.now + long;
        for stream in self.streams_of(number) {
            self.stall(stream, up, self.now + long);
        }
    }

    pub(super) fn interrupt(&mut self, number: usize, epoch: u32) {
        if self.workers[number].epoch == epoch {
            self.input(number, Input::Interrupted("stopped by SIGTERM".into()));
        }
    }

    /// From here on nothing goes wrong any more: what is broken heals.
    pub(super) fn calm_down(&mut self) {
        self.say(|| "calm".into());
        self.calm = true;
        self.faults.forget();
        self.nonfinite = false;
        self.hardware = false;
        self.drift = false;
        self.coordinator.armed = None;
        for number in 0..self.workers.len() {
            // Who is paused goes on when it would have: what it is to hear, in order, comes to it then.
            let worker = &mut self.workers[number];
            worker.partition = [0; 2];
            worker.ring_stalled_until = 0;
            worker.slow_abort = false;
            self.double(number, 0);
            self.slow_down(number, 0);
            for stream in self.streams_of(number) {
                self.unstall(stream, true);
                self.unstall(stream, false);
            }
        }
    }
}
