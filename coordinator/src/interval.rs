//! How long to train from one checkpoint to the next: a plain decision with its reason.
//!
//! Too many checkpoints cost time, too few cost more steps when something breaks. What is best follows from what a
//! checkpoint costs and from how often a failure goes back to one (Daly, "A higher order estimate of the optimum checkpoint
//! interval for restart dumps", Future Generation Computer Systems 22, 2006, equation 37; its first term is Young's of 1974).
//! The cost is measured. Failures are rare, so their rate is what was observed of this run together with an expectation
//! from before (a Gamma prior worth one failure in [`PRIOR_HOURS`] of a worker): it decides at first, and counts for less
//! with every hour and every failure.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Hours of one worker in which one failure that costs steps is expected. Large clusters report 8000 and more for their
/// GPUs alone; people, preemption and other software are no less often the cause.
pub const PRIOR_HOURS: f64 = 1000.0;

/// Costs that are remembered.
const REMEMBERED: usize = 15;

const HOUR: f64 = 3600.0;

/// Between what the interval stays, training time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The shortest. Also the first one, while nobody knows what a checkpoint costs.
    pub least: Duration,
    /// The longest.
    pub most: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            least: Duration::from_secs(60),
            most: Duration::from_secs(6 * 3600),
        }
    }
}

/// What a run has shown so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experience {
    /// Training time of all workers, added up, milliseconds.
    pub worker_ms: u64,
    /// Training time since the newest checkpoint: what a failure would cost now, milliseconds.
    pub unsaved_ms: u64,
    /// Failures that went back to a checkpoint. Where survivors keep the state, one costs no steps and does not count.
    pub failures: u64,
    /// For how long training stood still for each of the last checkpoints, milliseconds.
    pub costs_ms: VecDeque<u64>,
}

impl Experience {
    /// The run has trained for so long with so many workers; and wrote a checkpoint in the end, if it has a cost.
    pub fn trained(&mut self, milliseconds: u64, world: u32, cost_ms: Option<u64>) {
        let of_all = milliseconds.saturating_mul(u64::from(world));
        self.worker_ms = self.worker_ms.saturating_add(of_all);
        self.unsaved_ms = self.unsaved_ms.saturating_add(milliseconds);
        if let Some(cost) = cost_ms {
            self.unsaved_ms = 0;
            self.costs_ms.push_back(cost);
            if self.costs_ms.len() > REMEMBERED {
                self.costs_ms.pop_front();
            }
        }
    }

    /// Steps after the newest checkpoint were lost.
    pub fn failed(&mut self) {
        self.failures += 1;
        self.unsaved_ms = 0;
    }

    /// The median cost, seconds.
    fn cost(&self) -> Option<f64> {
        let mut costs: Vec<u64> = self.costs_ms.iter().copied().collect();
        costs.sort_unstable();
        let median = costs.get(costs.len() / 2).copied()?;
        Some(median as f64 / 1e3)
    }

    /// Mean time between failures of `world` workers, seconds: the mean of the rate's posterior, inverted.
    fn between_failures(&self, world: u32) -> f64 {
        let hours = PRIOR_HOURS + self.worker_ms as f64 / 1e3 / HOUR;
        hours * HOUR / (1 + self.failures) as f64 / f64::from(world.max(1))
    }

    /// The interval for `world` workers.
    pub fn interval(&self, world: u32, bounds: Bounds) -> Interval {
        let between = self.between_failures(world);
        let Some(cost) = self.cost() else {
            return Interval {
                every: bounds.least,
                reason: "until the first has shown what a checkpoint costs".to_owned(),
            };
        };
        let every = optimum(cost, between).clamp(
            bounds.least.as_secs_f64(),
            bounds.most.as_secs_f64().max(bounds.least.as_secs_f64()),
        );
        let observed = match self.failures {
            0 => "none seen".to_owned(),
            failures => format!("{failures} seen"),
        };
        Interval {
            every: Duration::from_secs_f64(every),
            reason: format!(
                "a checkpoint costs {} (median of {}), a failure that goes back to one is expected every {} ({observed} in {} of a worker)",
                time(cost),
                self.costs_ms.len(),
                time(between),
                time(self.worker_ms as f64 / 1e3),
            ),
        }
    }
}

/// How long to train from one checkpoint to the next, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interval {
    /// Training time, without the checkpoint's own.
    pub every: Duration,
    /// In one line.
    pub reason: String,
}

