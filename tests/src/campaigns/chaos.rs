//! Real faults on real processes, in schedules drawn at random: deaths, standstills, partitions, full disks, restarts,
//! workers that leave, join and are drained.
//!
//! Two of three workers train the same recipe again and again. The number of ranks is always two, so every run must end
//! with the very bits of one that was left alone; and exactly on its budget, with a ledger in which every sample stands
//! once.

mod schedule;
mod stage;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::ledger::{self, Coverage};
use crate::programs::Programs;
use crate::report::{Row, rounded};
use crate::weights::{self, Hashes};

use super::kills;
use schedule::{Kind, Schedule};
use stage::Stage;

/// What the report says above its table.
pub const ABOUT: &str = "Two of three workers train the same recipe, once per schedule, while up to four faults happen at random \
    moments: processes die by SIGKILL or stand still (SIGSTOP), the connection of a worker to the coordinator is reset and refused \
    (cut), silent (half-open) or slow, the disk of the workers is full, the coordinator is restarted in order, a worker leaves and \
    another joins, or one is drained (which may fail only amid other faults). Standstills, broken lines and full disks last 0.3 to 15 s, \
    so faults overlap. Every run ended \
    exactly on its budget, `supra audit` agreed, every sample stands in its ledger exactly once, and its final weights and optimizer \
    state are bit-identical to those of a run that nobody disturbed. `faults_by_kind` counts what was really inflicted; the other \
    columns are sums over the schedules with a fault of this kind, and in the last line over all. `voided_steps` were trained again.";

/// Which schedules.
#[derive(Clone, Debug)]
pub struct Chaos {
    /// Seeds of the schedules: the same seed draws the same faults and moments.
    pub seeds: Vec<u64>,
}

const BATCH: u64 = 1024;
const STEPS: u64 = 150;
const RANKS: u32 = 2;
/// One of them is a spare.
const WORKERS: u32 = 3;
/// For the run that nobody disturbs.
const QUIET_LIMIT: Duration = Duration::from_secs(300);

/// What came of one schedule.
struct Outcome {
    /// Faults that were inflicted, in order. Some runs end before the last one.
    kinds: Vec<Kind>,
    coverage: Coverage,
    audit_failures: u64,
    voided_steps: u64,
    took: Duration,
}

impl Chaos {
    /// So many schedules, of the seeds from 0.
    pub fn schedules(count: u64) -> Self {
        Self {
            seeds: (0..count).collect(),
        }
    }

    /// Runs the campaign.
    ///
    /// # Errors
    /// At the first schedule that loses, repeats or changes anything; says how to repeat it.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let fixture = Fixture::create(programs, directory)?;
        let recipe = recipe();
        let path = recipe.write(&fixture)?;
        let expected = undisturbed(programs, &directory.join("quiet"), &path, &recipe)?;
        let mut outcomes = Vec::new();
        for (place, seed) in (1..).zip(&self.seeds) {
            let schedule = Schedule::draw(*seed);
            let folder = directory.join(format!("schedule-{seed}"));
            let mut stage = Stage::start(programs, &folder, WORKERS)?;
            let outcome = suffer(&mut stage, &path, &schedule, &recipe, &expected);
            let outcome = outcome.map_err(|failure| report(&failure, &schedule, &stage))?;
            eprintln!(
                "{place} of {}: seed {seed}, {:.1} s, {} voided steps: {}",
                self.seeds.len(),
                outcome.took.as_secs_f64(),
                outcome.voided_steps,
                stage.inflicted().join(", "),
            );
            outcomes.push(outcome);
            drop(stage);
            std::fs::remove_dir_all(&folder)?;
        }
        Ok(rows(&outcomes))
    }
}

