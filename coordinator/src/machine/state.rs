//! What the coordinator must never forget: the state that replaying the journal's facts rebuilds.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::fact::{Fact, Outcome};
use super::verify::Logged;
use crate::chaos::Ordeal;
use crate::gates::Gates;
use crate::interval::Experience;
use crate::ledger::{Body, Evaluation, Hash, Open, Tail, hex32};

/// Number of a run in the order of submission, from 1. Short, since every ledger row carries it.
pub type RunNumber = u32;

/// All runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Run n is at place n - 1.
    runs: Vec<Run>,
    /// Runs that wait or train, in order; the first is the one that trains.
    pub queue: VecDeque<RunNumber>,
    /// Workers that no generation takes, by name.
    #[serde(default)]
    pub aside: BTreeMap<String, Aside>,
}

/// A worker that no generation takes: a user has drained it, or it broke too many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aside {
    /// Of its supervisor: another one is a new chance.
    pub instance: String,
    /// Why, in one line.
    pub reason: String,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Number in the journal.
    pub number: RunNumber,
    /// Name for people: recipe name, time and a random part.
    pub id: String,
    /// The recipe's name.
    pub name: String,
    /// The resolved recipe as YAML.
    pub recipe: String,
    /// Directory of the checkpoints, absolute, or their URL.
    pub checkpoint_root: PathBuf,
    /// Published checkpoints that are kept.
    pub keep: u32,
    /// Of each multiple of so many tokens, the first checkpoint at or after it is kept, too; 0 = of none.
    #[serde(default)]
    pub keep_every: u64,
    /// A damaged checkpoint stops the run, instead of having it start from an older one.
    #[serde(default)]
    pub strict: bool,
    /// Tokens of the whole samples of the budget.
    pub budget_tokens: u64,
    /// Workers that a generation needs, and may have.
    pub workers: Workers,
    /// Where it stands.
    pub phase: RunPhase,
    /// Why it is there; empty when there is nothing to say.
    pub reason: String,
    /// Why it is to stop, once that was asked.
    pub stop: Option<String>,
    /// Last generation, and the names of its members in rank order.
    pub generation: u64,
    /// Members of the last generation, in rank order.
    pub members: Vec<String>,
    /// Step that the last generation started from.
    #[serde(default)]
    pub from_step: u64,
    /// The last generation has not ended yet.
    pub alive: bool,
    /// Consecutive failed generations, and the step at which they failed.
    pub failures: Failures,
    /// End of the ledger's chain.
    pub ledger: Tail,
    /// The ledger's opening, once the data is known.
    pub open: Option<Open>,
    /// What it was adopted from; none when it was submitted here.
    #[serde(default)]
    pub adopted: Option<Adopted>,
    /// Last applied step.
    pub step: u64,
    /// Oldest generation whose state behind `step` is the one that the ledger accounts for: what older ones left in the
    /// memory of workers was voided and trained again, or may have been.
    pub lineage: u64,
    /// Which generation trained the steps that stand: the first step and the generation, in order, from the newest durable
    /// step on.
    #[serde(default)]
    pub trained: Vec<(u64, u64)>,
    /// Last step that the ledger calls durable.
    pub durable: u64,
    /// The ledger is closed.
    pub closed: bool,
    /// Applied steps whose update was skipped.
    pub skipped: BTreeSet<u64>,
    /// Held-out losses of states behind steps that stand, ascending.
    #[serde(default)]
    pub evaluations: Vec<Evaluation>,
    /// Linearisation gates of the newest state that they were measured of.
    #[serde(default)]
    pub gates: Option<Gates>,
    /// What the first steps after the newest checkpoint came to, ascending. Those after `step` are void, and are compared
    /// when they are trained again.
    #[serde(default)]
    pub logged: Vec<Logged>,
    /// What has to be the same for another generation to give the same bits as the last one.
    #[serde(default, with = "hex32")]
    pub circumstances: Hash,
    /// All steps after the newest checkpoint were trained in them.
    #[serde(default)]
    pub uniform: bool,
    /// Journalled checkpoints that may be started from, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Checkpoints that were found damaged and not deleted since, as they were found.
    #[serde(default)]
    pub damaged: Vec<Damaged>,
    /// It has failed since a checkpoint is damaged and it is strict.
    #[serde(default)]
    pub broken: bool,
    /// Retired checkpoints whose directories may still exist, relative to the root.
    pub doomed: Vec<String>,
    /// What its failures and checkpoints have cost so far.
    pub experience: Experience,
    /// Faults that it inflicts on its workers; none without `chaos`, or before it trains.
    pub chaos: Option<Ordeal>,
    /// Milliseconds since the Unix epoch.
    pub submitted_unix_ms: u64,
    /// Milliseconds since the Unix epoch; 0 while it has not ended.
    pub ended_unix_ms: u64,
}

