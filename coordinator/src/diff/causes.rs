//! What two runs were made from, piece by piece.

use std::collections::BTreeMap;

use super::{Cause, Kind, Side};
use crate::capsule::Environment;
use crate::ledger::hex;

/// Keys of a recipe, and beginnings of keys, that change no number: they say where things lie, how often they are kept, and what
/// is done about failures. The base and the data are compared by what they hold.
const WITHOUT_EFFECT: [&str; 13] = [
    "name",
    "base.path",
    "data.train",
    "data.heldout",
    "batch.activations",
    "checkpoint.",
    "workers.",
    "coordinator.",
    "nonfinite.",
    "replica_check.",
    "resume.",
    "chaos",
    "recovery.",
];

/// What differs, and what is not known of both.
pub(super) fn compare(a: &Side, b: &Side) -> (Vec<Cause>, Vec<String>) {
    let mut found = Found {
        a,
        b,
        causes: Vec::new(),
        unknown: Vec::new(),
    };
    found.recipe();
    found.data();
    found.base();
    found.versions();
    found.workers();
    found.skips();
    found.voids();
    (found.causes, found.unknown)
}

/// A part of an environment, as text.
type Field = fn(&Environment) -> String;

struct Found<'a> {
    a: &'a Side,
    b: &'a Side,
    causes: Vec<Cause>,
    unknown: Vec<String>,
}

