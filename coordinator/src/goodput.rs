//! Where the wall time of a run went: a pure fold over facts, metrics, and what the run is seen doing.
//!
//! Kept in whole microseconds, so that the parts add up to the whole exactly and taking back what was voided leaves nothing
//! behind. The time of a training generation is spent by its steps as the ranks measured them; what they leave over is the
//! checkpoint that was written in between, or, when the generation ends, lost; what evaluations took is known from them. What is under way counts as productive until
//! it is known to be something else. Approximate are: the border between forming and restoring, which heartbeats tell; the
//! parts of a step, of which each is the slowest rank's; and what a coordinator that died had not noted yet, which is lost.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize, Serializer};
use supra_proto::v1::{self, StepMetrics};

use crate::ledger::Body;
use crate::machine::Fact;

#[cfg(test)]
mod tests;

/// Incidents that are listed: the newest.
const MAX_INCIDENTS: usize = 256;

/// What a run is seen doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Doing {
    /// Queued, stopped, or without enough workers.
    #[default]
    Idle,
    /// Between two generations, until all ranks are connected.
    Forming,
    /// The ranks load what they start from.
    Restoring,
    /// Steps are applied.
    Training,
}

/// Where the time went, microseconds. The words are those of [`v1::Goodput`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parts {
    productive: u64,
    data: u64,
    exposed_comm: u64,
    checkpoint: u64,
    restore: u64,
    lost: u64,
    forming: u64,
    idle: u64,
    /// Not in accounts that are older.
    #[serde(default)]
    evaluation: u64,
}

impl Parts {
    /// Where time goes while a run does this. Training is productive until more is known.
    fn during(&mut self, doing: Doing) -> &mut u64 {
        match doing {
            Doing::Idle => &mut self.idle,
            Doing::Forming => &mut self.forming,
            Doing::Restoring => &mut self.restore,
            Doing::Training => &mut self.productive,
        }
    }
}

impl From<Parts> for v1::Goodput {
    fn from(parts: Parts) -> v1::Goodput {
        v1::Goodput {
            productive: seconds(parts.productive),
            data: seconds(parts.data),
            exposed_comm: seconds(parts.exposed_comm),
            checkpoint: seconds(parts.checkpoint),
            restore: seconds(parts.restore),
            lost: seconds(parts.lost),
            forming: seconds(parts.forming),
            idle: seconds(parts.idle),
            evaluation: seconds(parts.evaluation),
        }
    }
}

/// [`v1::Goodput`] as JSON, with the share that has given the whole its name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Goodput {
    /// Productive part of the time in which the run was not idle, 0 to 1; `null` while there was none.
    pub share: Option<f64>,
    /// Seconds, as are all that follow.
    pub productive: f64,
    /// Waiting for data.
    pub data: f64,
    /// Waiting for other ranks.
    pub exposed_comm: f64,
    /// Standing still for a checkpoint.
    pub checkpoint: f64,
    /// Loading.
    pub restore: f64,
    /// Voided steps, and what was under way when a generation ended.
    pub lost: f64,
    /// Between two generations.
    pub forming: f64,
    /// Queued, stopped, or without enough workers.
    pub idle: f64,
    /// Standing still to be measured.
    pub evaluation: f64,
}

impl From<&v1::Goodput> for Goodput {
    fn from(parts: &v1::Goodput) -> Goodput {
        let v1::Goodput {
            productive,
            data,
            exposed_comm,
            checkpoint,
            restore,
            lost,
            forming,
            idle,
            evaluation,
        } = *parts;
        let working = productive + data + exposed_comm + checkpoint + evaluation;
        let busy = working + restore + lost + forming;
        Goodput {
            share: (busy > 0.0).then(|| productive / busy),
            productive,
            data,
            exposed_comm,
            checkpoint,
            restore,
            lost,
            forming,
            idle,
            evaluation,
        }
    }
}

