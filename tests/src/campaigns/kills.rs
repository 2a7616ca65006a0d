//! `kill -9` of a worker, of the coordinator, of everything, at random moments.
//!
//! Run after run of the same recipe is trained while things die. Each must end exactly on its budget,
//! with a ledger in which every sample stands once, and with the very bits of a run that was left alone.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use supra_proto::v1::RunState;

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::ledger;
use crate::programs::Programs;
use crate::report::{Row, rounded};
use crate::weights;

use super::victim::Victim;

/// What the report says above its table.
pub const ABOUT: &str = "Two workers train the same recipe again and again while processes are killed with SIGKILL at random \
    moments: the computing process of a worker, its supervisor, the coordinator, or everything at once. Every run of the \
    table ended exactly on its budget, `supra audit` agreed, every sample stands in its ledger exactly once, and its final \
    weights and optimizer state are bit-identical to those of a run that nobody disturbed. `voided_steps` were trained again.";

/// How many kills, how large the runs, which moments.
#[derive(Clone, Copy, Debug)]
pub struct Kills {
    /// Kills in all.
    pub kills: u32,
    /// Steps of each run.
    pub steps: u64,
    /// Longest time from one kill to the next.
    pub pause: Duration,
    /// Seed of victims and moments.
    pub seed: u64,
}

const WORKERS: u32 = 2;
const BATCH: u64 = 512;
/// For the run that nobody disturbs.
const QUIET_LIMIT: Duration = Duration::from_secs(300);
/// From the last kill to the end of the run.
const RECOVERY_LIMIT: Duration = Duration::from_secs(300);

impl Kills {
    /// Runs the campaign.
    ///
    /// # Errors
    /// At the first run that loses, repeats or changes anything.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let fixture = Fixture::create(programs, directory)?;
        let recipe = TinyRecipe {
            name: "kills".to_owned(),
            // The last step is a smaller one, and some tokens are left over.
            budget: BATCH * self.steps - 100,
            batch: BATCH,
            checkpoint_every: BATCH * 20,
            workers: (WORKERS, WORKERS),
            repeat: true,
            more: "seed: 3\n".to_owned(),
            ..TinyRecipe::default()
        };
        let path = recipe.write(&fixture)?;
        let mut cluster = Cluster::with_workers(programs, &directory.join("cluster"), WORKERS)?;

        let quiet = cluster.submit(&path)?;
        cluster
            .wait_finished(&quiet, QUIET_LIMIT)
            .while_doing("the undisturbed run")?;
        check(&cluster, &quiet, &recipe)?;
        let expected = cluster.last_checkpoint(&quiet)?;

        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut rows = Vec::new();
        let mut left = self.kills;
        while left > 0 {
            let run = cluster.submit(&path)?;
            let clock = Instant::now();
            let killed = self.disturb(&mut cluster, &run, &mut left, &mut random)?;
            let end = cluster.wait_finished(&run, RECOVERY_LIMIT);
            let end = end.while_doing(format_args!("after kills of {killed:?}"))?;
            check(&cluster, &run, &recipe)?;
            weights::expect_same(&expected, &cluster.last_checkpoint(&run)?)?;
            rows.push(
                Row::new()
                    .with("run", rows.len() + 1)
                    .with("kills", killed.len())
                    .with("generations", end.generation)
                    .with("steps", end.step)
                    .with("voided_steps", voided(&cluster, &run)?)
                    .with("tokens", end.tokens)
                    .with("seconds", rounded(clock.elapsed().as_secs_f64(), 1))
                    .with("victims", killed.join(", ")),
            );
        }
        Ok(rows)
    }

    /// Kills until the run has ended or no kills are left; says whom, in order.
    fn disturb(
        &self,
        cluster: &mut Cluster,
        run: &str,
        left: &mut u32,
        random: &mut ChaCha8Rng,
    ) -> Result<Vec<String>> {
        let mut killed = Vec::new();
        while *left > 0 {
            sleep(self.pause.mul_f64(random.random()));
            let status = cluster.status(run)?;
            if status.state() == RunState::Finished {
                break;
            }
            let victim = match random.random_range(0..6) {
                0 | 1 => Victim::Compute(random.random_range(0..WORKERS)),
                2 => Victim::Supervisor(random.random_range(0..WORKERS)),
                3 | 4 => Victim::Coordinator,
                _ => Victim::Everything,
            };
            victim.kill(cluster)?;
            victim.restart(cluster)?;
            killed.push(format!("{victim} at step {}", status.step));
            *left -= 1;
        }
        Ok(killed)
    }
}

/// Budget, audit and ledger of a finished run.
pub(super) fn check(cluster: &Cluster, run: &str, recipe: &TinyRecipe) -> Result<()> {
    let status = cluster.status(run)?;
    if status.tokens != recipe.tokens() || status.step != recipe.steps() {
        return Err(Failure::new(format!(
            "run {run} ended after {} tokens and {} steps instead of {} and {}",
            status.tokens,
            status.step,
            recipe.tokens(),
            recipe.steps(),
        )));
    }
    cluster
        .audit(run)
        .while_doing(format_args!("auditing {run}"))?;
    ledger::expect_exactly_once(&cluster.ledger(run)?, recipe.samples())
}

/// Steps that were applied and taken back.
pub(super) fn voided(cluster: &Cluster, run: &str) -> Result<u64> {
    let verdict = cluster.audit(run)?;
    let voided = verdict["voided_steps"].as_u64();
    voided.ok_or_else(|| Failure::new(format!("audit --json has no `voided_steps`: {verdict}")))
}
