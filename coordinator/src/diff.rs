//! Why two runs differ: pure comparison of two [`Capsule`](crate::capsule::Capsule)s.
//!
//! What they came to is compared step by step: what was fed, whether the update was skipped, and, as far as they are kept, loss,
//! gradient norm and learning rate, to the bit. What they were made from is compared piece by piece: recipe, data, base,
//! versions and hardware, workers. A difference of the latter kind is a [`Cause`], with the first step that it may act on; the
//! verdict names those that explain the first step that differs.

use serde::Serialize;

mod causes;
mod sentence;
mod side;
mod steps;

pub use sentence::short;
pub use side::{DataFile, Dataset, Side, Stretch};
pub use steps::{First, Quantity};

#[cfg(test)]
mod tests;

/// How two runs differ; its JSON is that of `supra diff --json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// In one word.
    pub verdict: Verdict,
    /// In one sentence.
    pub sentence: String,
    /// The first run.
    pub a: Summary,
    /// The second run.
    pub b: Summary,
    /// Steps that both have, and those of them whose numbers both have kept.
    pub steps: u64,
    /// Of these, steps whose loss, gradient norm and learning rate were compared.
    pub compared: u64,
    /// Last step up to which nothing that was compared differs; 0 when the first one does.
    pub last_common_step: u64,
    /// The first step at which each quantity differs, in the order of steps; empty when none does.
    pub first: Vec<First>,
    /// What differs in what they were made from; those that change no number last.
    pub causes: Vec<Cause>,
    /// What could not be compared, and why.
    pub unknown: Vec<String>,
}

/// Do two runs come to the same?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// In every step that both have.
    Same,
    /// Not in all of them.
    Different,
    /// No step was trained by both.
    Untrained,
}

/// One of the two runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Its id.
    pub run: String,
    /// Steps that stand.
    pub steps: u64,
    /// Which generations trained them, on how many workers.
    pub generations: Vec<Stretch>,
}

/// A difference in what two runs were made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Cause {
    /// Where it lies.
    pub kind: Kind,
    /// What differs: a key of the recipe, a file, the name of a version.
    pub what: String,
    /// How it is in either run; `null` where it is not there.
    pub a: Option<String>,
    /// In the second run.
    pub b: Option<String>,
    /// First step that it may act on; `null` when it changes no number.
    pub since: Option<u64>,
}

/// Where a difference lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A key of the resolved recipe.
    Recipe,
    /// The training data, or the tokenizer that made it.
    Data,
    /// The base model.
    Base,
    /// A program, a library, or the machine.
    Version,
    /// How many workers trained.
    Workers,
    /// Steps whose update was skipped.
    Skips,
    /// Steps that were taken back and trained again.
    Voids,
}

impl Kind {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Recipe => "recipe",
            Kind::Data => "data",
            Kind::Base => "base",
            Kind::Version => "version",
            Kind::Workers => "workers",
            Kind::Skips => "skips",
            Kind::Voids => "voids",
        }
    }
}

/// Compares two runs.
pub fn compare(a: &Side, b: &Side) -> Difference {
    let stepped = steps::compare(a, b);
    let (mut causes, unknown) = causes::compare(a, b);
    causes.sort_by_key(|cause| cause.since.is_none());
    let verdict = match (stepped.steps, stepped.first.is_empty()) {
        (0, _) => Verdict::Untrained,
        (_, true) => Verdict::Same,
        (_, false) => Verdict::Different,
    };
    Difference {
        verdict,
        sentence: sentence::of(a, b, &stepped, &causes),
        a: summary(a),
        b: summary(b),
        steps: stepped.steps,
        compared: stepped.compared,
        last_common_step: stepped.last_common,
        first: stepped.first,
        causes,
        unknown,
    }
}

fn summary(side: &Side) -> Summary {
    Summary {
        run: side.run.clone(),
        steps: side.steps.len() as u64,
        generations: side.stretches(),
    }
}