fn recipe() -> TinyRecipe {
    TinyRecipe {
        name: "chaos".to_owned(),
        // The last step is a smaller one, and some tokens are left over.
        budget: BATCH * STEPS - 100,
        batch: BATCH,
        checkpoint_every: BATCH * 20,
        workers: (RANKS, RANKS),
        repeat: true,
        more: "seed: 3\n".to_owned(),
        ..TinyRecipe::default()
    }
}

/// The tensors of the last checkpoint of a run that is left alone.
fn undisturbed(
    programs: &Programs,
    directory: &Path,
    path: &Path,
    recipe: &TinyRecipe,
) -> Result<Hashes> {
    let cluster = Cluster::with_workers(programs, directory, RANKS)?;
    let run = cluster.submit(path)?;
    cluster
        .wait_finished(&run, QUIET_LIMIT)
        .while_doing("the undisturbed run")?;
    kills::check(&cluster, &run, recipe)?;
    weights::hashes(&cluster.last_checkpoint(&run)?)
}

/// Trains while the schedule happens, and looks at what came of it.
fn suffer(
    stage: &mut Stage,
    path: &Path,
    schedule: &Schedule,
    recipe: &TinyRecipe,
    expected: &Hashes,
) -> Result<Outcome> {
    let run = stage.cluster().submit(path)?;
    let clock = Instant::now();
    let kinds = stage.endure(&run, schedule)?;
    let took = clock.elapsed();
    let cluster = stage.cluster();
    let audit = cluster.supra(&["audit", &run])?;
    let outcome = Outcome {
        kinds,
        coverage: ledger::coverage(&cluster.ledger(&run)?, recipe.samples()),
        audit_failures: u64::from(audit.code != 0),
        voided_steps: kills::voided(cluster, &run)?,
        took,
    };
    kills::check(cluster, &run, recipe).while_doing(format_args!("{:?}", outcome.coverage))?;
    weights::expect(expected, &cluster.last_checkpoint(&run)?)?;
    Ok(outcome)
}

/// All that is needed to understand a schedule that went wrong, and to run it again.
fn report(failure: &Failure, schedule: &Schedule, stage: &Stage) -> Failure {
    let seed = schedule.seed;
    Failure::new(format!(
        "schedule {seed}: {failure}\n{}\nplanned: {schedule}\ninflicted: {}\n\
         run it again with: scripts/prove chaos --seed {seed}",
        stage.cluster().logs(),
        stage.inflicted().join(", "),
    ))
}

fn rows(outcomes: &[Outcome]) -> Vec<Row> {
    let mut by_kind: BTreeMap<Kind, u64> = BTreeMap::new();
    for kind in outcomes.iter().flat_map(|outcome| &outcome.kinds) {
        *by_kind.entry(*kind).or_default() += 1;
    }
    let of = |kind: Kind| {
        let with = |outcome: &&Outcome| outcome.kinds.contains(&kind);
        outcomes.iter().filter(with).collect::<Vec<_>>()
    };
    let mut rows: Vec<Row> = by_kind
        .iter()
        .map(|(kind, times)| row(kind.name(), *times, &of(*kind)))
        .collect();
    rows.push(row(
        "all",
        by_kind.values().sum(),
        &outcomes.iter().collect::<Vec<_>>(),
    ));
    rows
}

fn row(fault: &str, times: u64, outcomes: &[&Outcome]) -> Row {
    let sum = |of: fn(&Outcome) -> u64| outcomes.iter().map(|outcome| of(outcome)).sum::<u64>();
    let took: Duration = outcomes.iter().map(|outcome| outcome.took).sum();
    Row::new()
        .with("fault", fault)
        .with("faults_by_kind", times)
        .with("schedules", outcomes.len())
        .with("lost", sum(|outcome| outcome.coverage.lost))
        .with("repeated", sum(|outcome| outcome.coverage.repeated))
        .with("audit_failures", sum(|outcome| outcome.audit_failures))
        .with("voided_steps", sum(|outcome| outcome.voided_steps))
        .with("seconds", rounded(took.as_secs_f64(), 1))
}
