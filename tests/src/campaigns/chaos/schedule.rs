//! What happens when: a pure function of a seed.

use std::fmt;
use std::time::Duration;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Longest time from the submission to the first fault, and from one fault to the next, seconds. About as long as it takes
/// to form a generation and to train.
const PAUSE: f64 = 0.8;

/// How often a fault comes together with the one before it.
const TOGETHER: f64 = 0.25;

/// Shortest and longest time for which a fault lasts, seconds. The coordinator gives up a silent worker after 10, and a
/// step after 30.
const LASTS: (f64, f64) = (0.3, 40.0);

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Break {
    /// It is closed, and new ones as well.
    Cut,
    /// It is reset, and new ones as well.
    Reset,
    /// Nothing passes, until it arrives late.
    Silent,
    /// One direction is swallowed.
    HalfOpen,
    /// Everything takes longer.
    Slow,
}

/// The kinds of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// The computing process of a worker dies; its supervisor starts another.
    ComputeKilled,
    /// The supervisor dies; the computing process notices and ends, we start the worker again.
    SupervisorKilled,
    CoordinatorKilled,
    /// Everything dies at once, as in a power cut.
    EverythingKilled,
    /// The computing process of a worker stands still for a while.
    ComputeStopped,
    CoordinatorStopped,
    /// The connection of a worker to the coordinator breaks.
    Control(Break),
    /// The connection on which a worker gets what the rank before it sends breaks.
    Data(Break),
    /// No worker can write a whole checkpoint.
    DiskFull,
    /// The coordinator cannot go on with its journal.
    JournalFull,
    /// The coordinator is asked to end and started again, and its run is resumed.
    Restart,
    /// A worker is asked to end, and another one joins.
    Replaced,
    /// A worker is drained, and comes back.
    Drained,
    /// Another worker joins, and leaves again.
    Joined,
    /// A worker is asked to end; another one comes later.
    Left,
}

impl Kind {
    const ALL: [Kind; 23] = [
        Kind::ComputeKilled,
        Kind::SupervisorKilled,
        Kind::CoordinatorKilled,
        Kind::EverythingKilled,
        Kind::ComputeStopped,
        Kind::CoordinatorStopped,
        Kind::Control(Break::Cut),
        Kind::Control(Break::Reset),
        Kind::Control(Break::Silent),
        Kind::Control(Break::HalfOpen),
        Kind::Control(Break::Slow),
        Kind::Data(Break::Cut),
        Kind::Data(Break::Reset),
        Kind::Data(Break::Silent),
        Kind::Data(Break::HalfOpen),
        Kind::Data(Break::Slow),
        Kind::DiskFull,
        Kind::JournalFull,
        Kind::Restart,
        Kind::Replaced,
        Kind::Drained,
        Kind::Joined,
        Kind::Left,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Kind::ComputeKilled => "compute killed",
            Kind::SupervisorKilled => "supervisor killed",
            Kind::CoordinatorKilled => "coordinator killed",
            Kind::EverythingKilled => "everything killed",
            Kind::ComputeStopped => "compute stopped",
            Kind::CoordinatorStopped => "coordinator stopped",
            Kind::Control(Break::Cut) => "control cut",
            Kind::Control(Break::Reset) => "control reset",
            Kind::Control(Break::Silent) => "control silent",
            Kind::Control(Break::HalfOpen) => "control half-open",
            Kind::Control(Break::Slow) => "control slow",
            Kind::Data(Break::Cut) => "data cut",
            Kind::Data(Break::Reset) => "data reset",
            Kind::Data(Break::Silent) => "data silent",
            Kind::Data(Break::HalfOpen) => "data half-open",
            Kind::Data(Break::Slow) => "data slow",
            Kind::DiskFull => "disk full",
            Kind::JournalFull => "journal full",
            Kind::Restart => "coordinator restarted",
            Kind::Replaced => "worker replaced",
            Kind::Drained => "worker drained",
            Kind::Joined => "worker joined",
            Kind::Left => "worker left",
        }
    }

    /// It goes on for a while.
    fn lasts(self) -> bool {
        !matches!(
            self,
            Kind::ComputeKilled
                | Kind::SupervisorKilled
                | Kind::CoordinatorKilled
                | Kind::EverythingKilled
                | Kind::Restart
                | Kind::Replaced
        )
    }

    /// It happens to one worker.
    fn to_a_worker(self) -> bool {
        !matches!(
            self,
            Kind::CoordinatorKilled
                | Kind::EverythingKilled
                | Kind::CoordinatorStopped
                | Kind::DiskFull
                | Kind::JournalFull
                | Kind::Restart
                | Kind::Joined
        )
    }
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fault {
    /// When, after the submission of the run.
    pub at: Duration,
    pub kind: Kind,
    /// Which worker in the order of their names, where it happens to one.
    pub worker: usize,
    /// For how long, where it lasts.
    pub lasts: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s {}", self.at.as_secs_f64(), self.kind.name())?;
        if self.kind.to_a_worker() {
            write!(f, " (worker {})", self.worker)?;
        }
        if self.kind.lasts() {
            write!(f, " for {:.1} s", self.lasts.as_secs_f64())?;
        }
        Ok(())
    }
}

