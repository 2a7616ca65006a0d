//! The audit: proves from a ledger alone that the samples behind the weights are exactly samples
//! 0..N of the plan, each once.
//!
//! Pure: it reads records and answers with a [`Verdict`]. It checks the chain (index, previous hash,
//! own hash), the opening, that the steps which no void record takes back follow each other without
//! gap or repeat, that each of them holds the samples that the opening promises, that durable steps
//! are never taken back unless the checkpoint that held them is on record as damaged, that what was
//! evaluated is behind steps that stand, and that the close, if there is one, is the end of the budget to the token.

use std::collections::BTreeSet;
use std::ops::Range;

use serde::Serialize;
use supra_recipes::plan::Digest;

use crate::ledger::{self, Body, Evaluation, Hash, Open, Record, RecordError, Step};

/// Breaks that are reported; the rest is only counted.
const MAX_BREAKS: usize = 50;

/// Recomputes the digest of a range of samples from the data, or says why it cannot.
pub type Recompute<'a> = dyn FnMut(Range<u64>) -> Result<Digest, String> + 'a;

/// What the ledger is held against, beside itself.
#[derive(Default)]
pub struct Options<'a> {
    /// The head that the coordinator, a manifest or an export names. Without it a cut tail of the
    /// ledger cannot be told from a run that is not finished.
    pub head: Option<Hash>,
    /// BLAKE3 of the resolved recipe's YAML.
    pub recipe_hash: Option<Hash>,
    /// Heads that published checkpoints remember: the chain has to pass through all of them.
    pub checkpoints: Vec<Remembered>,
    /// What the receipt of the run remembers.
    pub receipt: Option<Remembered>,
    /// Manifests of published checkpoints as they are now: what the ledger says about them has to be so.
    pub manifests: Vec<Manifest>,
    /// What is wrong with the files of checkpoints and the journal's end, in one line each, and how many files of
    /// checkpoints are right.
    pub files: (Vec<String>, u64),
    /// Digests from the data itself. Slow: reads every sample.
    pub recompute: Option<&'a mut Recompute<'a>>,
}

/// A published checkpoint's manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Where it is, for people.
    pub path: String,
    /// The generation that it says wrote it.
    pub generation: u64,
    /// The step that it says it is behind.
    pub step: u64,
    /// BLAKE3 of the file.
    pub hash: Hash,
}

/// The head that the ledger had when a checkpoint was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// The checkpoint's manifest, or that of a model made from it, or the receipt of the run, for people.
    pub manifest: String,
    /// What it says.
    pub head: Hash,
}

/// The result of an audit; its JSON is the stable answer of `supra audit --json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Id of the run; empty when the ledger has no opening.
    pub run: String,
    /// `ok` or `broken`.
    pub verdict: Outcome,
    /// BLAKE3 head of the chain, hexadecimal.
    pub head: String,
    /// Records read.
    pub records: u64,
    /// Generations that applied a step.
    pub generations: u64,
    /// Steps behind the weights, and steps of the whole budget.
    pub steps: u64,
    /// Steps of the whole budget.
    pub budget_steps: u64,
    /// Samples behind the weights.
    pub samples: u64,
    /// Tokens behind the weights.
    pub tokens: u64,
    /// Tokens of the whole budget.
    pub budget_tokens: u64,
    /// Last step that a published checkpoint holds.
    pub durable_step: u64,
    /// Published checkpoints whose manifest names a head of this ledger.
    pub checkpoints: u64,
    /// Files of published checkpoints that are what was written.
    pub files: u64,
    /// Steps behind the weights whose update was skipped, ascending.
    pub skipped: Vec<u64>,
    /// States on the way to the weights whose held-out loss is on record.
    pub evaluations: u64,
    /// Checkpoints that made steps durable and turned out to be damaged.
    pub damaged_checkpoints: u64,
    /// Applied steps that were taken back and trained again, or lie after the recovery point.
    pub voided_steps: u64,
    /// The ledger is closed: the budget is spent.
    pub finished: bool,
    /// Where and how the ledger is broken, in order; empty when it is not.
    pub breaks: Vec<Break>,
    /// Breaks beyond those listed.
    pub more_breaks: u64,
}