/// The end of a generation before that of its run, or the absence of the coordinator of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Incident {
    /// Generation that it happened to.
    pub generation: u64,
    /// Why.
    pub cause: String,
    /// When that was known, or when the coordinator was last there, milliseconds since the Unix epoch.
    pub detected_unix_ms: u64,
    /// When steps could be applied again, milliseconds since the Unix epoch; `null` when that never came.
    pub training_unix_ms: Option<u64>,
    /// Seconds of computing that it cost: the voided steps and what was under way.
    pub lost_seconds: f64,
    /// Applied steps that it voided.
    pub voided_steps: u64,
}

/// What steps spent, microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Spent {
    steps: u64,
    productive: u64,
    data: u64,
    exposed_comm: u64,
}

impl Spent {
    /// What a step spent of the time that there is: never more.
    fn of(metrics: &StepMetrics, available: u64) -> Spent {
        let all = microseconds(metrics.seconds).min(available);
        let data = microseconds(metrics.data_seconds).min(all);
        let exposed_comm = microseconds(metrics.exposed_comm_ms / 1e3).min(all - data);
        Spent {
            steps: 1,
            productive: all - data - exposed_comm,
            data,
            exposed_comm,
        }
    }

    fn all(&self) -> u64 {
        self.productive + self.data + self.exposed_comm
    }

    fn add(&mut self, other: &Spent) {
        self.steps += other.steps;
        self.productive += other.productive;
        self.data += other.data;
        self.exposed_comm += other.exposed_comm;
    }
}

/// What the steps between two checkpoints spent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Durable {
    /// The later checkpoint, relative to the root of the run.
    path: String,
    spent: Spent,
}

/// The account of one run's time. Its JSON is what a coordinator that starts again goes on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Account {
    /// Up to when it is complete, milliseconds since the Unix epoch.
    at: u64,
    parts: Parts,
    doing: Doing,
    /// There is a generation that has not ended.
    alive: bool,
    /// Last sign of life of a coordinator before this one, while it is not known what became of the generation that lived
    /// then; milliseconds since the Unix epoch.
    #[serde(default)]
    away_since: Option<u64>,
    /// The run has ended: the account stands still.
    ended: bool,
    /// Time of the generation that no step has spent yet, microseconds; in no part yet.
    unspent: u64,
    /// A checkpoint was written since the last step.
    written: bool,
    /// What steps after the newest checkpoint spent: they may still be voided.
    #[serde(serialize_with = "merged")]
    open: BTreeMap<u64, Spent>,
    /// What the steps behind each checkpoint that may be started from spent, back to the one before, by its step: they are
    /// voided when it and all newer ones turn out to be damaged. Empty in accounts that are older.
    #[serde(default)]
    durable: BTreeMap<u64, Durable>,
    /// Incidents so far, and those of them since the run last trained.
    incidents: u64,
    waiting: usize,
    newest: VecDeque<Incident>,
}

impl Account {
    /// The account of a run that was submitted `at`, milliseconds since the Unix epoch.
    pub fn new(at: u64) -> Account {
        Account {
            at,
            parts: Parts::default(),
            doing: Doing::Idle,
            alive: false,
            away_since: None,
            ended: false,
            unspent: 0,
            written: false,
            open: BTreeMap::new(),
            durable: BTreeMap::new(),
            incidents: 0,
            waiting: 0,
            newest: VecDeque::new(),
        }
    }

    /// The account of a run whose coordinator died before it noted any: from when it was submitted nobody knows more than whether
    /// its last generation is `alive`.
    pub fn unnoted(submitted: u64, alive: bool) -> Account {
        Account {
            alive,
            ..Account::new(submitted)
        }
    }

    /// A coordinator has started again. If a generation lived when the account was noted, nobody knows whether it still does;
    /// the machine is going to say.
    pub fn resumed(&mut self, at: u64) {
        self.away_since = self.alive.then_some(self.at);
        self.doing = if self.alive {
            Doing::Training
        } else {
            Doing::Idle
        };
        self.pass(at);
    }

