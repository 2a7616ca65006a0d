//! The recipe's structures and their defaults, which are the paper's unless said otherwise (`docs/recipes.md`).

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::base::Base;
use super::chaos::Chaos;
use super::eval::Eval;
use super::interval::CheckpointInterval;
use super::period::Period;
use super::units::{Fraction, RunName, Tokens, Warmup};
use super::{bounds, paths};

/// What share of the pretraining tokens an uptraining takes unless the recipe says otherwise: the paper's 5 %.
pub(super) const DEFAULT_FRACTION: f64 = 0.05;

/// Everything that defines a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name of the run.
    pub name: RunName,
    /// Seed of the initialisation of new weights, and of the rounding of bf16 moments.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// The model that training begins with.
    pub base: Base,
    /// What attention the trained model has.
    #[serde(default)]
    pub attention: Attention,
    /// Details of the model and of its arithmetic.
    #[serde(default)]
    pub model: Model,
    /// The tokens, and how they are ordered.
    pub data: Data,
    /// How many tokens are trained.
    pub budget: Budget,
    /// What one optimizer step takes.
    #[serde(default)]
    pub batch: Batch,
    /// AdamW and its schedule.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// How GPUs add their gradients.
    #[serde(default)]
    pub reduction: Reduction,
    /// When and where checkpoints are written.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// How many workers train together.
    #[serde(default)]
    pub workers: Workers,
    /// What workers do without their coordinator.
    #[serde(default)]
    pub coordinator: Coordinator,
    /// What happens when loss or gradient is not finite.
    #[serde(default)]
    pub nonfinite: NonFinite,
    /// How often replicas compare their parameters.
    #[serde(default)]
    pub replica_check: ReplicaCheck,
    /// What is compared after a restore.
    #[serde(default)]
    pub resume: Resume,
    /// What the run measures of itself while it trains; nothing unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<Eval>,
    /// Faults that the run inflicts on its own workers; none unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chaos: Option<Chaos>,
    /// What ranks keep in host memory to go on from when one of them dies.
    #[serde(default)]
    pub recovery: Recovery,
}

fn default_seed() -> u64 {
    17
}

/// Kind of attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Attention {
    /// Linear attention with a learned feature map, fixed decay and per-head norm (arXiv 2405.06640).
    #[default]
    Supra,
    /// The base's own softmax attention: pretraining and baselines.
    Softmax,
}

/// Fixed decay per head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// `exp(-s)` with the ALiBi slopes `s` (the released models).
    #[default]
    Alibi,
    /// RetNet's `1 - 2^(-5-h)`.
    Retnet,
    /// No decay.
    None,
}

/// How rotary frequencies are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RopeFrequencies {
    /// Not at all.
    #[default]
    Exact,
    /// To bf16, which reproduces the released models.
    Bf16,
}

/// Form of floating-point numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bfloat16.
    #[default]
    Bf16,
    /// IEEE single precision.
    Fp32,
}

/// Details of the model and of its arithmetic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Fixed decay per head.
    pub decay: Decay,
    /// Whether queries and keys are normalised after the feature map.
    pub qk_norm: bool,
    /// How rotary frequencies are rounded.
    pub rope_frequencies: RopeFrequencies,
    /// Tokens per chunk of the chunkwise form; the result does not depend on it beyond rounding.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub chunk: u32,
    /// Arithmetic of forward and backward; masters and accumulation are fp32 either way.
    pub precision: Precision,
}

impl Default for Model {
    fn default() -> Self {
        Model {
            decay: Decay::default(),
            qk_norm: false,
            rope_frequencies: RopeFrequencies::default(),
            chunk: 64,
            precision: Precision::default(),
        }
    }
}

