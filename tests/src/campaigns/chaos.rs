//! Real faults on real processes, in schedules drawn at random: deaths, standstills, broken connections, full disks, restarts,
//! workers that leave, join and are drained.
//!
//! Two to four ranks train the same recipe again and again. Every run must end exactly on its budget, with a ledger in which
//! every sample stands once. Where every step had as many ranks as in a run that was left alone, it must end with the very
//! bits of that one; where the number of ranks changed, with weights that differ by no more than other orders of addition explain.

mod lines;
mod reference;
mod schedule;
mod stage;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::ledger::{self, Coverage};
use crate::programs::Programs;
use crate::report::{Row, rounded};

use super::{kills, side_by_side};
use reference::{Likeness, Reference};
use schedule::{Kind, Schedule, Shape};
use stage::Stage;

/// What the report says above its table.
pub const ABOUT: &str = "Two to four ranks of up to five workers train the same recipe, once per schedule, with the optimizer's state whole \
    or divided (zero1), while up to five faults happen at random moments, some at once: processes die by SIGKILL or stand still (SIGSTOP), \
    the connection of a worker to the coordinator (control) or of the rank before it to a worker (data) is closed (cut), reset, \
    silent, swallows one direction (half-open) or is slow, the disk of the workers or of the journal is full, the coordinator is \
    restarted in order, workers leave, join and are drained (a drain may fail only amid other faults). What lasts, lasts 0.3 to 40 s, \
    so faults overlap. Every run ended exactly on its budget, `supra audit` agreed, and every sample stands in its ledger exactly once. \
    `bit_equal` runs had as many ranks at every step as one that nobody disturbed, and its very weights and optimizer state; in \
    `within_bound` runs the number of ranks changed, and their final weights are at most twice as far from that one's as those of \
    undisturbed runs of fewer ranks are, or less than a hundredth of the way that the last steps went per step. \
    `faults_by_kind` counts what was really inflicted; the other columns are sums over the schedules with a fault of this kind, and \
    in the last line over all. `voided_steps` were trained again. `seconds` is summed over schedules that ran side by side.";

/// Which schedules, and how many side by side.
#[derive(Clone, Debug)]
pub struct Chaos {
    /// Seeds of the schedules: the same seed draws the same faults and moments.
    pub seeds: Vec<u64>,
    /// Schedules that run at the same time.
    pub jobs: usize,
}

const BATCH: u64 = 1024;
const STEPS: u64 = 150;

/// What came of one schedule.
struct Outcome {
    /// Faults that were inflicted, in order. Some runs end before the last one.
    kinds: Vec<Kind>,
    coverage: Coverage,
    audit_failures: u64,
    likeness: Likeness,
    voided_steps: u64,
    took: Duration,
}

impl Chaos {
    /// So many schedules, of the seeds from 0, as many side by side as this machine has cores for.
    pub fn schedules(count: u64) -> Self {
        Self {
            seeds: (0..count).collect(),
            jobs: side_by_side::usual_jobs(),
        }
    }