/// The checkpoint that a run was adopted from. Nobody but its manifest vouches for that manifest, so ranks that start from it
/// have to come to the state that it states.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// Directory, relative to the run's checkpoint root.
    pub path: String,
    /// Hash of its state, as ranks state it when they have formed.
    #[serde(with = "hex32")]
    pub replica_hash: Hash,
}

/// How many workers train together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workers {
    /// A generation forms with no fewer.
    pub min: u32,
    /// Nor with more.
    pub max: u32,
    /// Quiet time before a generation forms while more workers could join.
    #[serde(default = "Workers::default_grace")]
    pub grace: Duration,
}

impl Workers {
    /// Of journals that are older than the key.
    fn default_grace() -> Duration {
        Duration::from_secs(1)
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunPhase {
    /// In the queue: waiting for its turn or for workers, or between two generations, or training.
    Queued,
    /// Stopped on request; resumable.
    Cancelled,
    /// The budget is spent.
    Finished,
    /// Gave up; resumable once the cause is gone.
    Failed,
}

/// Failed generations in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// Last applied step when they failed.
    pub step: u64,
    /// How many.
    pub count: u32,
}

/// A checkpoint whose manifest hash is journalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Step whose state it holds.
    pub step: u64,
    /// Tokens trained up to there.
    pub tokens: u64,
    /// Generation that wrote it.
    pub generation: u64,
    /// Directory, relative to the run's checkpoint root.
    pub path: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// BLAKE3 of its manifest.
    #[serde(with = "crate::ledger::hex32")]
    pub manifest_hash: Hash,
    /// Its manifest has its final name.
    pub published: bool,
    /// Workers of the generation that wrote it; 0 in journals that are older than this field, as is the next one.
    #[serde(default)]
    pub world: u32,
    /// When it was journalled, milliseconds since the Unix epoch.
    #[serde(default)]
    pub at: u64,
    /// Since it was published, all of it was read again and is what was written.
    #[serde(default)]
    pub verified: bool,
    /// Under which a user has it kept; empty = none.
    #[serde(default)]
    pub name: String,
}

/// A checkpoint that nothing starts from any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damaged {
    /// What was journalled.
    pub checkpoint: Checkpoint,
    /// File and cause, in one line.
    pub problem: String,
}

impl State {
    /// All runs, oldest first.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Run `number`; none if there is no such run.
    pub fn run(&self, number: RunNumber) -> Option<&Run> {
        self.runs.get((number as usize).checked_sub(1)?)
    }

    fn run_mut(&mut self, number: RunNumber) -> Option<&mut Run> {
        self.runs.get_mut((number as usize).checked_sub(1)?)
    }

    /// The number that the next run gets.
    pub fn next_number(&self) -> RunNumber {
        self.runs.len() as RunNumber + 1
    }

    /// Applies a decided fact. Decides nothing: the same facts give the same state in every build.
    pub fn apply(&mut self, fact: &Fact) {
        if let Fact::Submitted { .. } = fact {
            return self.submit(fact);
        }
        let number = fact.run();
        match fact {
            Fact::Queued { .. } => self.queue.push_back(number),
            Fact::Ended { .. } => self.queue.retain(|queued| *queued != number),
            Fact::PutAside {
                worker,
                instance,
                reason,
                ..
            } => {
                let (instance, reason) = (instance.clone(), reason.clone());
                self.aside
                    .insert(worker.clone(), Aside { instance, reason });
            }
            Fact::TakenBack { worker, .. } => drop(self.aside.remove(worker)),
            _ => {}
        }
        if let Some(run) = self.run_mut(number) {
            run.apply(fact);
        }
    }

