//! `kill -9`, and storage that fails, while a checkpoint is written: nothing that can be read is wrong, nothing good is lost.
//!
//! Runs of two or three ranks write a checkpoint at every other step, to a storage that is slow enough to be hit in any phase of
//! it. After each blow every checkpoint that a reader would take is proved and compared, in every bit, with that of the same
//! step of a run that nobody disturbed.

mod blow;
mod phase;
mod storage;
mod story;
mod witness;

use std::collections::BTreeMap;
use std::fmt;
use std::iter;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::programs::Programs;
use crate::report::{Row, rounded};

use super::{kills, side_by_side};
use blow::{Blow, Kind};
use phase::Phase;
use storage::{Shim, Storage};
use story::{Story, Struck};
use witness::{Findings, Truth};

/// What the report says above its table.
pub const ABOUT: &str = "Two or three ranks, some with a spare worker, train the same recipe again and again, with the optimizer's state whole \
    or divided (zero1), write a checkpoint at every other step to a storage that is slow, and keep one to three of them. Blows fall \
    while a checkpoint is written, each in a phase that has its turn: its folder has files and no manifest (files), a manifest that the \
    coordinator's journal does not know (pending), one that it knows (journalled), one with its final name of which the journal does \
    not know that (published), or the checkpoint is published and an older one is being deleted (retired). A blow is SIGKILL of the \
    computing process of rank 0, which publishes, or of another rank, of a worker's supervisor, of the coordinator, or of everything at once; \
    or, for 0.1 to 14 s, SIGSTOP of rank 0 or a storage that refuses (read-only, or no permission), has no room or does not return from a \
    call, half of the time until something is killed, too. After each blow and at the end, every directory with a `manifest.json` was \
    verified, file by file, and its tensors compared with those of the same step of an undisturbed run: `wrong_reads` are those that \
    did not stand it. `lost_good` are checkpoints that the journal calls published and that are not there or do not verify, \
    and runs whose newest published one was followed by an older one. `kills` counts blows; the columns named after phases say where they fell, and in \
    the last line all of them. Every run went on after each, ended exactly on its budget with the very bits of the undisturbed one, and `supra audit --files` \
    agreed. `voided_steps` (of the runs with such a blow) were trained again.";

/// How many kills, of which runs, and how many of them side by side.
#[derive(Clone, Debug)]
pub struct CheckpointKills {
    /// Blows of SIGKILL, at least; other faults come in addition.
    pub kills: usize,
    /// Blows of any kind in one run.
    pub blows: u32,
    /// Seed of the first run; the next ones have the next seeds.
    pub first: u64,
    /// Runs at the same time.
    pub jobs: usize,
}

const BATCH: u64 = 512;
const STEPS: u64 = 70;
/// Steps from one checkpoint to the next.
const EVERY: u64 = 2;
/// For the run that nobody disturbs.
const QUIET_LIMIT: Duration = Duration::from_secs(300);

impl CheckpointKills {
    /// So many kills, of runs with seeds from 0, as many side by side as this machine has cores for.
    pub fn whole(kills: usize) -> Self {
        Self {
            kills,
            blows: 12,
            first: 0,
            jobs: side_by_side::usual_jobs(),
        }
    }

    /// One run, as a rule, of two ranks with `zero1`, in which nothing lasts for seconds.
    pub fn small() -> Self {
        Self {
            kills: 6,
            blows: 10,
            first: 60,
            jobs: 1,
        }
    }

    /// The run of one seed.
    pub fn of_seed(seed: u64) -> Self {
        Self {
            first: seed,
            jobs: 1,
            ..Self::whole(1)
        }
    }

