//! What a comparison needs to know of a run, read from its capsule.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use supra_recipes::Recipe;

use crate::capsule::{
    BASE, BaseFile, Capsule, CapsuleError, Environment, JOURNAL, Numbers, RECIPE, TRAIN, VERSIONS,
    Versions,
};
use crate::ledger::{Body, Hash, Step};

/// A run, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Side {
    /// Its id.
    pub run: String,
    /// The resolved recipe: values by path, such as `optimizer.lr`.
    pub recipe: BTreeMap<String, String>,
    /// Tokens of the budget; none when this version does not understand the recipe.
    pub budget: Option<u64>,
    /// BLAKE3 of the training data's manifest, by the ledger; none before the data was known.
    pub manifest: Option<Hash>,
    /// What the manifest says.
    pub dataset: Option<Dataset>,
    /// Length and hash of the files of the base.
    pub base: Option<BTreeMap<String, String>>,
    /// What checkpoints were written with, by step.
    pub environments: Vec<Environment>,
    /// Workers of each generation.
    pub worlds: BTreeMap<u64, u64>,
    /// The steps that stand, from the first.
    pub steps: Vec<Step>,
    /// Steps after which others were taken back, and why.
    pub voids: Vec<(u64, String)>,
    /// What is kept of what steps came to.
    pub numbers: BTreeMap<u64, Numbers>,
}

/// The part of a dataset's manifest that is compared.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Dataset {
    /// BLAKE3 of the tokenizer.
    pub tokenizer: String,
    /// Its files, in order.
    pub files: Vec<DataFile>,
    /// Everything else that is plain.
    #[serde(flatten)]
    pub settings: BTreeMap<String, serde_json::Value>,
}

/// A file of a dataset.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DataFile {
    /// Its name.
    pub name: String,
    /// BLAKE3 of its bytes.
    pub blake3: String,
}

/// Consecutive steps of one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stretch {
    /// The generation.
    pub generation: u64,
    /// First step.
    pub first_step: u64,
    /// Last step.
    pub last_step: u64,
    /// Its workers; `null` when nobody knows any more.
    pub world: Option<u64>,
}

impl Side {
    /// Reads a capsule.
    ///
    /// # Errors
    /// A member that is not what it should be.
    pub fn of(capsule: &Capsule) -> Result<Side, CapsuleError> {
        let text = |name: &str| -> Result<&str, CapsuleError> {
            let bytes = capsule.member(name).unwrap_or_default();
            str::from_utf8(bytes).map_err(|error| damaged(name, error.to_string()))
        };
        let (recipe, budget) = recipe(text(RECIPE)?)?;
        let base: Option<BTreeMap<String, BaseFile>> = json(capsule, BASE)?;
        let versions: Option<Versions> = json(capsule, VERSIONS)?;
        let mut side = Side {
            run: capsule.index().run.clone(),
            recipe,
            budget,
            dataset: json(capsule, TRAIN)?,
            base: base.map(|files| {
                let of = |file: BaseFile| format!("{} bytes, {}", file.bytes, file.hash.digits());
                files
                    .into_iter()
                    .map(|(name, file)| (name, of(file)))
                    .collect()
            }),
            environments: versions.unwrap_or_default().environments,
            worlds: worlds(text(JOURNAL)?)?,
            numbers: capsule.metrics()?,
            ..Side::default()
        };
        for record in capsule.ledger()? {
            side.record(record.body);
        }
        Ok(side)
    }

    fn record(&mut self, body: Body) {
        match body {
            Body::Open(open) => self.manifest = Some(open.manifest_hash),
            Body::Step(step) => self.steps.push(step),
            Body::Void {
                after_step, reason, ..
            } => {
                self.steps.truncate(after_step as usize);
                self.voids.push((after_step, reason));
            }
            Body::Durable { .. } | Body::Lost { .. } | Body::Evaluated(_) | Body::Close { .. } => {}
        }
    }