/// Who trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Fewest and most ranks of a generation. Where they differ, joins and leaves change the world.
    pub ranks: (u32, u32),
    /// Workers at the start.
    pub workers: u32,
    /// Who keeps the optimizer's state, as recipes say it.
    pub sharding: &'static str,
}

impl Shape {
    fn draw(random: &mut impl Rng) -> Self {
        let most = random.random_range(2..=4);
        let least = if random.random_bool(0.5) { 2 } else { most };
        Self {
            ranks: (least, most),
            // Some have a spare.
            workers: most + random.random_range(0..=1),
            sharding: if random.random_bool(0.4) {
                "zero1"
            } else {
                "none"
            },
        }
    }

    /// Every generation has the same number of ranks.
    pub fn fixed(self) -> bool {
        self.ranks.0 == self.ranks.1
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (least, most) = self.ranks;
        let Self {
            workers, sharding, ..
        } = self;
        if self.fixed() {
            write!(f, "{most} of {workers} workers, sharding {sharding}")
        } else {
            write!(
                f,
                "{least} to {most} of {workers} workers, sharding {sharding}"
            )
        }
    }
}

/// Who trains, and the faults of one run in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Schedule {
    pub seed: u64,
    pub shape: Shape,
    pub faults: Vec<Fault>,
}

impl Schedule {
    /// The schedule of this seed.
    pub fn draw(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let shape = Shape::draw(&mut random);
        let mut at = Duration::ZERO;
        let count = random.random_range(2..=5);
        let faults = (0..count).map(|_| {
            if !random.random_bool(TOGETHER) {
                at += Duration::from_secs_f64(random.random_range(0.0..PAUSE));
            }
            Fault {
                at,
                kind: Kind::ALL[random.random_range(0..Kind::ALL.len())],
                worker: random.random_range(0..shape.workers as usize),
                lasts: lasts(&mut random),
            }
        });
        let faults = faults.collect();
        Self {
            seed,
            shape,
            faults,
        }
    }
}

/// Short and long ones are equally likely: the logarithm is uniform.
fn lasts(random: &mut impl Rng) -> Duration {
    let (shortest, longest) = LASTS;
    Duration::from_secs_f64(shortest * (longest / shortest).powf(random.random()))
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let faults: Vec<_> = self.faults.iter().map(Fault::to_string).collect();
        write!(f, "{}: {}", self.shape, faults.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_schedule_again() {
        assert_eq!(Schedule::draw(7), Schedule::draw(7));
    }

    #[test]
    fn two_hundred_seeds_draw_every_kind_often_and_some_at_once() {
        let schedules: Vec<_> = (0..200).map(Schedule::draw).collect();
        let faults: Vec<_> = schedules.iter().flat_map(|one| &one.faults).collect();
        for kind in Kind::ALL {
            let times = faults.iter().filter(|fault| fault.kind == kind).count();
            assert!(times >= 15, "{}: {times}", kind.name());
        }
        let lasts = faults.iter().map(|fault| fault.lasts.as_secs_f64());
        assert!(
            lasts
                .clone()
                .all(|lasts| (LASTS.0..=LASTS.1).contains(&lasts))
        );
        assert!(lasts.filter(|lasts| *lasts > 10.0).count() >= 100);
        let at_once = |one: &&Schedule| one.faults.windows(2).any(|two| two[0].at == two[1].at);
        assert!(schedules.iter().filter(at_once).count() >= 50);
    }

    #[test]
    fn two_hundred_seeds_draw_every_world_fixed_and_elastic_and_both_shardings() {
        let shapes: Vec<_> = (0..200).map(|seed| Schedule::draw(seed).shape).collect();
        for ranks in [(2, 2), (3, 3), (4, 4), (2, 3), (2, 4)] {
            for sharding in ["none", "zero1"] {
                let alike = |shape: &&Shape| shape.ranks == ranks && shape.sharding == sharding;
                let times = shapes.iter().filter(alike).count();
                assert!(times >= 3, "{ranks:?} {sharding}: {times}");
            }
        }
    }
}