    /// The parts up to `at`. Those of an ended run stand still.
    pub fn parts(&self, at: u64) -> Parts {
        let mut parts = self.parts;
        parts.productive += self.unspent;
        if !self.ended {
            *parts.during(self.doing()) += between(self.at, at);
        }
        parts
    }

    /// Incidents so far, and the newest of them, oldest first.
    pub fn incidents(&self) -> (u64, impl Iterator<Item = &Incident>) {
        (self.incidents, self.newest.iter())
    }

    /// The run is seen doing this from `at` on.
    pub fn seen(&mut self, doing: Doing, at: u64) {
        self.pass(at);
        self.doing = doing;
        if self.doing() == Doing::Training {
            for incident in self.newest.iter_mut().rev().take(self.waiting) {
                incident.training_unix_ms = Some(self.at);
            }
            self.waiting = 0;
        }
    }

    /// A step was applied.
    pub fn measured(&mut self, metrics: &StepMetrics, at: u64) {
        self.pass(at);
        let spent = Spent::of(metrics, self.unspent);
        self.unspent -= spent.all();
        self.parts.productive += spent.productive;
        self.parts.data += spent.data;
        self.parts.exposed_comm += spent.exposed_comm;
        self.open.entry(metrics.step).or_default().add(&spent);
        if std::mem::take(&mut self.written) {
            self.parts.checkpoint += std::mem::take(&mut self.unspent);
        }
    }

    /// Training stood still for so many seconds to be measured.
    pub fn stood_still(&mut self, seconds: f64, at: u64) {
        self.pass(at);
        let spent = microseconds(seconds).min(self.unspent);
        self.unspent -= spent;
        self.parts.evaluation += spent;
    }

    /// Something was decided.
    pub fn decided(&mut self, fact: &Fact, at: u64) {
        match fact {
            Fact::Queued { .. } => {
                if std::mem::take(&mut self.ended) {
                    self.doing = Doing::Idle;
                }
                self.pass(at);
            }
            Fact::Formed { .. } => {
                self.pass(at);
                (self.alive, self.doing) = (true, Doing::Forming);
            }
            Fact::TakenUp { generation, .. } => self.taken_up(*generation, at),
            Fact::Broke {
                generation, cause, ..
            } => self.broke(*generation, cause, at),
            Fact::Recorded { record, .. } => {
                if let Body::Void { after_step, .. } = record.body {
                    self.voided(after_step);
                }
            }
            Fact::Written { checkpoint, .. } => {
                let later = self.open.split_off(&(checkpoint.step + 1));
                let behind = std::mem::replace(&mut self.open, later);
                let durable = self.durable.entry(checkpoint.step).or_default();
                durable.path.clone_from(&checkpoint.path);
                behind.values().for_each(|spent| durable.spent.add(spent));
                self.written = true;
            }
            Fact::Damaged { path, .. } | Fact::Retired { path, .. } => self.unusable(path),
            Fact::Ended { .. } => {
                self.pass(at);
                self.parts.checkpoint += std::mem::take(&mut self.unspent);
                (self.alive, self.ended, self.waiting) = (false, true, 0);
            }
            Fact::Submitted { .. }
            | Fact::Adopted { .. }
            | Fact::StopAsked { .. }
            | Fact::Logged { .. }
            | Fact::Gated { .. }
            | Fact::Published { .. }
            | Fact::Verified { .. }
            | Fact::Named { .. }
            | Fact::Deleted { .. }
            | Fact::PutAside { .. }
            | Fact::TakenBack { .. }
            | Fact::Trained { .. }
            | Fact::ChaosBegun { .. }
            | Fact::FaultOrdered { .. }
            | Fact::FaultSurvived { .. }
            | Fact::ChaosMarked { .. } => {}
        }
    }