/// Is the account right?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Every check passed.
    Ok,
    /// At least one did not.
    Broken,
}

/// One failed check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Break {
    /// Record at which it shows; the number of records for what shows at the end.
    pub record: u64,
    /// What is wrong, in one line.
    pub what: String,
}

/// Audits a whole ledger.
pub fn audit(records: impl IntoIterator<Item = Record>, options: Options<'_>) -> Verdict {
    let mut auditor = Auditor::new(options);
    for record in records {
        auditor.push(&record);
    }
    auditor.finish()
}

/// An audit in progress, for ledgers that arrive record by record.
pub struct Auditor<'a> {
    options: Options<'a>,
    tail: ledger::Tail,
    records: u64,
    open: Option<Open>,
    /// Last step that stands.
    step: u64,
    durable: u64,
    /// Generation of the last step, and the last one that a void record ended.
    generation: u64,
    voided_generation: u64,
    generations: u64,
    skipped: BTreeSet<u64>,
    /// Steps that stand and whose states were evaluated.
    evaluated: BTreeSet<u64>,
    voided: u64,
    damaged: u64,
    closed: bool,
    /// Remembered heads that the chain passed through; the others are still in the options.
    passed: u64,
    breaks: Vec<Break>,
    more: u64,
}

impl<'a> Auditor<'a> {
    /// An audit that has seen nothing.
    pub fn new(options: Options<'a>) -> Self {
        Auditor {
            options,
            tail: ledger::Tail::default(),
            records: 0,
            open: None,
            step: 0,
            durable: 0,
            generation: 0,
            voided_generation: 0,
            generations: 0,
            skipped: BTreeSet::new(),
            evaluated: BTreeSet::new(),
            voided: 0,
            damaged: 0,
            closed: false,
            passed: 0,
            breaks: Vec::new(),
            more: 0,
        }
    }

    /// Takes the next record.
    pub fn push(&mut self, record: &Record) {
        self.chain(record);
        if self.closed {
            self.found("comes after the close");
        }
        match &record.body {
            Body::Open(open) => self.opening(open),
            _ if self.open.is_none() => {
                if self.records == 0 {
                    self.found("the ledger does not begin with an opening");
                }
            }
            Body::Step(step) => self.applied(step),
            Body::Void {
                generation,
                after_step,
                ..
            } => self.void(*generation, *after_step),
            Body::Durable {
                generation,
                step,
                manifest_hash,
            } => self.made_durable(*generation, *step, manifest_hash),
            Body::Lost { step, durable, .. } => self.lost(*step, *durable),
            Body::Evaluated(evaluation) => self.evaluated(evaluation),
            Body::Close { step, samples } => self.close(*step, *samples),
        }
        self.records += 1;
    }

    /// Notes a record that could not even be read.
    pub fn unreadable(&mut self, error: &RecordError) {
        self.found(error.to_string());
        self.records += 1;
    }

