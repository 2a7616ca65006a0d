//! The promises, checked after every event, by code that shares nothing with the cores but the ledger's hash.

use std::collections::{BTreeMap, BTreeSet};

use supra_coordinator::ledger::{self, Body, Record, Step, Tail};
use supra_coordinator::machine::{Fact, Outcome, RunNumber};
use supra_proto::v1::coordinator_message::Body as Down;

use super::disk::Checkpoints;
use super::ground::{Model, evaluated, ground};
use super::queue::Time;

/// Why a run may fail: its input is wrong, nothing goes right any more, or a step does not come to what it came to before.
const GROUNDS: [&str; 3] = [
    super::compute::BROKEN,
    "generations in a row failed",
    "is not what it was",
];

/// A run as its journalled facts tell it.
#[derive(Clone, Debug, Default)]
pub(super) struct Account {
    pub id: String,
    pub records: Vec<Record>,
    /// Generation of each step that is applied and not void.
    pub standing: Vec<u64>,
    tail: Tail,
    generation: u64,
    durable: u64,
    /// Steps that stand and are evaluated.
    evaluated: BTreeSet<u64>,
    /// Journalled checkpoints, oldest first, and the hashes of those that are damaged.
    checkpoints: Vec<Known>,
    damaged: BTreeSet<[u8; 32]>,
    /// Steps behind it whose results are logged, and the generations that these are from.
    logged: BTreeMap<u64, u64>,
    closed: bool,
    pub outcome: Option<Outcome>,
}

/// A journalled checkpoint.
#[derive(Clone, Debug)]
struct Known {
    path: String,
    step: u64,
    hash: [u8; 32],
    verified: bool,
}

impl Account {
    /// Step of the newest journalled checkpoint.
    fn recovery(&self) -> u64 {
        self.checkpoints.last().map_or(0, |known| known.step)
    }

    fn known(&self, path: &str) -> Option<usize> {
        self.checkpoints.iter().position(|known| known.path == path)
    }

    /// What becomes of a journalled checkpoint: only what is verified lets older ones go.
    fn keep(&mut self, fact: &Fact) -> Result<(), String> {
        match fact {
            Fact::Written { checkpoint, .. } => {
                self.checkpoints.retain(|it| it.path != checkpoint.path);
                self.checkpoints.push(Known {
                    path: checkpoint.path.clone(),
                    step: checkpoint.step,
                    hash: checkpoint.manifest_hash,
                    verified: false,
                });
            }
            Fact::Verified { path, .. } => {
                let place = self
                    .known(path)
                    .ok_or("what is not journalled is verified")?;
                self.checkpoints[place].verified = true;
            }
            Fact::Damaged { path, .. } => {
                let place = self
                    .known(path)
                    .ok_or("what is not journalled is damaged")?;
                if place + 1 == self.checkpoints.len() {
                    self.logged.clear();
                }
                self.damaged.insert(self.checkpoints.remove(place).hash);
            }
            Fact::Retired { path, .. } => {
                let place = self
                    .known(path)
                    .ok_or("what is not journalled is retired")?;
                let newer = &self.checkpoints[place + 1..];
                if !newer.iter().any(|known| known.verified) {
                    return Err(format!("{path} goes, and no newer one is verified"));
                }
                self.checkpoints.remove(place);
            }
            _ => {}
        }
        Ok(())
    }

    /// The state that the standing steps lead to.
    pub fn model(&self) -> Model {
        self.standing
            .iter()
            .fold(Model::default(), |model, generation| {
                model.trained(*generation)
            })
    }
}

/// Run, generation and step.
type Place = (String, u64, u64);

/// Everything that the promises are about.
#[derive(Default)]
pub(super) struct Watch {
    /// The first broken promise.
    pub violation: Option<String>,
    pub accounts: Vec<Account>,
    live: Option<(RunNumber, u64)>,
    /// Workers that no generation takes.
    aside: BTreeSet<String>,
    /// When generations ended.
    ended: BTreeMap<(String, u64), Time>,
    /// What was told outlives every crash: keys of assignments, and steps of checkpoints that were to be published.
    keys: BTreeMap<(String, u64), Vec<u8>>,
    promised: BTreeMap<String, u64>,
    /// How many ranks trained a step, whether to a wrong result, and the streams over which the coordinator has heard of it.
    trained: BTreeMap<Place, (usize, bool)>,
    reported: BTreeMap<Place, BTreeSet<usize>>,
}

impl Watch {
    /// Notes that a promise is broken.
    pub fn broken(&mut self, what: impl Into<String>) {
        self.violation.get_or_insert(what.into());
    }

    /// Run and generation that may apply steps.
    pub fn live(&self) -> Option<(String, u64)> {
        let (run, generation) = self.live?;
        Some((self.id(run), generation))
    }