    fn broke(&mut self, generation: u64, cause: &str, at: u64) {
        self.pass(at);
        let lost = std::mem::take(&mut self.unspent);
        self.parts.lost += lost;
        (self.alive, self.doing, self.written) = (false, Doing::Forming, false);
        self.away_since = None;
        self.incident(Incident {
            generation,
            cause: cause.to_owned(),
            detected_unix_ms: self.at,
            training_unix_ms: None,
            lost_seconds: seconds(lost),
            voided_steps: 0,
        });
        self.waiting += 1;
    }

    /// The coordinator was away and its generation trained on: nothing is lost, but it was an incident.
    fn taken_up(&mut self, generation: u64, at: u64) {
        self.pass(at);
        let since = self.away_since.take().unwrap_or(self.at);
        self.incident(Incident {
            generation,
            cause: "the coordinator was away; the workers trained on".to_owned(),
            detected_unix_ms: since,
            training_unix_ms: Some(self.at),
            lost_seconds: 0.0,
            voided_steps: 0,
        });
    }

    fn incident(&mut self, incident: Incident) {
        if self.newest.len() == MAX_INCIDENTS {
            self.newest.pop_front();
        }
        self.newest.push_back(incident);
        self.incidents += 1;
    }

    /// Nothing starts from a checkpoint any more: the steps behind it are voided with those after it, or not at all.
    fn unusable(&mut self, path: &str) {
        let named = |(_, durable): &(&u64, &Durable)| durable.path == path;
        let Some(step) = self.durable.iter().find(named).map(|(step, _)| *step) else {
            return;
        };
        let Durable { spent, .. } = self.durable.remove(&step).unwrap_or_default();
        match self.durable.range_mut(step..).next() {
            Some((_, newer)) => newer.spent.add(&spent),
            None => self.open.entry(step).or_default().add(&spent),
        }
    }

    fn voided(&mut self, after_step: u64) {
        let mut gone = Spent::default();
        for durable in self.durable.split_off(&(after_step + 1)).values() {
            gone.add(&durable.spent);
        }
        for spent in self.open.split_off(&(after_step + 1)).values() {
            gone.add(spent);
        }
        self.parts.productive -= gone.productive;
        self.parts.data -= gone.data;
        self.parts.exposed_comm -= gone.exposed_comm;
        self.parts.lost += gone.all();
        if let Some(incident) = self.newest.back_mut().filter(|_| self.waiting > 0) {
            incident.lost_seconds += seconds(gone.all());
            incident.voided_steps += gone.steps;
        }
    }

    /// Without a generation nothing loads or trains, whatever is still seen of the last one.
    fn doing(&self) -> Doing {
        match self.doing {
            Doing::Restoring | Doing::Training if !self.alive => Doing::Forming,
            doing => doing,
        }
    }

    /// Time has passed, up to `at`.
    fn pass(&mut self, at: u64) {
        if self.ended {
            return;
        }
        let spent = between(self.at, at);
        match self.doing() {
            Doing::Training => self.unspent += spent,
            doing => *self.parts.during(doing) += spent,
        }
        self.at = self.at.max(at);
    }
}

/// A note of the account holds open steps in one: a coordinator that starts again goes back to a checkpoint before all of
/// them, or to none.
fn merged<S: Serializer>(open: &BTreeMap<u64, Spent>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut sum = Spent::default();
    for spent in open.values() {
        sum.add(spent);
    }
    serializer.collect_map(open.last_key_value().map(|(step, _)| (step, sum)))
}

/// Microseconds between two moments in milliseconds; none when a clock went back.
fn between(before: u64, after: u64) -> u64 {
    after.saturating_sub(before).saturating_mul(1000)
}

/// What is not a number is no time.
fn microseconds(seconds: f64) -> u64 {
    (seconds * 1e6) as u64
}

fn seconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1e6
}