    /// Checks what only shows at the end, and answers.
    pub fn finish(mut self) -> Verdict {
        if self.records == 0
            && self
                .options
                .head
                .is_some_and(|head| head != Hash::default())
        {
            self.found("the ledger is empty");
        } else if let Some(head) = self.options.head
            && head != self.tail.head
        {
            self.found(format!(
                "the chain ends in {} but the head is known to be {}: records are missing at the end",
                ledger::hex(&self.tail.head),
                ledger::hex(&head),
            ));
        }
        let receipt = self.options.receipt.take();
        let checkpoints = std::mem::take(&mut self.options.checkpoints);
        for Remembered { manifest, head } in checkpoints.into_iter().chain(receipt) {
            self.found(format!(
                "the chain does not pass through {}, the head that {manifest} remembers: records are missing at the end \
                 or were replaced",
                ledger::hex(&head),
            ));
        }
        let (problems, files) = std::mem::take(&mut self.options.files);
        problems.into_iter().for_each(|what| self.found(what));
        let samples = self.samples();
        let length = self.open.as_ref().map_or(0, |open| open.sequence_length);
        let budget = self.open.as_ref().map_or(0, |open| open.samples);
        Verdict {
            run: self
                .open
                .as_ref()
                .map(|open| open.run.clone())
                .unwrap_or_default(),
            verdict: if self.breaks.is_empty() {
                Outcome::Ok
            } else {
                Outcome::Broken
            },
            head: ledger::hex(&self.tail.head),
            records: self.records,
            generations: self.generations,
            steps: self.step,
            budget_steps: self.open.as_ref().map_or(0, |open| open.steps),
            samples,
            tokens: samples.saturating_mul(length),
            budget_tokens: budget.saturating_mul(length),
            durable_step: self.durable,
            checkpoints: self.passed,
            files,
            skipped: self.skipped.into_iter().collect(),
            evaluations: self.evaluated.len() as u64,
            damaged_checkpoints: self.damaged,
            voided_steps: self.voided,
            finished: self.closed,
            breaks: self.breaks,
            more_breaks: self.more,
        }
    }

    fn found(&mut self, what: impl Into<String>) {
        if self.breaks.len() < MAX_BREAKS {
            self.breaks.push(Break {
                record: self.records,
                what: what.into(),
            });
        } else {
            self.more += 1;
        }
    }