/// The tokens, and how they are ordered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// Dataset manifest, or the directory that holds it as `dataset.json`.
    #[serde(deserialize_with = "paths::path", serialize_with = "paths::write")]
    pub train: PathBuf,
    /// Manifest of the held-out part, for `eval`.
    #[serde(
        default,
        deserialize_with = "paths::optional_path",
        serialize_with = "paths::write_optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub heldout: Option<PathBuf>,
    /// Seed of the sample order.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// Whether attention state, decay and positions begin anew with each document; `false` is the paper's packing.
    #[serde(default = "default_true")]
    pub reset_at_document: bool,
    /// Whether a dataset smaller than the budget is gone through again, in another order.
    #[serde(default)]
    pub repeat: bool,
}

fn default_true() -> bool {
    true
}

/// How many tokens are trained: `tokens`, or `pretraining_tokens` times `fraction`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Tokens that the base was pretrained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pretraining_tokens: Option<Tokens>,
    /// Share of them, 0.05 unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Fraction>,
    /// The budget itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
}

impl Budget {
    /// A budget of exactly `tokens`.
    pub fn exactly(tokens: Tokens) -> Budget {
        Budget {
            pretraining_tokens: None,
            fraction: None,
            tokens: Some(tokens),
        }
    }

    /// Tokens to train, rounded to the nearest whole token.
    pub fn tokens(&self) -> u64 {
        match (self.tokens, self.pretraining_tokens) {
            (Some(tokens), _) => tokens.0,
            (None, Some(pretraining)) => {
                let fraction = self
                    .fraction
                    .map_or(DEFAULT_FRACTION, |fraction| fraction.0);
                (pretraining.0 as f64 * fraction).round() as u64
            }
            (None, None) => 0,
        }
    }
}

/// What the forward pass keeps for the backward pass; the rest is computed again, to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// The first of `save`, `lean` and `recompute` that fits the memory of a worker's GPU; on a processor `save`.
    #[default]
    Auto,
    /// Everything.
    Save,
    /// What matrix products and attention made: elementwise work is done again.
    Lean,
    /// Each block's input: the whole block is computed again.
    Recompute,
}

/// What one optimizer step takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Batch {
    /// Tokens per optimizer step over all workers; a multiple of `sequence_length`.
    pub tokens: Tokens,
    /// Samples that one worker puts through the model at once.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub micro_batch: u32,
    /// What the forward pass keeps for the backward pass; changes memory and speed only.
    pub activations: Activations,
    /// Tokens per sample.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub sequence_length: u32,
}

impl Batch {
    /// Samples per full step.
    pub fn samples(&self) -> u64 {
        self.tokens.0 / u64::from(self.sequence_length.max(1))
    }
}

impl Default for Batch {
    fn default() -> Self {
        Batch {
            tokens: Tokens(2 << 20),
            micro_batch: 4,
            activations: Activations::default(),
            sequence_length: 2048,
        }
    }
}

/// AdamW and its schedule: linear warm-up to `lr`, then a cosine down to `final_lr` at the end of the budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Highest learning rate.
    #[serde(deserialize_with = "bounds::positive")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Learning rate of the last step.
    #[serde(deserialize_with = "bounds::not_negative")]
    #[schemars(range(min = 0))]
    pub final_lr: f64,
    /// Length of the warm-up.
    pub warmup: Warmup,
    /// Decay rates of the two moments.
    #[serde(deserialize_with = "bounds::betas")]
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    #[serde(deserialize_with = "bounds::positive")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub eps: f64,
    /// Decoupled weight decay.
    #[serde(deserialize_with = "bounds::not_negative")]
    #[schemars(range(min = 0))]
    pub weight_decay: f64,
    /// Whether norms and biases decay too.
    pub decay_norms_and_biases: bool,
    /// Largest global gradient norm.
    #[serde(deserialize_with = "bounds::positive")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub clip: f64,
    /// Coefficient of the mean squared log-partition function.
    #[serde(deserialize_with = "bounds::not_negative")]
    #[schemars(range(min = 0))]
    pub z_loss: f64,
    /// Form in which the two moments are kept; bf16 is rounded at random, so that small updates are not lost.
    pub moments: Precision,
    /// What GPUs divide among themselves of what the optimizer keeps.
    pub sharding: Sharding,
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            lr: 3e-5,
            final_lr: 1e-5,
            warmup: Warmup::Steps(1000),
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
            decay_norms_and_biases: false,
            clip: 1.0,
            z_loss: 0.0,
            moments: Precision::Fp32,
            sharding: Sharding::default(),
        }
    }
}

