//! A run whose checkpoints are hunted: each blow falls while one is written, and the operator tidies up.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use supra_proto::v1::RunState;

use super::blow::{Blow, Kind};
use super::phase::{Eye, Origin, Phase};
use super::storage::{Mood, Storage};
use super::witness::{Findings, Truth, Witness};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::process::notify;
use crate::programs::Programs;

/// From one blow to the next, and from the last to the end of the run.
const LIMIT: Duration = Duration::from_secs(180);

/// When this long no checkpoint was met in the wanted phase, any other will do.
const CHOOSY: Duration = Duration::from_secs(6);

/// How often the hunter looks.
const LOOK: Duration = Duration::from_millis(1);

/// How often the operator looks.
const TEND: Duration = Duration::from_millis(400);

/// Blows that may fall at the same step. A run gives up when three generations in a row fail at the same one.
const AT_A_STEP: u32 = 2;

/// A blow that fell.
#[derive(Clone, Debug)]
pub(super) struct Struck {
    pub kind: Kind,
    pub phase: Phase,
    pub findings: Findings,
    /// For people.
    pub text: String,
}

/// A run, its cluster and its storage.
pub(super) struct Story<'a> {
    cluster: Cluster,
    storage: &'a Storage,
    run: String,
    eye: Eye,
    witness: Witness<'a>,
    random: ChaCha8Rng,
    /// Generation of which the ranks are known, and its workers' numbers by rank.
    ranks: (u64, Vec<u32>),
    /// Where the last blow fell, and how many fell at this step.
    last: Option<(Origin, u32)>,
    /// The last blow was one that may fail a run.
    excused: bool,
    tended: Instant,
    /// All blows so far.
    pub struck: Vec<Struck>,
}

impl<'a> Story<'a> {
    /// Starts a coordinator and so many workers, which may write to `storage`, and submits the recipe.
    pub fn begin(
        programs: &Programs,
        folder: &Path,
        storage: &'a Storage,
        workers: u32,
        recipe: &Path,
        truth: &'a Truth,
        random: ChaCha8Rng,
    ) -> Result<Self> {
        let programs = storage.happens_to(programs);
        let cluster = Cluster::with_workers(&programs, folder, workers)?;
        let run = cluster.submit(recipe)?;
        let root = storage.directory().join(&run);
        Ok(Self {
            eye: Eye::new(root, cluster.state(), &run),
            cluster,
            storage,
            run,
            witness: Witness::new(truth),
            random,
            ranks: (0, Vec::new()),
            last: None,
            excused: false,
            tended: Instant::now(),
            struck: Vec::new(),
        })
    }

    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub fn run(&self) -> &str {
        &self.run
    }

    /// Lets the blows fall, or fewer if the run ends before, and the run come to its end.
    pub fn play(&mut self, blows: &[Blow]) -> Result<()> {
        self.storage.set(Mood::Slow)?;
        // Every phase has its turn: one round at its beginning, the next a little later.
        let first = self.random.random_range(0..Phase::ALL.len());
        for (number, blow) in blows.iter().enumerate() {
            let wanted = Phase::ALL[(first + number) % Phase::ALL.len()];
            let late = number / Phase::ALL.len() % 2 == 1;
            let Some((origin, phase)) = self.hunt(wanted, late)? else {
                break;
            };
            let Origin { step, generation } = origin;
            let phase_name = phase.name();
            let text = format!("{blow} at step {step} of generation {generation} ({phase_name})");
            let findings = self.strike(blow).while_doing(&text)?;
            self.struck.push(Struck {
                kind: blow.kind,
                phase,
                findings,
                text,
            });
            let before = self.last.filter(|(last, _)| last.step == step);
            let times = match before {
                // One that lasts may have failed several generations.
                _ if !blow.kind.kills() => AT_A_STEP,
                Some((_, times)) => times + 1,
                None => 1,
            };
            self.last = Some((origin, times));
            self.excused = !blow.kind.kills();
        }
        self.storage.set(Mood::Fast)?;
        self.end()
    }