    /// Samples of steps 1..=`step`.
    fn samples(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| {
            self.step
                .saturating_mul(open.batch_samples)
                .min(open.samples)
        })
    }

    fn chain(&mut self, record: &Record) {
        if record.index != self.tail.length {
            self.found(format!(
                "has index {}, expected {}",
                record.index, self.tail.length
            ));
        }
        if record.previous != self.tail.head {
            self.found("does not follow the record before it: the previous hash differs");
        }
        if record.hash != ledger::hash(&record.previous, record.index, &record.body) {
            self.found("was altered: its hash is not that of its content");
        }
        let waiting = self.options.checkpoints.len();
        self.options
            .checkpoints
            .retain(|known| known.head != record.hash);
        self.passed += (waiting - self.options.checkpoints.len()) as u64;
        self.options
            .receipt
            .take_if(|known| known.head == record.hash);
        self.tail.advance(record);
    }

    fn opening(&mut self, open: &Open) {
        if self.open.is_some() {
            return self.found("opens the ledger a second time");
        }
        if self.records > 0 {
            self.found("opens the ledger, but is not its first record");
        }
        let steps = open.samples.div_ceil(open.batch_samples.max(1));
        if open.batch_samples == 0 || open.sequence_length == 0 || open.steps != steps {
            self.found(format!(
                "promises {} steps of {} samples for {} samples, which do not fit together",
                open.steps, open.batch_samples, open.samples,
            ));
        }
        if self
            .options
            .recipe_hash
            .is_some_and(|hash| hash != open.recipe_hash)
        {
            self.found("was opened for another recipe than the run's");
        }
        self.open = Some(open.clone());
    }

    fn applied(&mut self, step: &Step) {
        let Some(open) = &self.open else { return };
        let first = (step.step.saturating_sub(1)).saturating_mul(open.batch_samples);
        let samples = open.batch_samples.min(open.samples.saturating_sub(first));
        let promised = step.step >= 1 && step.step <= open.steps;
        if self.step.checked_add(1) != Some(step.step) {
            self.found(format!(
                "applies step {} after step {}: {}",
                step.step,
                self.step,
                if step.step <= self.step {
                    "samples were trained twice"
                } else {
                    "samples are missing"
                },
            ));
        }
        if !promised || step.first_sample != first || step.samples != samples {
            self.found(format!(
                "step {} holds samples {}..{}, the plan says {}..{}",
                step.step,
                step.first_sample,
                step.first_sample.saturating_add(step.samples),
                first,
                first.saturating_add(samples),
            ));
        }
        if step.generation <= self.voided_generation || step.generation < self.generation {
            self.found(format!(
                "generation {} applies step {} after generation {} took its place",
                step.generation,
                step.step,
                self.generation.max(self.voided_generation),
            ));
        }
        self.compare_data(step);
        if step.generation > self.generation {
            self.generations += 1;
            self.generation = step.generation;
        }
        self.step = step.step;
        if step.skipped {
            self.skipped.insert(step.step);
        }
    }

    fn compare_data(&mut self, step: &Step) {
        let Some(recompute) = self.options.recompute.as_mut() else {
            return;
        };
        let range = step.first_sample..step.first_sample.saturating_add(step.samples);
        match recompute(range) {
            Ok(digest) if digest.as_bytes() == &step.digest => {}
            Ok(_) => self.found(format!(
                "step {}: what was fed is not what the data holds",
                step.step
            )),
            Err(cause) => self.found(format!("step {}: cannot be checked: {cause}", step.step)),
        }
    }

    fn void(&mut self, generation: u64, after_step: u64) {
        if after_step < self.durable {
            self.found(format!(
                "voids steps after {after_step}, but step {} is durable",
                self.durable
            ));
        }
        if after_step > self.step {
            self.found(format!(
                "voids steps after {after_step}, but the last step is {}",
                self.step
            ));
        }
        if generation < self.generation {
            self.found(format!(
                "voids generation {generation}, but generation {} applied steps",
                self.generation
            ));
        }
        // Of a ledger that is none, steps may have any number.
        let voided = self.step.saturating_sub(after_step);
        self.voided = self.voided.saturating_add(voided);
        self.step = self.step.min(after_step);
        self.skipped.split_off(&after_step.saturating_add(1));
        self.evaluated.split_off(&after_step.saturating_add(1));
        self.voided_generation = self.voided_generation.max(generation);
    }

    fn made_durable(&mut self, generation: u64, step: u64, manifest_hash: &Hash) {
        let altered = self.options.manifests.iter().find(|manifest| {
            (manifest.generation, manifest.step) == (generation, step)
                && manifest.hash != *manifest_hash
        });
        if let Some(Manifest { path, hash, .. }) = altered {
            let (found, said) = (ledger::hex(hash), ledger::hex(manifest_hash));
            self.found(format!(
                "calls step {step} durable by a checkpoint with the hash {said}, but {path} has {found}: it was altered"
            ));
        }
        if step > self.step {
            self.found(format!(
                "calls step {step} durable, but the last step is {}",
                self.step
            ));
        }
        self.durable = self.durable.max(step);
    }

    /// A checkpoint turned out to be damaged: what only it held may be void from here on.
    fn lost(&mut self, step: u64, durable: u64) {
        if step != self.durable || durable >= step {
            self.found(format!(
                "calls the checkpoint of step {step} damaged and steps up to {durable} durable, but steps up to {} were",
                self.durable
            ));
        }
        self.durable = self.durable.min(durable);
        self.damaged += 1;
    }

    fn evaluated(&mut self, evaluation: &Evaluation) {
        let Evaluation {
            step, generation, ..
        } = *evaluation;
        if step > self.step {
            self.found(format!(
                "evaluates the state behind step {step}, but the last step is {}",
                self.step
            ));
        }
        if !self.evaluated.insert(step) {
            self.found(format!(
                "evaluates the state behind step {step} a second time"
            ));
        }
        if generation < self.generation {
            self.found(format!(
                "generation {generation} evaluates step {step} after generation {} took its place",
                self.generation
            ));
        }
    }

    fn close(&mut self, step: u64, samples: u64) {
        let Some(open) = &self.open else { return };
        let budget = (open.steps, open.samples);
        if (step, samples) != budget {
            self.found(format!(
                "closes at step {step} with {samples} samples, the budget is step {} with {}",
                budget.0, budget.1
            ));
        }
        if self.step != budget.0 || self.samples() != budget.1 {
            self.found(format!(
                "closes the ledger, but only {} of {} steps stand",
                self.step, budget.0
            ));
        }
        if self.durable != budget.0 {
            self.found(format!(
                "closes the ledger, but only steps up to {} are durable",
                self.durable
            ));
        }
        self.closed = true;
    }
}

#[cfg(test)]
mod tests;