    fn submit(&mut self, fact: &Fact) {
        let Fact::Submitted {
            run,
            id,
            name,
            recipe,
            checkpoint_root,
            keep,
            keep_every,
            strict,
            budget_tokens,
            workers,
            at,
        } = fact
        else {
            return;
        };
        self.runs.push(Run {
            number: *run,
            id: id.clone(),
            name: name.clone(),
            recipe: recipe.clone(),
            checkpoint_root: checkpoint_root.clone(),
            keep: *keep,
            keep_every: *keep_every,
            strict: *strict,
            budget_tokens: *budget_tokens,
            workers: *workers,
            phase: RunPhase::Queued,
            reason: String::new(),
            stop: None,
            generation: 0,
            members: Vec::new(),
            from_step: 0,
            alive: false,
            failures: Failures::default(),
            ledger: Tail::default(),
            open: None,
            adopted: None,
            step: 0,
            lineage: 0,
            trained: Vec::new(),
            durable: 0,
            closed: false,
            skipped: BTreeSet::new(),
            evaluations: Vec::new(),
            gates: None,
            logged: Vec::new(),
            circumstances: Hash::default(),
            uniform: false,
            checkpoints: Vec::new(),
            damaged: Vec::new(),
            broken: false,
            doomed: Vec::new(),
            experience: Experience::default(),
            chaos: None,
            submitted_unix_ms: *at,
            ended_unix_ms: 0,
        });
        self.queue.push_back(*run);
    }
}

impl Run {
    /// The newest checkpoint: where a new generation begins when no worker holds a newer state.
    pub fn recovery(&self) -> Option<&Checkpoint> {
        self.checkpoints.last()
    }

    /// The step of the newest checkpoint; 0 = the base.
    pub fn recovery_step(&self) -> u64 {
        self.recovery().map_or(0, |checkpoint| checkpoint.step)
    }

    /// Tokens of the applied steps.
    pub fn tokens(&self) -> u64 {
        self.open
            .as_ref()
            .map_or(0, |open| open.tokens_after(self.step))
    }

    /// The generation that trained a step which stands; none when that is long ago.
    pub fn trained_by(&self, step: u64) -> Option<u64> {
        let newest = self.trained.iter().rev();
        let mut since = newest.skip_while(|(first, _)| *first > step);
        since.next().map(|(_, generation)| *generation)
    }

    /// It has stopped, in one way or another.
    pub fn ended(&self) -> bool {
        self.phase != RunPhase::Queued
    }

    fn apply(&mut self, fact: &Fact) {
        match fact {
            Fact::Submitted { .. }
            | Fact::TakenUp { .. }
            | Fact::PutAside { .. }
            | Fact::TakenBack { .. } => {}
            Fact::Adopted {
                path,
                replica_hash,
                generation,
                ..
            } => {
                self.generation = *generation;
                self.adopted = Some(Adopted {
                    path: path.clone(),
                    replica_hash: *replica_hash,
                });
                // What workers of the old coordinator hold, the ledger does not account for.
                self.lineage = generation.saturating_add(1);
                // Records of voids are there, and how long was trained between them is not.
                self.experience = Experience::default();
            }
            Fact::Queued { strict, .. } => {
                (self.strict, self.broken) = (*strict, false);
                self.phase = RunPhase::Queued;
                self.reason.clear();
                self.stop = None;
                self.failures = Failures::default();
                self.ended_unix_ms = 0;
                if let Some(chaos) = &mut self.chaos {
                    chaos.mark = None;
                }
                // Whoever resumes a run means its checkpoint, not what was in memory when it failed.
                self.lineage = self.generation.saturating_add(1);
            }
            Fact::StopAsked { reason, .. } => self.stop = Some(reason.clone()),
            Fact::Formed {
                generation,
                members,
                from_step,
                circumstances,
                ..
            } => {
                self.generation = *generation;
                self.from_step = *from_step;
                let others_before = *from_step > self.recovery_step()
                    && !(self.uniform && self.circumstances == *circumstances);
                self.uniform = !others_before;
                self.circumstances = *circumstances;
                self.members.clone_from(members);
                self.alive = true;
            }
            Fact::Broke {
                step,
                counts,
                cause,
                ..
            } => self.broke(*step, *counts, cause),
            Fact::Recorded { record, .. } => {
                self.ledger.advance(record);
                self.record(&record.body);
            }
            Fact::Logged { result, .. } => {
                self.logged.retain(|known| known.step < result.step);
                self.logged.push(result.clone());
            }
            Fact::Gated { gates, .. } => self.gates = Some(gates.clone()),
            Fact::Written { checkpoint, .. } => {
                self.logged.retain(|known| known.step > checkpoint.step);
                self.uniform = true;
                self.checkpoints
                    .retain(|known| known.path != checkpoint.path);
                self.checkpoints.push(checkpoint.clone());
            }
            Fact::Published { path, .. } => self.change(path, |known| known.published = true),
            Fact::Verified { path, .. } => self.change(path, |known| known.verified = true),
            Fact::Named { path, name, .. } => {
                self.change(path, |known| known.name.clone_from(name));
            }
            Fact::Damaged { path, problem, .. } => self.give_up(path, problem),
            Fact::Retired { path, .. } => {
                self.checkpoints.retain(|known| known.path != *path);
                self.damaged.retain(|known| known.checkpoint.path != *path);
                self.doomed.push(path.clone());
            }
            Fact::Deleted { path, .. } => self.doomed.retain(|doomed| doomed != path),
            Fact::Trained {
                trained_ms,
                world,
                cost_ms,
                ..
            } => self.experience.trained(*trained_ms, *world, *cost_ms),
            Fact::ChaosBegun { .. }
            | Fact::FaultOrdered { .. }
            | Fact::FaultSurvived { .. }
            | Fact::ChaosMarked { .. } => self.endure(fact),
            Fact::Ended {
                outcome,
                reason,
                at,
                broken,
                ..
            } => {
                self.broken = *broken;
                self.phase = match outcome {
                    Outcome::Finished => RunPhase::Finished,
                    Outcome::Cancelled => RunPhase::Cancelled,
                    Outcome::Failed => RunPhase::Failed,
                };
                self.reason.clone_from(reason);
                self.ended_unix_ms = *at;
                self.alive = false;
                self.stop = None;
            }
        }
    }

