//! What happens when: a pure function of a seed.

use std::fmt;
use std::time::Duration;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Longest time from the submission to the first fault, and from one fault to the next, seconds. About as long as it takes
/// to form a generation and to train.
const PAUSE: f64 = 0.8;

/// Shortest and longest time for which a fault lasts, seconds. The coordinator gives up a silent worker after 10.
const LASTS: (f64, f64) = (0.3, 15.0);

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
    /// The connection of a worker to the coordinator is reset, and new ones as well.
    Cut,
    /// It is silent.
    HalfOpen,
    /// It is slow.
    Slow,
    /// No worker can write a whole checkpoint.
    DiskFull,
    /// The coordinator is asked to end and started again, and its run is resumed.
    Restart,
    /// A worker is asked to end, and another one joins.
    Replaced,
    /// A worker is drained, and comes back.
    Drained,
}

impl Kind {
    const ALL: [Kind; 13] = [
        Kind::ComputeKilled,
        Kind::SupervisorKilled,
        Kind::CoordinatorKilled,
        Kind::EverythingKilled,
        Kind::ComputeStopped,
        Kind::CoordinatorStopped,
        Kind::Cut,
        Kind::HalfOpen,
        Kind::Slow,
        Kind::DiskFull,
        Kind::Restart,
        Kind::Replaced,
        Kind::Drained,
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
            Kind::Cut => "line cut",
            Kind::HalfOpen => "line half-open",
            Kind::Slow => "line slow",
            Kind::DiskFull => "disk full",
            Kind::Restart => "coordinator restarted",
            Kind::Replaced => "worker replaced",
            Kind::Drained => "worker drained",
        }
    }

    /// It goes on for a while.
    fn lasts(self) -> bool {
        matches!(
            self,
            Kind::ComputeStopped
                | Kind::CoordinatorStopped
                | Kind::Cut
                | Kind::HalfOpen
                | Kind::Slow
                | Kind::DiskFull
                | Kind::Drained
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
                | Kind::Restart
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

/// The faults of one run, in order.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Schedule {
    pub seed: u64,
    pub faults: Vec<Fault>,
}

impl Schedule {
    /// The schedule of this seed.
    pub fn draw(seed: u64) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut at = Duration::ZERO;
        let count = random.random_range(2..=4);
        let faults = (0..count).map(|_| {
            at += Duration::from_secs_f64(random.random_range(0.0..PAUSE));
            Fault {
                at,
                kind: Kind::ALL[random.random_range(0..Kind::ALL.len())],
                worker: random.random_range(0..3),
                lasts: lasts(&mut random),
            }
        });
        let faults = faults.collect();
        Self { seed, faults }
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
        f.write_str(&faults.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_schedule_again_and_two_hundred_draw_every_kind() {
        assert_eq!(Schedule::draw(7), Schedule::draw(7));
        let faults: Vec<_> = (0..200)
            .flat_map(|seed| Schedule::draw(seed).faults)
            .collect();
        for kind in Kind::ALL {
            let times = faults.iter().filter(|fault| fault.kind == kind).count();
            assert!(times >= 20, "{}: {times}", kind.name());
        }
        let lasts = faults.iter().map(|fault| fault.lasts.as_secs_f64());
        assert!(
            lasts
                .clone()
                .all(|lasts| (LASTS.0..=LASTS.1).contains(&lasts))
        );
        assert!(lasts.fold(0.0, f64::max) > 10.0);
    }
}