/// What ranks divide among themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sharding {
    /// Nothing: every rank keeps all.
    #[default]
    None,
    /// Moments and remainders of masters, 1 / ranks each (ZeRO, arXiv 1910.02054, stage 1).
    Zero1,
}

/// How GPUs add their gradients. Between CPUs the order is always one that only the number of ranks decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Reduction {
    /// As NCCL does, around a ring: the last bits depend on where the ranks are.
    #[default]
    Nccl,
    /// In rank order, wherever the ranks are.
    Ordered,
}

/// When and where checkpoints are written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// A checkpoint is due at the step that reaches a multiple of this, and at the last step. `auto`: whenever the coordinator
    /// asks for one, by what a checkpoint costs and how often workers fail; and at the last step.
    pub every_tokens: CheckpointInterval,
    /// How many of the newest are kept.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub keep: u32,
    /// Of each multiple of so many tokens, the first checkpoint at or after it is kept, too, for ever; of none unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<Tokens>,
    /// Directory that all workers share, or `s3://bucket/prefix` or `gs://bucket/prefix`; the coordinator's state directory
    /// unless said.
    #[serde(
        deserialize_with = "paths::optional_store",
        serialize_with = "paths::write_optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub to: Option<PathBuf>,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Checkpoint {
            every_tokens: CheckpointInterval::Tokens(Tokens(1_000_000_000)),
            keep: 3,
            keep_every: None,
            to: None,
        }
    }
}

/// How many workers train together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// A generation forms with no fewer.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub min: u32,
    /// A generation takes no more.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub max: u32,
    /// How long a generation that could form with fewer waits after the last arrival for more; at most 10 min.
    pub grace: Period,
}

impl Default for Workers {
    fn default() -> Self {
        Workers {
            min: 1,
            max: 64,
            grace: Period::seconds(1),
        }
    }
}

/// What workers do without their coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Coordinator {
    /// How long workers train on while the coordinator is away, and how long one that starts again waits for them, there at
    /// least 3 s; 0: they leave at once; at most 1 h.
    pub away: Period,
}

impl Default for Coordinator {
    fn default() -> Self {
        Coordinator {
            away: Period::seconds(120),
        }
    }
}

/// What happens when loss or gradient is not finite.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NonFinite {
    /// More skipped steps in a row than this stop the run.
    pub max: u32,
}

impl Default for NonFinite {
    fn default() -> Self {
        NonFinite { max: 3 }
    }
}

/// How often replicas compare their parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicaCheck {
    /// Steps from one comparison to the next; the last step compares too.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub every_steps: u64,
}

impl Default for ReplicaCheck {
    fn default() -> Self {
        ReplicaCheck { every_steps: 50 }
    }
}

/// What is compared after a restore.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resume {
    /// Steps after a checkpoint that, when they have to be trained again, must come to what they came to before; 0 compares
    /// none, at most 1000.
    #[schemars(range(max = 1000))]
    pub verify_steps: u32,
}

impl Default for Resume {
    fn default() -> Self {
        // Loss and gradient of the first show the parameters that were restored, those of the second the moments.
        Resume { verify_steps: 2 }
    }
}

/// What ranks keep in host memory to go on from when one of them dies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recovery {
    /// With `optimizer.sharding: zero1`, steps from one copy of each rank's part of the state, in its own host memory and
    /// in another rank's, to the next; 0 keeps none. Without sharding every rank has all of the state anyway.
    pub snapshot_every: u32,
}

impl Default for Recovery {
    fn default() -> Self {
        Recovery { snapshot_every: 8 }
    }
}

/// The JSON Schema of a recipe, for editors.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Recipe);
    let mut text =
        serde_json::to_string_pretty(&schema).expect("invariant: a schema is plain JSON");
    text.push('\n');
    text
}
