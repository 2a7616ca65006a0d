//! From `kill -9` of a worker to training again: how long it takes, and what takes so long.
//!
//! One run is killed at again and again. What the coordinator's log says of a death, with the times of its clock, is this
//! machine's clock too, and cuts the time into parts: noticing the death, everybody leaving and another member coming, loading
//! the state, and its first step. Steps that are trained again are not part of it.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use supra_proto::v1::LogEntry;

use crate::cluster::{Cluster, Device};
use crate::failure::{Failure, Result};
use crate::fixture::{Fixture, TinyRecipe};
use crate::process::POLL;
use crate::programs::Programs;
use crate::report::{Row, rounded, table};

/// What the report says above its table.
pub const ABOUT: &str = "A worker of a run, its supervisor included, is killed with SIGKILL, again and again, and another one started at once. Seconds \
    from the kill to the end of the next generation's first step, so without the time of steps that are trained again: medians, \
    and `p90_s`. `detect_s`: until the coordinator knows; `form_s`: until the next generation has its members; \
    `restore_s`: until all of them have the state; `step_s`: until the first step is applied. With `spares` a further worker \
    waits, idle, and takes the place at once. `voided` are steps of all kills that had to be trained again.";

/// Between two kills, so that each meets a generation that trains.
const STEPS_BETWEEN: u64 = 30;
const LIMIT: Duration = Duration::from_secs(120);

/// The campaign.
#[derive(Clone, Copy, Debug)]
pub struct Recovery {
    /// Kills per row.
    pub kills: usize,
    /// Members of a generation.
    pub ranks: u32,
    /// Where they compute.
    pub device: Device,
    /// The median that may not be exceeded, seconds.
    pub limit_s: f64,
}

/// One death, seconds.
#[derive(Clone, Copy, Debug)]
struct Incident {
    detect: f64,
    form: f64,
    restore: f64,
    step: f64,
}

impl Incident {
    fn total(&self) -> f64 {
        self.detect + self.form + self.restore + self.step
    }
}

impl Recovery {
    /// Kills without a spare worker, then with one.
    ///
    /// # Errors
    /// When a run does not go on, its ledger does not agree, or the median is above the limit.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let fixture = Fixture::create(programs, directory)?;
        [0, 1]
            .into_iter()
            .map(|spares| self.row(programs, directory, &fixture, spares))
            .collect()
    }

    fn row(
        &self,
        programs: &Programs,
        directory: &Path,
        fixture: &Fixture,
        spares: u32,
    ) -> Result<Row> {
        let recipe = TinyRecipe {
            name: format!("recovery-{spares}"),
            budget: 1_000_000_000,
            workers: (self.ranks, self.ranks),
            checkpoint_every: 51_200,
            repeat: true,
            more: match self.device {
                Device::Cpu => String::new(),
                Device::Cuda => "reduction: nccl\n".to_owned(),
            },
            ..TinyRecipe::default()
        };
        let state = directory.join(format!("spares-{spares}"));
        let mut cluster = Cluster::on(self.device, programs, &state, self.ranks + spares)?;
        let run = cluster.submit(&recipe.write(fixture)?)?;
        let mut incidents = Vec::new();
        for number in 0..self.kills {
            let start = cluster.status(&run)?.step;
            cluster.wait_attached((self.ranks + spares) as usize, LIMIT)?;
            cluster.wait(&run, "training", LIMIT, |status| {
                status.step >= start + STEPS_BETWEEN
            })?;
            incidents.push(self.kill(&mut cluster, &run, number, spares)?);
        }
        let audit = cluster.audit(&run)?;
        let voided = audit["voided_steps"].as_u64().unwrap_or_default();
        self.report(spares, voided, &incidents)
    }

    /// Kills a member and waits until the next generation has applied a step.
    fn kill(
        &self,
        cluster: &mut Cluster,
        run: &str,
        number: usize,
        spares: u32,
    ) -> Result<Incident> {
        let before = cluster.status(run)?.generation;
        let members: Vec<String> = cluster
            .attached()?
            .into_iter()
            .filter(|(_, phase)| phase == "training" || phase == "checkpointing")
            .map(|(name, _)| name)
            .collect();
        let victim = members
            .get(number % members.len().max(1))
            .ok_or_else(|| Failure::new("nobody trains"))?;
        let place = victim.trim_start_matches('w').parse()?;
        let killed = now_ms();
        cluster.remove_worker(victim)?;
        // Another one in its place, as a scheduler starts it. (A supervisor takes its time before it starts a child again.)
        cluster.start_worker_on(self.device, place, self.ranks + spares)?;

        let deadline = Instant::now() + LIMIT;
        let log = loop {
            let log = cluster.log_entries(run)?;
            if log
                .iter()
                .any(|entry| entry.unix_ms >= killed && says(entry, "trains with"))
            {
                break log;
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!(
                    "no generation after {before} trains\n{}",
                    cluster.logs()
                )));
            }
            sleep(POLL);
        };
        let when = |what: &str| {
            let found = log
                .iter()
                .find(|entry| entry.unix_ms >= killed && says(entry, what));
            found.ok_or_else(|| {
                Failure::new(format!("the log does not say when {what:?}: {log:#?}"))
            })
        };
        let forms = when("forms from step")?;
        let from = forms.text.split("from step ").nth(1);
        let from = from.and_then(|rest| rest.split([',', ':']).next()?.parse::<u64>().ok());
        let from = from.ok_or_else(|| Failure::new(format!("no step in {:?}", forms.text)))?;
        cluster.wait(run, "training again", LIMIT, |status| {
            status.generation > before && status.step > from
        })?;
        let stepped = now_ms();
        let (gone, formed, trains) = (
            when("is gone")?.unix_ms,
            forms.unix_ms,
            when("trains with")?.unix_ms,
        );
        Ok(Incident {
            detect: seconds(killed, gone),
            form: seconds(gone, formed),
            restore: seconds(formed, trains),
            step: seconds(trains, stepped),
        })
    }

    fn report(&self, spares: u32, voided: u64, incidents: &[Incident]) -> Result<Row> {
        let of = |what: fn(&Incident) -> f64, share: f64| {
            let mut all: Vec<f64> = incidents.iter().map(what).collect();
            all.sort_by(f64::total_cmp);
            let place = ((all.len() as f64 * share) as usize).min(all.len().saturating_sub(1));
            rounded(all.get(place).copied().unwrap_or(f64::NAN), 3)
        };
        let median = of(Incident::total, 0.5);
        let row = Row::new()
            .with(
                "backend",
                match self.device {
                    Device::Cpu => "cpu",
                    Device::Cuda => "nccl",
                },
            )
            .with("ranks", self.ranks)
            .with("spares", spares)
            .with("kills", incidents.len())
            .with("median_s", median)
            .with("p90_s", of(Incident::total, 0.9))
            .with("detect_s", of(|incident| incident.detect, 0.5))
            .with("form_s", of(|incident| incident.form, 0.5))
            .with("restore_s", of(|incident| incident.restore, 0.5))
            .with("step_s", of(|incident| incident.step, 0.5))
            .with("voided", voided);
        if median.is_nan() || median > self.limit_s {
            return Err(Failure::new(format!(
                "{} s are allowed\n{}",
                self.limit_s,
                table(&[row])
            )));
        }
        Ok(row)
    }
}

fn says(entry: &LogEntry, what: &str) -> bool {
    entry.source == "coordinator" && entry.text.contains(what)
}

fn now_ms() -> u64 {
    u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default()
}

fn seconds(from_ms: u64, to_ms: u64) -> f64 {
    to_ms.saturating_sub(from_ms) as f64 / 1e3
}