/// The training time between checkpoints of `cost` seconds that loses least when failures come every `between` seconds in
/// the mean; seconds (Daly 2006, equation 37).
pub fn optimum(cost: f64, between: f64) -> f64 {
    if cost >= 2.0 * between {
        return between;
    }
    let share = cost / (2.0 * between);
    (2.0 * cost * between).sqrt() * (1.0 + share.sqrt() / 3.0 + share / 9.0) - cost
}

/// `40 ms`, `4.2 s`, `64 s`, `12 min`, `31 h`.
pub fn time(seconds: f64) -> String {
    match seconds {
        _ if seconds < 0.1 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        _ if seconds < 120.0 => format!("{seconds:.0} s"),
        _ if seconds < 2.0 * HOUR => format!("{:.0} min", seconds / 60.0),
        _ if seconds < 10.0 * HOUR => format!("{:.1} h", seconds / HOUR),
        _ => format!("{:.0} h", seconds / HOUR),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The mean time that a second of training takes when every `every` seconds a checkpoint of `cost` is written (Daly
    /// 2006, equation 20, without the restart, which does not depend on the interval).
    fn wall(every: f64, cost: f64, between: f64) -> f64 {
        between * (((every + cost) / between).exp() - 1.0) / every
    }

    #[test]
    fn the_first_interval_is_the_shortest_and_then_the_cost_decides() {
        let mut run = Experience::default();
        let bounds = Bounds::default();
        let first = run.interval(8, bounds);
        assert_eq!(first.every, bounds.least);
        run.trained(60_000, 8, Some(94_000));
        let second = run.interval(8, bounds);
        let minutes = second.every.as_secs_f64() / 60.0;
        assert!((150.0..156.0).contains(&minutes), "{minutes}");
        assert_eq!(
            second.reason,
            "a checkpoint costs 94 s (median of 1), a failure that goes back to one is expected every 125 h (none seen in 8 min of a worker)"
        );
        for _ in 0..50 {
            run.failed();
        }
        assert!(run.interval(8, bounds).every < second.every / 6);
    }

    proptest! {
        #[test]
        fn longer_for_dear_checkpoints_and_for_rare_failures(
            cost in 0.001f64..1e4, more in 1.0f64..100.0, between in 1.0f64..1e7,
        ) {
            // Where a checkpoint takes longer than it takes to fail, there is no good interval.
            prop_assume!(cost < between);
            prop_assert!(optimum(cost, between * more) >= optimum(cost, between) * (1.0 - 1e-12));
            if cost * more < between / 4.0 {
                prop_assert!(optimum(cost * more, between) >= optimum(cost, between) * (1.0 - 1e-12));
            }
        }

        #[test]
        fn never_much_worse_than_the_best_interval(cost in 0.01f64..100.0, ratio in 4.0f64..1e5, other in 0.05f64..20.0) {
            let between = cost * ratio;
            let ours = wall(optimum(cost, between), cost, between);
            prop_assert!(ours <= wall(optimum(cost, between) * other, cost, between) * 1.01);
        }

        #[test]
        fn always_within_its_bounds(
            costs in prop::collection::vec(0u64..10_000_000, 0..20),
            times in prop::collection::vec((0u64..1_000_000_000, 1u32..1000), 0..20),
            failures in 0u64..1000, world in 0u32..100_000,
        ) {
            let mut run = Experience::default();
            for (time, world) in times {
                run.trained(time, world, None);
            }
            costs.into_iter().for_each(|cost| run.trained(0, 1, Some(cost)));
            (0..failures).for_each(|_| run.failed());
            let bounds = Bounds::default();
            let every = run.interval(world, bounds).every;
            prop_assert!(bounds.least <= every && every <= bounds.most);
            prop_assert!(run.costs_ms.len() <= REMEMBERED);
        }

        #[test]
        fn shorter_for_more_failures_and_for_more_workers(cost in 1u64..30_000, failures in 0u64..100, world in 1u32..1000) {
            let bounds = Bounds { least: Duration::ZERO, most: Duration::MAX };
            let mut run = Experience::default();
            run.trained(3_600_000, world, Some(cost));
            (0..failures).for_each(|_| run.failed());
            let before = run.interval(world, bounds).every;
            prop_assert!(run.interval(world + 1, bounds).every <= before);
            run.failed();
            prop_assert!(run.interval(world, bounds).every <= before);
        }
    }
}