    /// Waits for a checkpoint in such a phase, and then for a moment longer if it is to be `late`; says what it is in then. None:
    /// the run has finished.
    fn hunt(&mut self, wanted: Phase, late: bool) -> Result<Option<(Origin, Phase)>> {
        let clock = Instant::now();
        while clock.elapsed() < LIMIT {
            if self.tended.elapsed() >= TEND && self.tend()? {
                return Ok(None);
            }
            if let Some((origin, phase)) = self.game()? {
                if self.ranks.0 != origin.generation || self.ranks.1.is_empty() {
                    self.ranks = (origin.generation, self.cluster.ranks(&self.run)?);
                }
                let chosen = phase == wanted || clock.elapsed() > CHOOSY;
                // Between two generations nobody has a rank.
                if chosen && !self.ranks.1.is_empty() {
                    if !late {
                        return Ok(Some((origin, phase)));
                    }
                    sleep(moment(phase).mul_f64(self.random.random()));
                    let now = self.game()?;
                    if now.is_some() {
                        return Ok(now);
                    }
                }
            }
            sleep(LOOK);
        }
        self.overdue("no checkpoint is written")
    }

    /// The newest checkpoint, if something happens to it and no blow has met it yet.
    fn game(&self) -> Result<Option<(Origin, Phase)>> {
        let is_new = |origin: Origin| {
            self.last.is_none_or(|(last, times)| {
                origin > last && (origin.step != last.step || times < AT_A_STEP)
            })
        };
        Ok(self.eye.look()?.filter(|(origin, _)| is_new(*origin)))
    }

    fn overdue<T>(&self, what: &str) -> Result<T> {
        let status = self.cluster.status(&self.run)?;
        Err(Failure::new(format!(
            "{what} within {LIMIT:?}: {status:#?}"
        )))
    }

    /// Strikes, lets the witness read what is left, and starts again what does not start by itself.
    fn strike(&mut self, blow: &Blow) -> Result<Findings> {
        let victim = blow.victim(&self.ranks.1);
        let stopped = match (blow.kind, self.ranks.1.first()) {
            (Kind::WriterStopped, Some(writer)) => {
                let writer = self.cluster.worker(&format!("w{writer}"))?;
                writer.signal_children(Signal::SIGSTOP)
            }
            _ => Vec::new(),
        };
        if let Some(mood) = blow.mood() {
            self.storage.set(mood)?;
        }
        if !blow.kind.kills() {
            sleep(blow.lasts);
        }
        if let Some(victim) = victim {
            victim.kill(&mut self.cluster)?;
        }
        self.storage.set(Mood::Slow)?;
        for process in stopped {
            notify(process, Signal::SIGCONT);
        }
        let findings = self.witness.examine(&self.eye)?;
        if let Some(victim) = victim {
            victim.restart(&mut self.cluster)?;
        }
        Ok(findings)
    }

    /// What an operator does between two looks; whether the run has finished.
    fn tend(&mut self) -> Result<bool> {
        let status = self.cluster.status(&self.run)?;
        match status.state() {
            RunState::Finished => return Ok(true),
            RunState::Failed if self.excused => {
                self.cluster.supra(&["resume", &self.run])?.expect_code(0)?;
            }
            RunState::Failed | RunState::Cancelled => {
                return Err(Failure::new(format!("it failed: {}", status.reason)));
            }
            _ => {}
        }
        for name in self.cluster.aside()? {
            self.cluster.remove_worker(&name)?;
            self.cluster.start_worker(&name)?;
        }
        for name in self.cluster.worker_names() {
            if self.cluster.worker(&name)?.ended()?.is_some() {
                self.cluster.start_worker(&name)?;
            }
        }
        self.tended = Instant::now();
        Ok(false)
    }

    /// Waits until the run has finished, and reads its checkpoints once more.
    fn end(&mut self) -> Result<()> {
        let clock = Instant::now();
        while !self.tend()? {
            if clock.elapsed() > LIMIT {
                return self.overdue("not finished");
            }
            sleep(TEND);
        }
        let findings = self.witness.examine(&self.eye)?;
        if let Some(last) = self.struck.last_mut() {
            last.findings.add(findings);
        }
        Ok(())
    }
}

/// About how long a phase takes.
fn moment(phase: Phase) -> Duration {
    Duration::from_millis(match phase {
        Phase::Files => 250,
        Phase::Retired => 100,
        _ => 10,
    })
}
