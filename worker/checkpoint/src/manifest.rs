//! The manifest of a checkpoint: JSON, one object.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

use crate::StoredError;

/// Version of the checkpoint's layout that this program writes.
///
/// - 1: rank 0 wrote everything; a file is proved as a whole.
/// - 2: every rank writes its own part; large files are proved group by group.
/// - 3: it carries the run's ledger, [`LEDGER`].
pub const FORMAT: u32 = 3;

/// Versions that this program reads.
pub const READABLE: std::ops::RangeInclusive<u32> = 1..=FORMAT;

/// The file that holds the run's ledger up to [`Manifest::ledger_head`], a record a line, as the coordinator gave it.
///
/// All of it, not only what came since the checkpoint before: that one may be deleted, and one checkpoint alone, wherever it
/// was taken, is to be enough to rebuild its run. A step takes 370 bytes, 100 billion tokens in steps of 2 Mi 18 MB.
pub const LEDGER: &str = "ledger.jsonl";

/// What a checkpoint holds and where it comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// One of [`READABLE`].
    pub format: u32,
    /// `supra_recipes::plan::VERSION`: the meaning of sample numbers.
    pub plan_version: u32,
    /// The run that wrote it.
    pub run: String,
    /// The generation that wrote it.
    pub generation: u64,
    /// Ranks of that generation.
    pub world: u32,
    /// Steps of the plan behind this state, skipped ones included.
    pub step: u64,
    /// Target tokens behind this state.
    pub tokens: u64,
    /// First sample that this state has not seen. There is no other cursor: order is computed.
    pub next_sample: u64,
    /// Updates behind this state: AdamW's step counter, without skipped steps.
    pub updates: u64,
    /// The seeds of all randomness; nothing else random is alive between steps.
    pub seeds: Seeds,
    /// BLAKE3 of masters, moments and update counter, as `Formed` and step reports state it, hexadecimal.
    pub replica_hash: String,
    /// BLAKE3 head of the run's ledger behind this step, hexadecimal: a ledger that lost its end after this shows.
    /// Empty in checkpoints of the builds that did not ask for it.
    #[serde(default)]
    pub ledger_head: String,
    /// The resolved recipe, YAML.
    pub recipe: String,
    /// BLAKE3 of the training data's manifest, hexadecimal.
    pub dataset: String,
    /// BLAKE3 of the tokenizer that made the data, hexadecimal.
    pub tokenizer: String,
    /// What else the bits depend on.
    pub environment: Environment,
    /// What the run has measured of this state; absent where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
    /// Every tensor by name; moments as `exp_avg.NAME` and `exp_avg_sq.NAME`.
    pub tensors: BTreeMap<String, StoredTensor>,
    /// Every other file of the directory by name.
    pub files: BTreeMap<String, StoredFile>,
}

/// What was measured of a state while it was trained. A number is absent where it was not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Loss on held-out text, where it was due.
    pub heldout: Option<HeldoutLoss>,
    /// Linearisation gates, of a SUPRA model.
    pub gates: Option<MeasuredGates>,
}

/// Loss on held-out text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeldoutLoss {
    /// Mean cross-entropy per target, nats.
    pub loss: Option<f64>,
    /// Windows that were read, and targets in them.
    pub windows: u64,
    /// See `windows`.
    pub targets: u64,
}

/// The worst of each linearisation gate over all blocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MeasuredGates {
    /// Greatest difference between logits of the parallel and of the recurrent form.
    pub form_error: Option<f64>,
    /// Relative difference of a block's attention from the base's.
    pub drift: Option<f64>,
    /// Share of a block's features that are always zero.
    pub dead_features: Option<f64>,
    /// How many times what it was before the first step the input of a block's head norms is.
    pub norm_growth: Option<f64>,
}

/// Seeds of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seeds {
    /// Initial values of new weights.
    pub init: u64,
    /// Order of the data.
    pub data: u64,
}

/// What has to be equal, beside recipe, data and world size, for a resumed run to be equal to the bit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// Version and commit of the program.
    pub build: String,
    /// Version of libtorch.
    pub libtorch: String,
    /// "cpu" or "cuda".
    pub device: String,
    /// GPU model, or architecture and vector instructions.
    pub model: String,
    /// Intra-op threads.
    pub threads: u32,
    /// Version and algorithm of NCCL; empty where no GPUs add.
    #[serde(default)]
    pub nccl: String,
}

/// One tensor and where its elements are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTensor {
    /// Shape of the whole tensor.
    pub shape: Vec<i64>,
    /// Element type in safetensors' words; "F32" or "BF16".
    pub dtype: String,
    /// Pieces that together cover the flattened tensor.
    pub slices: Vec<Slice>,
}

/// A range of a flattened tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slice {
    /// File of the checkpoint.
    pub file: String,
    /// Key in that file.
    pub key: String,
    /// First element.
    pub start: i64,
    /// One past the last element.
    pub end: i64,
}

/// Size and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3, hexadecimal.
    pub blake3: String,
    /// Of a file of more than [`GROUP`](crate::tree::GROUP) bytes: the chaining value of each group, hexadecimal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
}

impl Manifest {
    /// The bytes that are written and hashed.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(self).expect("invariant: a manifest has only string keys");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a manifest that `path` held.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Manifest, StoredError> {
        let damaged = |problem| StoredError::Damaged {
            path: path.to_owned(),
            problem,
        };
        // The format first: a later one may have other fields.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let Format { format } = serde_json::from_slice(bytes)
            .map_err(|error| damaged(format!("not a checkpoint manifest: {error}")))?;
        if !READABLE.contains(&format) {
            return Err(StoredError::Foreign {
                path: path.to_owned(),
                problem: format!(
                    "it has checkpoint format {format}, this program reads formats {} to {}",
                    READABLE.start(),
                    READABLE.end()
                ),
            });
        }
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|error| damaged(error.to_string()))?;
        for (name, stored) in &manifest.files {
            if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
                return Err(damaged(format!(
                    "it names the file {name:?} outside the checkpoint"
                )));
            }
            if !stored.is_consistent() {
                return Err(damaged(format!(
                    "the groups of {name} are not those of its hash"
                )));
            }
        }
        Ok(manifest)
    }
}

impl Environment {
    /// What differs between the writer's environment and this one, for people; empty if bits can be equal.
    pub fn differences(&self, here: &Environment) -> Vec<String> {
        let threads = |environment: &Environment| environment.threads.to_string();
        [
            ("build", self.build.clone(), here.build.clone()),
            ("libtorch", self.libtorch.clone(), here.libtorch.clone()),
            ("device", self.device.clone(), here.device.clone()),
            ("hardware", self.model.clone(), here.model.clone()),
            ("threads", threads(self), threads(here)),
            ("NCCL", self.nccl.clone(), here.nccl.clone()),
        ]
        .into_iter()
        .filter(|(_, then, now)| then != now)
        .map(|(what, then, now)| format!("{what} {then} -> {now}"))
        .collect()
    }
}