    /// Runs the campaign.
    ///
    /// # Errors
    /// When a checkpoint is wrong or lost, a run does not go on or comes to something else, or hardly any blow met one of the
    /// phases; all runs are played, and what went wrong is printed with how to repeat it and where its logs are.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let fixture = Fixture::create(programs, directory)?;
        let theatre = Theatre {
            programs,
            directory,
            shim: Shim::compile(directory)?,
            truths: Mutex::new(BTreeMap::new()),
            fixture,
            blows: self.blows,
        };
        // Kills of the runs that have ended, and what is to be expected of the others.
        let killed = AtomicUsize::new(0);
        let expected = self.blows as usize * 3 / 4;
        let mut seeds = self.first..;
        let seeds = iter::from_fn(|| {
            let enough = killed.load(Ordering::Relaxed) >= self.kills;
            let seed = seeds.next().filter(|_| !enough)?;
            killed.fetch_add(expected, Ordering::Relaxed);
            Some(seed)
        });
        let ended = Mutex::new(Vec::new());
        side_by_side::play(self.jobs, seeds, |seed| {
            let outcome = theatre.play(seed);
            // One that failed is not repeated.
            let kills = outcome.as_ref().map_or(expected, Outcome::kills);
            killed.fetch_add(kills, Ordering::Relaxed);
            killed.fetch_sub(expected, Ordering::Relaxed);
            let mut ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
            let line = match &outcome {
                Ok(outcome) => outcome.to_string(),
                Err(failure) => failure.to_string(),
            };
            ended.push((seed, outcome.ok()));
            eprintln!("{} runs: seed {seed}, {line}", ended.len());
        });
        self.verdict(ended.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// The rows, if all went well.
    fn verdict(&self, mut ended: Vec<(u64, Option<Outcome>)>) -> Result<Vec<Row>> {
        ended.sort_by_key(|(seed, _)| *seed);
        let failed = ended.iter().filter(|(_, outcome)| outcome.is_none());
        let failed: Vec<String> = failed.map(|(seed, _)| seed.to_string()).collect();
        if !failed.is_empty() {
            return Err(Failure::new(format!(
                "{} of {} runs went wrong, as said above: those of seeds {}",
                failed.len(),
                ended.len(),
                failed.join(", ")
            )));
        }
        let outcomes: Vec<Outcome> = ended
            .into_iter()
            .filter_map(|(_, outcome)| outcome)
            .collect();
        let struck = || outcomes.iter().flat_map(|outcome| &outcome.struck);
        for phase in Phase::ALL {
            let (met, all) = (
                struck().filter(|one| one.phase == phase).count(),
                struck().count(),
            );
            // A small campaign cannot meet all of them.
            if met < all / 100 {
                let name = phase.name();
                return Err(Failure::new(format!(
                    "only {met} of {all} blows met a checkpoint in the phase {name:?}"
                )));
            }
        }
        Ok(rows(&outcomes))
    }
}

/// Who trains, and what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    ranks: u32,
    /// With those that have nothing to do.
    workers: u32,
    sharding: &'static str,
    keep: u32,
}

impl Shape {
    fn draw(random: &mut impl Rng) -> Self {
        let ranks = random.random_range(2..=3);
        Self {
            ranks,
            workers: ranks + random.random_range(0..=1),
            sharding: if random.random() { "zero1" } else { "none" },
            keep: random.random_range(1..=3),
        }
    }

    /// The recipe, with its checkpoints in `to`.
    fn recipe(self, name: &str, to: &Path) -> TinyRecipe {
        let (every, keep, to) = (BATCH * EVERY, self.keep, to.display());
        TinyRecipe {
            name: name.to_owned(),
            // The last step is a smaller one, and some tokens are left over.
            budget: BATCH * STEPS - 100,
            batch: BATCH,
            checkpoint: Some(format!(
                "{{ every_tokens: {every}, keep: {keep}, to: {to} }}"
            )),
            workers: (self.ranks, self.ranks),
            sharding: self.sharding,
            more: "seed: 3\n".to_owned(),
            ..TinyRecipe::default()
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape {
            ranks,
            workers,
            sharding,
            keep,
        } = self;
        write!(f, "{ranks} of {workers} workers, {sharding}, keep {keep}")
    }
}

/// What came of one run.
struct Outcome {
    shape: Shape,
    struck: Vec<Struck>,
    voided_steps: u64,
    took: Duration,
}

impl Outcome {
    fn kills(&self) -> usize {
        let kills = self.struck.iter().filter(|struck| struck.kind.kills());
        kills.count()
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (took, steps) = (self.took.as_secs_f64(), self.voided_steps);
        write!(
            f,
            "{took:.1} s, {}, {steps} voided steps: {}",
            self.shape,
            told(&self.struck)
        )
    }
}

fn told(struck: &[Struck]) -> String {
    let texts: Vec<&str> = struck.iter().map(|struck| struck.text.as_str()).collect();
    texts.join(", ")
}

/// Where runs are played, and what they are compared with.
struct Theatre<'a> {
    programs: &'a Programs,
    directory: &'a Path,
    fixture: Fixture,
    shim: Shim,
    /// By ranks and sharding, for those who have come to need one.
    truths: Mutex<BTreeMap<(u32, &'static str), Slot>>,
    blows: u32,
}

/// Whoever needs it first trains, and the others wait.
type Slot = Arc<Mutex<Option<Arc<Truth>>>>;

impl Theatre<'_> {
    /// Plays the run of a seed.
    fn play(&self, seed: u64) -> Result<Outcome> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let shape = Shape::draw(&mut random);
        let blows: Vec<Blow> = (0..self.blows).map(|_| Blow::draw(&mut random)).collect();
        let truth = self.truth(shape).while_doing("the undisturbed run")?;
        let name = format!("run-{seed}");
        let folder = self.directory.join(&name);
        let storage = Storage::create(&self.shim, &folder)?;
        let recipe = shape.recipe(&name, storage.directory());
        let path = recipe.write(&self.fixture)?;
        let (clock, workers) = (Instant::now(), shape.workers);
        let mut story = Story::begin(
            self.programs,
            &folder,
            &storage,
            workers,
            &path,
            &truth,
            random,
        )?;
        let played = story
            .play(&blows)
            .and_then(|()| check(&story, &recipe, &truth));
        let took = clock.elapsed();
        let (logs, struck) = (story.cluster().logs(), std::mem::take(&mut story.struck));
        drop(story);
        match played {
            Ok(voided_steps) => {
                std::fs::remove_dir_all(&folder)?;
                Ok(Outcome {
                    shape,
                    struck,
                    voided_steps,
                    took,
                })
            }
            Err(failure) => {
                let kept = side_by_side::keep(&folder, "checkpoint-kills", seed)?;
                Err(Failure::new(format!(
                    "FAILED: {failure}\n{logs}\n{shape}; blows: {}\neverything it left is in {}\n\
                     run it again with: scripts/prove checkpoint-kills --seed {seed}",
                    told(&struck),
                    kept.display()
                )))
            }
        }
    }

    /// What all runs with so many ranks and such a sharding come to.
    fn truth(&self, shape: Shape) -> Result<Arc<Truth>> {
        let mut slots = self.truths.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots
            .entry((shape.ranks, shape.sharding))
            .or_default()
            .clone();
        drop(slots);
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(truth) = slot.as_ref() {
            return Ok(truth.clone());
        }
        let truth = Arc::new(self.train_in_peace(shape)?);
        *slot = Some(truth.clone());
        Ok(truth)
    }

    /// Trains with a storage that is fast, and keeps every checkpoint.
    fn train_in_peace(&self, shape: Shape) -> Result<Truth> {
        let Shape {
            ranks, sharding, ..
        } = shape;
        let name = format!("quiet-{ranks}-{sharding}");
        let folder = self.directory.join(&name);
        let quiet = Shape {
            keep: 1000,
            ..shape
        };
        let recipe = quiet.recipe(&name, &folder.join("checkpoints"));
        let cluster = Cluster::with_workers(self.programs, &folder, ranks)?;
        let run = cluster.submit(&recipe.write(&self.fixture)?)?;
        cluster.wait_finished(&run, QUIET_LIMIT)?;
        kills::check(&cluster, &run, &recipe)?;
        let truth = Truth::default();
        for checkpoint in cluster.checkpoints(&run)? {
            truth.expect(checkpoint.step, Path::new(&checkpoint.path))?;
        }
        Ok(truth)
    }
}