    /// Runs the campaign.
    ///
    /// # Errors
    /// When a schedule loses, repeats or changes anything; all are run, and what went wrong is printed with how to repeat it and
    /// where its logs are.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let fixture = Fixture::create(programs, directory)?;
        let schedules: Vec<Schedule> = self.seeds.iter().copied().map(Schedule::draw).collect();
        let worlds = schedules.iter().map(|one| one.shape.ranks);
        let worlds: BTreeSet<u32> = worlds.flat_map(|(least, most)| least..=most).collect();
        let mut references = BTreeMap::new();
        for world in worlds {
            let folder = directory.join(format!("quiet-{world}"));
            let recipe = recipe(&format!("quiet-{world}"), (world, world), "none");
            let reference = Reference::train(programs, &folder, &fixture, &recipe);
            let reference = reference.while_doing(format_args!("{world} undisturbed ranks"))?;
            references.insert(world, reference);
        }
        let theatre = Theatre {
            programs,
            directory,
            fixture: &fixture,
            references: &references,
        };
        let (ended, total) = (Mutex::new(Vec::new()), schedules.len());
        let end = |seed, outcome: Result<(Outcome, String)>| {
            let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
            let line = match &outcome {
                Ok((_, line)) => line.clone(),
                Err(failure) => failure.to_string(),
            };
            ended.push((seed, outcome.ok().map(|(outcome, _)| outcome)));
            eprintln!("{} of {total}: seed {seed}, {line}", ended.len());
        };
        side_by_side::play(self.jobs, schedules.into_iter(), |schedule| {
            end(schedule.seed, theatre.play(&schedule));
        });
        verdict(ended.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The rows, if all schedules went well.
fn verdict(mut ended: Vec<(u64, Option<Outcome>)>) -> Result<Vec<Row>> {
    ended.sort_by_key(|(seed, _)| *seed);
    let failed = ended.iter().filter(|(_, outcome)| outcome.is_none());
    let failed: Vec<String> = failed.map(|(seed, _)| seed.to_string()).collect();
    if failed.is_empty() {
        let outcomes: Vec<Outcome> = ended
            .into_iter()
            .filter_map(|(_, outcome)| outcome)
            .collect();
        return Ok(rows(&outcomes));
    }
    Err(Failure::new(format!(
        "{} of {} schedules went wrong, as said above: those of seeds {}",
        failed.len(),
        ended.len(),
        failed.join(", ")
    )))
}

fn recipe(name: &str, workers: (u32, u32), sharding: &'static str) -> TinyRecipe {
    TinyRecipe {
        name: name.to_owned(),
        // The last step is a smaller one, and some tokens are left over.
        budget: BATCH * STEPS - 100,
        batch: BATCH,
        checkpoint_every: BATCH * 20,
        workers,
        sharding,
        repeat: true,
        // A slow one: a feature that rounding moves over its kink must not be amplified step by step.
        lr: "3e-4",
        more: "seed: 3\n".to_owned(),
        ..TinyRecipe::default()
    }
}

/// Where schedules are played, and what they are compared with.
struct Theatre<'a> {
    programs: &'a Programs,
    directory: &'a Path,
    fixture: &'a Fixture,
    /// Runs that nobody disturbed, by their number of ranks.
    references: &'a BTreeMap<u32, Reference>,
}

impl Theatre<'_> {
    /// Plays a schedule; says in a line what happened.
    fn play(&self, schedule: &Schedule) -> Result<(Outcome, String)> {
        let name = format!("schedule-{}", schedule.seed);
        let folder = self.directory.join(&name);
        let Shape {
            ranks,
            workers,
            sharding,
        } = schedule.shape;
        let recipe = recipe(&name, ranks, sharding);
        let mut stage = Stage::start(self.programs, &folder, workers)?;
        let played = recipe
            .write(self.fixture)
            .and_then(|path| self.suffer(&mut stage, &path, schedule, &recipe));
        let logs = stage.cluster().logs();
        let inflicted = stage.inflicted().join(", ");
        drop(stage);
        match played {
            Ok(outcome) => {
                std::fs::remove_dir_all(&folder)?;
                let line = format!(
                    "{:.1} s, {}, {} voided steps, {}: {inflicted}",
                    outcome.took.as_secs_f64(),
                    schedule.shape,
                    outcome.voided_steps,
                    outcome.likeness,
                );
                Ok((outcome, line))
            }
            Err(failure) => {
                let seed = schedule.seed;
                let kept = side_by_side::keep(&folder, "chaos", seed)?;
                Err(Failure::new(format!(
                    "FAILED: {failure}\n{logs}\nplanned: {schedule}\ninflicted: {inflicted}\n\
                     everything it left is in {}\nrun it again with: scripts/prove chaos --seed {seed}",
                    kept.display()
                )))
            }
        }
    }

    /// Trains while the schedule happens, and looks at what came of it.
    fn suffer(
        &self,
        stage: &mut Stage,
        path: &Path,
        schedule: &Schedule,
        recipe: &TinyRecipe,
    ) -> Result<Outcome> {
        let run = stage.cluster().submit(path)?;
        let clock = Instant::now();
        let kinds = stage.endure(&run, schedule)?;
        let took = clock.elapsed();
        let cluster = stage.cluster();
        let audit = cluster.supra(&["audit", &run])?;
        let records = cluster.ledger(&run)?;
        let coverage = ledger::coverage(&records, recipe.samples());
        kills::check(cluster, &run, recipe).while_doing(format_args!("{coverage:?}"))?;
        let most = schedule.shape.ranks.1;
        let mut generations = ledger::generations(&records).into_iter();
        let same_worlds = schedule.shape.fixed()
            || generations.all(|generation| stage.worlds().get(&generation) == Some(&most));
        let (reference, last) = (&self.references[&most], cluster.last_checkpoint(&run)?);
        let likeness = if same_worlds {
            reference.expect_bits(&last)?
        } else {
            let fewer = self.references.range(schedule.shape.ranks.0..most);
            reference.expect_near(&last, fewer.map(|(_, other)| other))?
        };
        Ok(Outcome {
            kinds,
            coverage,
            audit_failures: u64::from(audit.code != 0),
            likeness,
            voided_steps: kills::voided(cluster, &run)?,
            took,
        })
    }
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
        .with(
            "bit_equal",
            sum(|outcome| outcome.likeness.bit_equal().into()),
        )
        .with(
            "within_bound",
            sum(|outcome| (!outcome.likeness.bit_equal()).into()),
        )
        .with("lost", sum(|outcome| outcome.coverage.lost))
        .with("repeated", sum(|outcome| outcome.coverage.repeated))
        .with("audit_failures", sum(|outcome| outcome.audit_failures))
        .with("voided_steps", sum(|outcome| outcome.voided_steps))
        .with("seconds", rounded(took.as_secs_f64(), 1))
}