    fn change(&mut self, path: &str, how: impl FnOnce(&mut Checkpoint)) {
        if let Some(known) = self.checkpoints.iter_mut().find(|it| it.path == path) {
            how(known);
        }
    }

    /// A checkpoint is damaged. What steps behind the newest one came to is no longer what training from the newest one gives.
    fn give_up(&mut self, path: &str, problem: &str) {
        let Some(place) = self.checkpoints.iter().position(|it| it.path == path) else {
            return;
        };
        if place + 1 == self.checkpoints.len() {
            self.logged.clear();
            self.uniform = false;
        }
        self.damaged.push(Damaged {
            checkpoint: self.checkpoints.remove(place),
            problem: problem.to_owned(),
        });
    }

    fn broke(&mut self, step: u64, counts: bool, cause: &str) {
        self.alive = false;
        cause.clone_into(&mut self.reason);
        if counts {
            let before = if self.failures.step == step {
                self.failures.count
            } else {
                0
            };
            self.failures = Failures {
                step,
                count: before.saturating_add(1),
            };
        }
    }

    fn endure(&mut self, fact: &Fact) {
        match (fact, &mut self.chaos) {
            (Fact::ChaosBegun { faults, .. }, chaos) => *chaos = Some(Ordeal::new(*faults)),
            (Fact::FaultOrdered { fault, .. }, Some(chaos)) => chaos.faults.push(fault.clone()),
            (Fact::FaultSurvived { stood_still_ms, .. }, Some(chaos)) => {
                chaos.survived(*stood_still_ms);
            }
            (Fact::ChaosMarked { mark, .. }, Some(chaos)) => chaos.mark = Some(mark.clone()),
            _ => {}
        }
    }

    fn record(&mut self, body: &Body) {
        match body {
            Body::Open(open) => self.open = Some(open.clone()),
            Body::Step(step) => {
                self.step = step.step;
                self.lineage = step.generation;
                if self.trained.last().map(|(_, last)| *last) != Some(step.generation) {
                    self.trained.push((step.step, step.generation));
                }
                if step.skipped {
                    self.skipped.insert(step.step);
                }
            }
            Body::Void {
                generation,
                after_step,
                ..
            } => {
                self.step = self.step.min(*after_step);
                self.experience.failed();
                self.lineage = generation.saturating_add(1);
                self.skipped.split_off(&after_step.saturating_add(1));
                self.evaluations.retain(|known| known.step <= *after_step);
                self.gates.take_if(|gates| gates.step > *after_step);
                self.trained.retain(|(first, _)| first <= after_step);
            }
            Body::Durable { step, .. } => {
                self.durable = *step;
                let at = self.trained.partition_point(|(first, _)| first <= step);
                self.trained.drain(..at.saturating_sub(1));
            }
            Body::Lost { durable, .. } => self.durable = self.durable.min(*durable),
            Body::Evaluated(evaluation) => {
                // What was lost is measured again, perhaps after later ones.
                let step = evaluation.step;
                let at = self.evaluations.partition_point(|it| it.step < step);
                self.evaluations.insert(at, *evaluation);
            }
            Body::Close { .. } => self.closed = true,
        }
    }
}