/// Whether a run is what it should be once it has finished; how many of its steps were void.
fn check(story: &Story, recipe: &TinyRecipe, truth: &Truth) -> Result<u64> {
    let mut findings = Findings::default();
    for struck in &story.struck {
        findings.add(struck.findings.clone());
    }
    if !findings.is_empty() {
        return Err(Failure::new(format!("its checkpoints lie:\n{findings}")));
    }
    let (cluster, run) = (story.cluster(), story.run());
    kills::check(cluster, run, recipe)?;
    cluster
        .supra_json(&["audit", run, "--files"])
        .while_doing("auditing the files")?;
    truth.expect(recipe.steps(), &cluster.last_checkpoint(run)?)?;
    kills::voided(cluster, run)
}

fn rows(outcomes: &[Outcome]) -> Vec<Row> {
    let all = || outcomes.iter().flat_map(|outcome| &outcome.struck);
    let mut rows = Vec::new();
    for kind in Kind::ALL {
        let of_kind = |struck: &&Struck| struck.kind == kind;
        let struck: Vec<&Struck> = all().filter(of_kind).collect();
        let with = |outcome: &&Outcome| outcome.struck.iter().any(|struck| struck.kind == kind);
        let with: Vec<&Outcome> = outcomes.iter().filter(with).collect();
        if !struck.is_empty() {
            rows.push(row(kind.name(), &struck, &with));
        }
    }
    let runs: Vec<&Outcome> = outcomes.iter().collect();
    rows.push(row("all", &all().collect::<Vec<_>>(), &runs));
    rows
}

fn row(fault: &str, struck: &[&Struck], runs: &[&Outcome]) -> Row {
    let found = |of: fn(&Findings) -> usize| {
        struck
            .iter()
            .map(|struck| of(&struck.findings))
            .sum::<usize>()
    };
    let took: Duration = runs.iter().map(|run| run.took).sum();
    let voided: u64 = runs.iter().map(|run| run.voided_steps).sum();
    let mut row = Row::new()
        .with("fault", fault)
        .with("kills", struck.len())
        .with("wrong_reads", found(|findings| findings.wrong_reads.len()))
        .with("lost_good", found(|findings| findings.lost_good.len()));
    for phase in Phase::ALL {
        let there = struck.iter().filter(|struck| struck.phase == phase);
        row = row.with(phase.name(), there.count());
    }
    row.with("runs", runs.len())
        .with("voided_steps", voided)
        .with("seconds", rounded(took.as_secs_f64(), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_seeds_train_in_every_shape() {
        let shape = |seed| Shape::draw(&mut ChaCha8Rng::seed_from_u64(seed));
        let shapes: Vec<Shape> = (0..40).map(shape).collect();
        for ranks in [2, 3] {
            for sharding in ["none", "zero1"] {
                let alike = |shape: &&Shape| shape.ranks == ranks && shape.sharding == sharding;
                let times = shapes.iter().filter(alike).count();
                assert!(times >= 4, "{ranks} {sharding}: {times}");
            }
        }
    }
}