    /// The step, if it stands.
    pub fn step(&self, step: u64) -> Option<&Step> {
        self.steps.get((step as usize).checked_sub(1)?)
    }

    /// What a step came to, if that is kept.
    pub fn numbers(&self, step: u64) -> Option<&Numbers> {
        let generation = self.step(step)?.generation;
        let kept = self.numbers.get(&step);
        kept.filter(|numbers| numbers.generation == generation)
    }

    /// How many workers trained a step.
    pub fn world(&self, step: u64) -> Option<u64> {
        self.worlds.get(&self.step(step)?.generation).copied()
    }

    /// What a step was computed with: by the first checkpoint behind it, else by the last one.
    pub fn environment(&self, step: u64) -> Option<&Environment> {
        let behind = self.environments.iter().find(|known| known.step >= step);
        behind.or(self.environments.last())
    }

    /// The steps that stand, by generation.
    pub fn stretches(&self) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for step in &self.steps {
            match stretches.last_mut() {
                Some(last) if last.generation == step.generation => last.last_step = step.step,
                _ => stretches.push(Stretch {
                    generation: step.generation,
                    first_step: step.step,
                    last_step: step.step,
                    world: self.worlds.get(&step.generation).copied(),
                }),
            }
        }
        stretches
    }
}

fn damaged(name: &str, problem: String) -> CapsuleError {
    CapsuleError::Damaged {
        path: name.into(),
        problem,
    }
}

fn json<T: for<'de> Deserialize<'de>>(
    capsule: &Capsule,
    name: &str,
) -> Result<Option<T>, CapsuleError> {
    let parse = |bytes| serde_json::from_slice(bytes);
    let parsed = capsule.member(name).map(parse).transpose();
    parsed.map_err(|error| damaged(name, error.to_string()))
}

/// Every value of a recipe by its path, and the budget. One of an older version gets the defaults of keys that came since.
fn recipe(text: &str) -> Result<(BTreeMap<String, String>, Option<u64>), CapsuleError> {
    let known = Recipe::parse(text, RECIPE).ok();
    let whole = known.as_ref().map(Recipe::to_yaml);
    let value: serde_yaml::Value = serde_yaml::from_str(whole.as_deref().unwrap_or(text))
        .map_err(|error| damaged(RECIPE, error.to_string()))?;
    let mut values = BTreeMap::new();
    flatten(String::new(), &value, &mut values);
    Ok((values, known.map(|recipe| recipe.budget.tokens())))
}

fn flatten(path: String, value: &serde_yaml::Value, values: &mut BTreeMap<String, String>) {
    let Some(mapping) = value.as_mapping() else {
        values.insert(path, plain(value));
        return;
    };
    for (key, value) in mapping {
        let key = plain(key);
        let path = if path.is_empty() {
            key
        } else {
            format!("{path}.{key}")
        };
        flatten(path, value, values);
    }
}

/// A value on one line.
fn plain(value: &serde_yaml::Value) -> String {
    match value {
        serde_yaml::Value::String(text) => text.clone(),
        serde_yaml::Value::Sequence(items) => {
            let items: Vec<String> = items.iter().map(plain).collect();
            format!("[{}]", items.join(", "))
        }
        other => serde_yaml::to_string(other)
            .unwrap_or_default()
            .trim_end()
            .to_owned(),
    }
}

/// How many workers each generation had, by the journal's facts.
fn worlds(facts: &str) -> Result<BTreeMap<u64, u64>, CapsuleError> {
    #[derive(Deserialize)]
    struct Fact {
        fact: String,
        generation: Option<u64>,
        members: Option<Vec<String>>,
    }
    let mut worlds = BTreeMap::new();
    for line in facts.lines() {
        let fact: Fact =
            serde_json::from_str(line).map_err(|error| damaged(JOURNAL, error.to_string()))?;
        if let ("formed", Some(generation), Some(members)) =
            (fact.fact.as_str(), fact.generation, fact.members)
        {
            worlds.insert(generation, members.len() as u64);
        }
    }
    Ok(worlds)
}