    pub fn id(&self, run: RunNumber) -> String {
        self.account(run)
            .map(|account| account.id.clone())
            .unwrap_or_default()
    }

    fn account(&self, run: RunNumber) -> Option<&Account> {
        self.accounts.get((run as usize).checked_sub(1)?)
    }

    /// A run waits for its next generation.
    pub fn mustering(&self) -> bool {
        self.live.is_none()
            && self
                .accounts
                .iter()
                .any(|account| account.outcome.is_none())
    }

    /// Runs that are not finished, oldest first.
    pub fn unfinished(&self) -> impl Iterator<Item = RunNumber> + '_ {
        (1..)
            .zip(&self.accounts)
            .filter(|(_, account)| account.outcome != Some(Outcome::Finished))
            .map(|(run, _)| run)
    }

    /// Since when a generation is over; none while it is live.
    pub fn over_since(&self, run: &str, generation: u64) -> Option<Time> {
        let live = self
            .live
            .is_some_and(|(number, known)| known == generation && self.id(number) == run);
        let key = (run.to_owned(), generation);
        (!live).then(|| self.ended.get(&key).copied().unwrap_or(0))
    }

    /// A rank has the state that its generation starts from: the one that the ledger accounts for.
    pub fn started(&mut self, run: &str, generation: u64, model: Model) {
        if self.live() != Some((run.to_owned(), generation)) {
            return;
        }
        let account = self.accounts.iter().find(|account| account.id == run);
        if account.is_some_and(|account| account.model() != model) {
            let step = model.step;
            self.broken(format!(
                "{run}: generation {generation} starts behind step {step} from a state that the ledger does not account for"
            ));
        }
    }

    /// All ranks of a generation have trained a step.
    pub fn trained(&mut self, run: &str, generation: u64, step: u64, world: usize, drifted: bool) {
        self.trained
            .insert((run.to_owned(), generation, step), (world, drifted));
    }

    /// The report of a rank has arrived.
    pub fn reported(&mut self, run: &str, generation: u64, step: u64, stream: usize) {
        self.reported
            .entry((run.to_owned(), generation, step))
            .or_default()
            .insert(stream);
    }

    /// A coordinator starts, and has to hear everything again.
    pub fn forget_reports(&mut self) {
        self.reported.clear();
    }

    /// A fact is handed to the journal.
    pub fn journalled(&mut self, now: Time, fact: &Fact, checkpoints: &Checkpoints) {
        if let Err(what) = self.fits(fact, checkpoints) {
            self.broken(what);
        }
        if let Some((run, generation)) = self.live() {
            self.ended.insert((run, generation), now);
        }
        if let Err(what) = self.fold(fact) {
            self.broken(what);
        }
        if let Fact::Damaged { run, .. } = fact {
            let id = self.id(*run);
            let left = self.account(*run).map_or(0, Account::recovery);
            // A promise to publish is none to keep files whole.
            self.promised
                .entry(id)
                .and_modify(|step| *step = left.min(*step));
        }
    }

    /// A crash has taken back what was not on the disk.
    pub fn rewind(&mut self, facts: &[Fact]) {
        self.accounts.clear();
        self.live = None;
        self.aside.clear();
        for fact in facts {
            if let Err(what) = self.fold(fact) {
                self.broken(what);
            }
        }
        for account in &self.accounts {
            let promised = self.promised.get(&account.id).copied().unwrap_or(0);
            if account.recovery() < promised {
                let what = format!(
                    "{}: a checkpoint of step {promised} was to be published, and a crash took the journal back to step {}",
                    account.id,
                    account.recovery()
                );
                return self.broken(what);
            }
        }
    }

    /// What a fact must not contradict beside the journal itself.
    fn fits(&self, fact: &Fact, checkpoints: &Checkpoints) -> Result<(), String> {
        let id = self.id(fact.run());
        if let Fact::Ended {
            outcome: Outcome::Failed,
            reason,
            ..
        } = fact
            && !GROUNDS.iter().any(|ground| reason.contains(ground))
        {
            return Err(format!("{id}: failed without a ground: {reason}"));
        }
        if let Fact::Verified { path, .. } | Fact::Damaged { path, .. } = fact {
            let account = self.account(fact.run());
            let known = account.and_then(|it| Some(it.checkpoints[it.known(path)?].hash));
            let whole = known.and_then(|hash| checkpoints.read(&id, path, hash));
            if whole.is_some() != matches!(fact, Fact::Verified { .. }) {
                return Err(format!("{id}: the disk does not bear out {fact:?}"));
            }
        }
        let Fact::Recorded { record, .. } = fact else {
            return Ok(());
        };
        match &record.body {
            Body::Step(step) => {
                let of = format!("step {} of generation {}", step.step, step.generation);
                let last = self.account(fact.run()).map(|account| account.generation);
                if last != Some(step.generation) {
                    return Err(format!("{id}: {of} is applied, a generation too late"));
                }
                let place = (id.clone(), step.generation, step.step);
                let Some((world, drifted)) = self.trained.get(&place).copied() else {
                    return Err(format!(
                        "{id}: {of} is applied before all ranks have trained it"
                    ));
                };
                let account = self.account(fact.run());
                let logged = account.and_then(|account| account.logged.get(&step.step));
                if let Some(generation) = logged.copied()
                    && let before = (id.clone(), generation, step.step)
                    && let Some((_, then)) = self.trained.get(&before)
                    && *then != drifted
                {
                    return Err(format!(
                        "{id}: {of} is applied, and did not come to what generation {generation} logged"
                    ));
                }
                // Once it is over, one rank that lived is enough: the ranks have told each other what they fed.
                let live = self.live == Some((fact.run(), step.generation));
                let needed = if live { world } else { 1 };
                if self.reported.get(&place).map_or(0, BTreeSet::len) < needed {
                    return Err(format!(
                        "{id}: {of} is applied before {needed} ranks have reported it"
                    ));
                }
                Ok(())
            }
            Body::Void { after_step, .. } => {
                let promised = self.promised.get(&id).copied().unwrap_or(0);
                if *after_step < promised {
                    return Err(format!(
                        "{id}: steps after {after_step} are void, but the checkpoint of step {promised} was promised"
                    ));
                }
                Ok(())
            }
            Body::Durable { manifest_hash, .. } => checkpoints
                .published(&id)
                .any(|(_, saved)| saved.manifest_hash == *manifest_hash)
                .then_some(())
                .ok_or(format!("{id}: durable, but no checkpoint is published")),
            Body::Open(_) | Body::Lost { .. } | Body::Evaluated(_) | Body::Close { .. } => Ok(()),
        }
    }

    /// Applies a fact to the account of its run.
    fn fold(&mut self, fact: &Fact) -> Result<(), String> {
        if let Fact::Submitted { id, .. } = fact {
            self.accounts.push(Account {
                id: id.clone(),
                ..Account::default()
            });
            return Ok(());
        }
        match fact {
            Fact::PutAside { worker, .. } => {
                self.aside.insert(worker.clone());
                return Ok(());
            }
            Fact::TakenBack { worker, .. } if self.aside.remove(worker) => return Ok(()),
            Fact::TakenBack { worker, .. } => {
                return Err(format!("{worker} is taken back, but was not aside"));
            }
            Fact::Formed { members, .. } => {
                if let Some(name) = members.iter().find(|name| self.aside.contains(*name)) {
                    return Err(format!("{name} gets a place, but is aside"));
                }
            }
            _ => {}
        }
        let number = fact.run();
        let place = (number as usize).wrapping_sub(1);
        let Some(account) = self.accounts.get_mut(place) else {
            return Err(format!("a fact of run {number}, which nobody submitted"));
        };
        match fact {
            Fact::Formed { generation, .. } => {
                if *generation <= account.generation {
                    return Err(format!(
                        "{}: generation {generation} forms again",
                        account.id
                    ));
                }
                account.generation = *generation;
                self.live = Some((number, *generation));
            }
            Fact::TakenUp { generation, .. } if self.live != Some((number, *generation)) => {
                return Err(format!(
                    "{}: generation {generation} is taken up, which is over",
                    account.id
                ));
            }
            Fact::Broke { .. } => self.live = None,
            Fact::Queued { .. } => account.outcome = None,
            Fact::Ended { outcome, .. } => {
                account.outcome = Some(*outcome);
                self.live = self.live.filter(|(run, _)| *run != number);
            }
            Fact::Written { checkpoint, .. } => {
                if checkpoint.step > account.standing.len() as u64 {
                    return Err(format!(
                        "{}: a checkpoint of step {}, which is not applied",
                        account.id, checkpoint.step
                    ));
                }
                account.logged.retain(|step, _| *step > checkpoint.step);
            }
            Fact::Logged { result, .. } => {
                account.logged.retain(|step, _| *step < result.step);
                account.logged.insert(result.step, result.generation);
            }
            Fact::Recorded { record, .. } => return account.record(record),
            _ => {}
        }
        let id = account.id.clone();
        account.keep(fact).map_err(|what| format!("{id}: {what}"))
    }

    /// A worker is told something: what stands behind it has to be on the disk by now.
    pub fn told(&mut self, safe: &[Fact], run: &str, generation: u64, body: &Down) {
        let on_disk = |is: &dyn Fn(&Fact) -> bool| safe.iter().rev().any(is);
        let known = match body {
            Down::Assignment(assignment) => {
                let key = (run.to_owned(), generation);
                let before = self
                    .keys
                    .entry(key)
                    .or_insert_with(|| assignment.data_key.clone());
                if *before != assignment.data_key {
                    let what = format!("{run}: generation {generation} is assigned a second time");
                    return self.broken(what);
                }
                on_disk(
                    &|fact| matches!(fact, Fact::Formed { generation: of, .. } if *of == generation),
                )
            }
            Down::Void(_) => on_disk(&|fact| match fact {
                Fact::Broke { generation: of, .. } => *of == generation,
                // Who comes back too late from a run that has ended is told, too.
                Fact::Ended { run: of, .. } => self.id(*of) == run,
                _ => false,
            }),
            Down::Publish(publish) => {
                let promised = self.promised.entry(run.to_owned()).or_default();
                *promised = publish.step.max(*promised);
                on_disk(&|fact| {
                    matches!(fact, Fact::Written { checkpoint, .. }
                        if checkpoint.manifest_hash.as_slice() == publish.manifest_hash)
                })
            }
            Down::LedgerHead(head) => on_disk(
                &|fact| matches!(fact, Fact::Recorded { record, .. } if record.hash.as_slice() == head.hash),
            ),
            _ => true,
        };
        if !known {
            let kind = super::kind_of_down(body);
            self.broken(format!(
                "{run}: a worker of generation {generation} was told {kind} before it was on the disk"
            ));
        }
    }
}

