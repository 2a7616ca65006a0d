//! Seed after seed of the simulation, and the bugs that it has to catch.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::failure::{Failure, Result};
use crate::report::Row;
use crate::simulation::{Coverage, Kind, Mutant, Phase, Verdict, simulate};

/// What the report says above its table.
pub const ABOUT: &str = "The real state machines of one coordinator and of 8 to 12 workers, in simulated time, over a simulated \
    network and simulated disks; every seed has its own faults. After every event the promises are checked: no sample twice and none \
    left out, one generation that may apply steps, durable steps that stay, an intact chain, nothing told before it is on the \
    disk; at the end, within simulated minutes of the last fault, every worker knows of every void, all runs are finished, and the \
    last checkpoint holds exactly what the ledger says. The first row is the campaign. The others count how often each kind of fault \
    hit a worker in each phase that it can hit (`events`: in all), and then name bugs that were put in at the boundary of the state \
    machines, the number of seeds that it took to find each, and, under `coverage`, the promise that it broke first.";

/// How many seeds.
#[derive(Clone, Copy, Debug)]
pub struct Simulation {
    /// Seeds without a bug.
    pub seeds: u64,
    /// Least number of hits of each reachable pair of fault and phase.
    pub hits: u64,
    /// Seeds within which each bug has to be found.
    pub hunts: u64,
}

impl Simulation {
    /// The campaign.
    pub const WHOLE: Simulation = Simulation {
        seeds: 10_000,
        hits: 100,
        hunts: 1_000,
    };
    /// In some twenty seconds.
    pub const QUICK: Simulation = Simulation {
        seeds: 1_000,
        hits: 5,
        hunts: 1_000,
    };
    /// In every run of the tests.
    pub const SMALL: Simulation = Simulation {
        seeds: 200,
        hits: 1,
        hunts: 1_000,
    };

    /// Runs the campaign on all cores.
    ///
    /// # Errors
    /// Names the first seed that broke a promise, a pair of fault and phase that was not hit often enough, or a bug that
    /// was not found.
    pub fn run(&self) -> Result<Vec<Row>> {
        let (events, coverage) = self.seeds()?;
        if let Some((kind, phase, count)) = coverage.rarest()
            && count < self.hits
        {
            return Err(Failure::new(format!(
                "{kind:?} hit workers while {phase:?} only {count} times in {} seeds, {} are needed",
                self.seeds, self.hits
            )));
        }
        let mut found = Vec::new();
        for mutant in Mutant::ALL {
            found.push((mutant, self.hunt(mutant)?));
        }
        Ok(rows(self.seeds, events, &coverage, &found))
    }

    /// Events and hits of all seeds.
    fn seeds(&self) -> Result<(u64, Coverage)> {
        let next = AtomicU64::new(0);
        let work = || {
            let (mut events, mut coverage, mut broken) = (0, Coverage::default(), None);
            while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed))
                .filter(|seed| *seed < self.seeds && broken.is_none())
            {
                let verdict = simulate(seed, None, false);
                events += verdict.events;
                coverage.add(&verdict.coverage);
                broken = verdict.violation.map(|what| (seed, what));
            }
            (events, coverage, broken)
        };
        let parts = on_all_cores(work);
        let (mut events, mut coverage) = (0, Coverage::default());
        for (part, hits, broken) in parts {
            if let Some((seed, what)) = broken {
                return Err(broke(seed, &what));
            }
            events += part;
            coverage.add(&hits);
        }
        Ok((events, coverage))
    }

    /// The seed that finds a bug, and what it showed.
    fn hunt(&self, mutant: Mutant) -> Result<(u64, Verdict)> {
        (0..self.hunts)
            .map(|seed| (seed, simulate(seed, Some(mutant), false)))
            .find(|(_, verdict)| verdict.violation.is_some())
            .ok_or_else(|| Failure::new(format!("{mutant:?} survives {} seeds", self.hunts)))
    }
}

/// Simulates one seed and prints what happens in it.
///
/// # Errors
/// When it breaks a promise.
pub fn replay(seed: u64, print: impl FnMut(&str)) -> Result<()> {
    let Verdict {
        violation, trace, ..
    } = simulate(seed, None, true);
    trace.iter().map(String::as_str).for_each(print);
    violation.map_or(Ok(()), |what| Err(broke(seed, &what)))
}

fn broke(seed: u64, what: &str) -> Failure {
    Failure::new(format!(
        "{what}; look at it with `scripts/prove simulation --seed {seed}`"
    ))
}

fn on_all_cores<T: Send>(work: impl Fn() -> T + Sync) -> Vec<T> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(&work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    })
}

/// The campaign as a whole, then each kind of fault, then each bug.
fn rows(
    seeds: u64,
    events: u64,
    coverage: &Coverage,
    found: &[(Mutant, (u64, Verdict))],
) -> Vec<Row> {
    let killed = found.len() as u64;
    let row = |what: String, seeds: u64, events: u64| {
        Row::new()
            .with("what", what)
            .with("seeds", seeds)
            .with("events", events)
    };
    let rest = |row: Row, violations: u64, coverage: String, mutants: u64, killed: u64| {
        row.with("violations", violations)
            .with("coverage", coverage)
            .with("mutants", mutants)
            .with("mutants_killed", killed)
    };
    let rarest = coverage.rarest().map_or(0, |(_, _, count)| count);
    let whole = row("campaign".into(), seeds, events);
    let covered = format!("every pair {rarest} or more");
    let mutants = Mutant::ALL.len() as u64;
    let mut rows = vec![rest(whole, 0, covered, mutants, killed)];
    for kind in Kind::ALL {
        let phases = Phase::ALL.into_iter().filter(|phase| kind.reaches(*phase));
        let hits: Vec<_> = phases
            .map(|phase| (phase, coverage.of(kind, phase)))
            .collect();
        let sum = hits.iter().map(|(_, count)| count).sum();
        let texts = hits
            .iter()
            .map(|(phase, count)| format!("{phase:?} {count}"));
        let covered = texts.collect::<Vec<_>>().join(", ");
        let row = row(format!("fault {kind:?}"), seeds, sum);
        rows.push(rest(row, 0, covered, 0, 0));
    }
    for (mutant, (seed, verdict)) in found {
        let row = row(format!("mutant {mutant:?}"), seed + 1, verdict.events);
        let what = verdict.violation.clone().unwrap_or_default();
        rows.push(rest(row, 1, what, 1, 1));
    }
    rows
}