impl Found<'_> {
    fn add(&mut self, kind: Kind, what: &str, values: [Option<String>; 2], since: Option<u64>) {
        let [a, b] = values;
        let what = what.to_owned();
        self.causes.push(Cause {
            kind,
            what,
            a,
            b,
            since,
        });
    }

    /// Notes what of two lists by name is not in both alike.
    fn lists(&mut self, kind: Kind, of: &str, lists: [BTreeMap<String, String>; 2]) {
        let [a, b] = lists;
        let only_b = b.keys().filter(|name| !a.contains_key(*name));
        for name in a.keys().chain(only_b) {
            let values = [a.get(name).cloned(), b.get(name).cloned()];
            if values[0] != values[1] {
                self.add(kind, &format!("{of}{name}"), values, Some(1));
            }
        }
    }

    fn recipe(&mut self) {
        let (a, b) = (&self.a.recipe, &self.b.recipe);
        let only_b = b.keys().filter(|path| !a.contains_key(*path));
        let paths: Vec<&String> = a.keys().chain(only_b).collect();
        // The budget is one number, however it is written.
        let budget = self.a.budget.is_some() && self.b.budget.is_some();
        for path in paths {
            let values = [a.get(path).cloned(), b.get(path).cloned()];
            if values[0] != values[1] {
                let without = WITHOUT_EFFECT.iter().any(|key| path.starts_with(key))
                    || (budget && path.starts_with("budget."));
                let since = (!without).then_some(1);
                self.add(Kind::Recipe, path, values, since);
            }
        }
        if budget && self.a.budget != self.b.budget {
            let tokens = [self.a.budget, self.b.budget];
            let values = tokens.map(|tokens| tokens.map(|tokens| format!("{tokens} tokens")));
            self.add(Kind::Recipe, "budget", values, Some(1));
        }
    }

    fn data(&mut self) {
        let hashes = [self.a.manifest, self.b.manifest];
        if hashes.iter().any(Option::is_none) {
            self.unknown
                .push("the data: a run has not found its training data yet".to_owned());
        }
        if hashes[0] == hashes[1] {
            return;
        }
        let values = hashes.map(|hash| hash.map(|hash| hex(&hash)));
        self.add(Kind::Data, "dataset", values, Some(1));
        let (Some(a), Some(b)) = (&self.a.dataset, &self.b.dataset) else {
            self.unknown.push(
                "which files of the data differ: a capsule lacks the manifest of the dataset"
                    .to_owned(),
            );
            return;
        };
        let settings = [a, b].map(|dataset| {
            let plain = dataset.settings.iter();
            let mut settings: BTreeMap<String, String> = plain
                .filter(|(name, _)| *name != "findings")
                .map(|(name, value)| (name.clone(), value.to_string()))
                .collect();
            settings.insert("tokenizer".to_owned(), dataset.tokenizer.clone());
            settings
        });
        let files = [a, b].map(|dataset| {
            let files = dataset.files.iter();
            files
                .map(|file| (file.name.clone(), file.blake3.clone()))
                .collect()
        });
        self.lists(Kind::Data, "", settings);
        self.lists(Kind::Data, "file ", files);
    }

    fn base(&mut self) {
        match (&self.a.base, &self.b.base) {
            (Some(a), Some(b)) => self.lists(Kind::Base, "file ", [a.clone(), b.clone()]),
            // Neither has a folder: random weights, which the recipe names.
            (None, None) if !self.a.recipe.contains_key("base.path") => {}
            _ => self
                .unknown
                .push("the base: a capsule lacks the list of its files".to_owned()),
        }
    }

    fn versions(&mut self) {
        if self.a.environments.is_empty() || self.b.environments.is_empty() {
            self.unknown.push(
                "versions and hardware: checkpoints name them, and a run has none any more"
                    .to_owned(),
            );
            return;
        }
        let fields: [(&str, Field); 6] = [
            ("build", |known| known.of.build.clone()),
            ("libtorch", |known| known.of.libtorch.clone()),
            ("NCCL", |known| known.of.nccl.clone()),
            ("device", |known| known.of.device.clone()),
            ("hardware", |known| known.of.model.clone()),
            ("threads", |known| known.of.threads.to_string()),
        ];
        for (what, of) in fields {
            let values = [self.a, self.b].map(|side| in_turn(&side.environments, of));
            if values[0] == values[1] {
                continue;
            }
            let differs =
                |step: &u64| self.a.environment(*step).map(of) != self.b.environment(*step).map(of);
            let since = self.common_steps().find(differs);
            self.add(Kind::Version, what, values.map(Some), since);
        }
    }

    fn common_steps(&self) -> std::ops::RangeInclusive<u64> {
        // Two runs of which one has not trained differ from the first step on.
        1..=self.a.steps.len().min(self.b.steps.len()).max(1) as u64
    }

    fn workers(&mut self) {
        let mut steps = self.common_steps();
        let differs = |step: &u64| match (self.a.world(*step), self.b.world(*step)) {
            (Some(a), Some(b)) => a != b,
            _ => false,
        };
        let Some(step) = steps.find(differs) else {
            return;
        };
        let values = [self.a, self.b].map(|side| {
            let generation = side.step(step)?.generation;
            Some(format!("{} (generation {generation})", side.world(step)?))
        });
        self.add(Kind::Workers, "workers", values, Some(step));
    }

    fn skips(&mut self) {
        let skipped = |side: &Side, step: u64| side.step(step).is_some_and(|step| step.skipped);
        let mut steps = self.common_steps();
        let Some(step) = steps.find(|step| skipped(self.a, *step) != skipped(self.b, *step)) else {
            return;
        };
        let values = [self.a, self.b].map(|side| {
            let word = if skipped(side, step) {
                "skipped"
            } else {
                "not skipped"
            };
            Some(word.to_owned())
        });
        // The first that differs is a result, and acts on the steps behind it.
        self.add(Kind::Skips, &format!("step {step}"), values, Some(step));
    }

    fn voids(&mut self) {
        if self.a.voids == self.b.voids {
            return;
        }
        let values = [self.a, self.b].map(|side| {
            let (last, reason) = side.voids.last()?;
            let count = side.voids.len();
            Some(format!("{count}, the last after step {last}: {reason}"))
        });
        self.add(Kind::Voids, "steps taken back", values, None);
    }
}

/// The values that environments have, one after the other.
fn in_turn(environments: &[Environment], of: Field) -> String {
    let mut values: Vec<String> = environments.iter().map(of).collect();
    values.dedup();
    let values: Vec<&str> = values
        .iter()
        .map(|value| if value.is_empty() { "none" } else { value })
        .collect();
    values.join(", then ")
}