impl Account {
    /// Puts a record at the end of the ledger, if it belongs there.
    fn record(&mut self, record: &Record) -> Result<(), String> {
        if self.closed {
            return Err(format!("{}: a record after the close", self.id));
        }
        self.body(&record.body)?;
        let fits = record.index == self.tail.length
            && record.previous == self.tail.head
            && record.hash == ledger::hash(&record.previous, record.index, &record.body);
        if !fits {
            return Err(format!(
                "{}: record {} breaks the chain",
                self.id, record.index
            ));
        }
        self.tail.advance(record);
        self.records.push(record.clone());
        Ok(())
    }

    fn body(&mut self, body: &Body) -> Result<(), String> {
        let id = &self.id;
        let standing = self.standing.len() as u64;
        let plan = &ground().plan;
        match body {
            Body::Open(_) => Ok(()),
            Body::Step(step) => self.step(step),
            Body::Void { after_step, .. } if *after_step < self.durable => Err(format!(
                "{id}: steps after {after_step} are void, but {} is durable",
                self.durable
            )),
            Body::Void { after_step, .. } => {
                self.standing.truncate(*after_step as usize);
                self.evaluated.split_off(&(after_step + 1));
                Ok(())
            }
            Body::Durable { step, .. } if *step > standing || *step <= self.durable => {
                Err(format!("{id}: step {step} cannot become durable now"))
            }
            Body::Durable { step, .. } => {
                self.durable = *step;
                let due = |step: &u64| plan.evaluation_due(*step) && !self.evaluated.contains(step);
                (0..=*step).find(due).map_or(Ok(()), |missing| {
                    Err(format!(
                        "{id}: step {step} is durable, and step {missing} was not evaluated"
                    ))
                })
            }
            Body::Evaluated(evaluation) => {
                let (step, said) = (evaluation.step, evaluated(evaluation.step));
                let right = plan.evaluation_due(step)
                    && evaluation.loss_sum() == said.loss_sum
                    && evaluation.targets == said.targets;
                if step > standing || !right || !self.evaluated.insert(step) {
                    return Err(format!(
                        "{id}: step {step} cannot be evaluated now: {evaluation:?}"
                    ));
                }
                Ok(())
            }
            Body::Lost {
                step,
                durable,
                manifest_hash,
                ..
            } => {
                if *step != self.durable || *durable >= *step {
                    return Err(format!("{id}: step {step} cannot be lost now"));
                }
                if !self.damaged.contains(manifest_hash) {
                    return Err(format!("{id}: step {step} is lost, but nothing is damaged"));
                }
                self.durable = *durable;
                Ok(())
            }
            Body::Close { step, samples } => {
                self.closed = true;
                let whole = (plan.steps, plan.samples);
                if (*step, *samples) != whole || standing != plan.steps {
                    return Err(format!("{id}: closed after {standing} steps"));
                }
                Ok(())
            }
        }
    }

    /// No sample twice, none left out.
    fn step(&mut self, step: &Step) -> Result<(), String> {
        let id = &self.id;
        let next = self.standing.len() as u64 + 1;
        if step.step != next {
            return Err(format!(
                "{id}: step {} is applied, {next} is next",
                step.step
            ));
        }
        let samples = ground().plan.step_samples(step.step);
        let same = step.first_sample == samples.start
            && step.samples == samples.end - samples.start
            && step.digest == *ground().digest(samples).as_bytes();
        if !same {
            return Err(format!("{id}: step {next} was fed with other samples"));
        }
        self.standing.push(step.generation);
        Ok(())
    }
}
