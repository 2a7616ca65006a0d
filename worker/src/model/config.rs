//! The shape of a model.

use std::path::Path;

use supra_recipes::plan::ModelShape;
use supra_recipes::schema::Shape;
// A recipe chooses among these, so the recipe's types are the model's.
pub use supra_recipes::schema::{Decay, RopeFrequencies};

use super::ModelError;
use super::files::{config_json, huggingface, meta, open_lm, published};

/// Everything about a model but its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// V: tokens of the vocabulary.
    pub vocab: i64,
    /// D: width of the residual stream.
    pub dim: i64,
    /// Transformer blocks.
    pub layers: i64,
    /// H: query heads.
    pub heads: i64,
    /// K: key/value heads; divides H.
    pub kv_heads: i64,
    /// d = e = D/H: channels of a head.
    pub head_dim: i64,
    /// F: width of the feed-forward layer.
    pub ffn: i64,
    /// Epsilon of the RMS norms. The norm of SUPRA's heads has its own.
    pub norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Whether the embedding matrix is also the output matrix.
    pub tied: bool,
    /// How tokens see each other.
    pub attention: AttentionKind,
    /// Positions that the base was trained on: information, not a limit.
    pub max_positions: i64,
    /// The softmax base sees only so many tokens back. Implemented is full attention, so sequences must not be longer:
    /// see [`ModelConfig::check_sequence_length`].
    pub sliding_window: Option<i64>,
    /// Token that begins a text, as the configuration names it.
    pub bos: Option<i64>,
    /// Tokens that end a text, as the configuration names them.
    pub eos: Vec<i64>,
}

/// How tokens see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionKind {
    /// Causal softmax attention: the base.
    Softmax,
    /// SUPRA's linear attention.
    Supra(SupraConfig),
}

/// The choices that SUPRA leaves open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SupraConfig {
    /// Fixed decay of each head.
    pub decay: Decay,
    /// One norm over the queries of all heads, one over the keys, after the feature map.
    pub qk_norm: bool,
    /// Rounding of the rotary frequencies.
    pub rope_frequencies: RopeFrequencies,
    /// Tokens of a chunk in the chunkwise form. Changes speed and memory, not the result; not stored with a model.
    pub chunk: i64,
}

impl SupraConfig {
    /// The chunk of a model for which nobody has chosen one.
    pub const DEFAULT_CHUNK: i64 = 64;
}

impl Default for SupraConfig {
    fn default() -> SupraConfig {
        SupraConfig {
            decay: Decay::Alibi,
            qk_norm: false,
            rope_frequencies: RopeFrequencies::Exact,
            chunk: SupraConfig::DEFAULT_CHUNK,
        }
    }
}

impl ModelConfig {
    /// Reads the configuration of a model directory, or of the one that holds the file of weights that is named: `config.json` in
    /// the field names of Hugging Face (Llama, Mistral), of published SUPRA models or of open_lm, Meta's `params.json`, or
    /// open_lm's `params.txt`.
    pub fn load(model: &Path) -> Result<ModelConfig, ModelError> {
        let (path, json) = config_json::read(model)?;
        let config = match config_json::Dialect::of(&path, &json)? {
            config_json::Dialect::HuggingFace => huggingface::parse(&path, json)?,
            config_json::Dialect::Published => published::parse(&path, json)?,
            config_json::Dialect::OpenLm => {
                published::parse(&path, open_lm::released(&path, json)?)?
            }
            config_json::Dialect::Meta => meta::parse(&path, json, model)?,
        };
        config
            .check()
            .map_err(|reason| ModelError::Config { path, reason })?;
        Ok(config)
    }

    /// The softmax model of a shape that people know, as published but for a sliding window: random weights have not been
    /// trained with one.
    pub fn named(shape: Shape) -> ModelConfig {
        let ModelShape {
            vocab,
            dim,
            layers,
            heads,
            kv_heads,
            ffn,
            tied,
        } = shape.into();
        ModelConfig {
            vocab: vocab.cast_signed(),
            dim: dim.cast_signed(),
            layers: layers.cast_signed(),
            heads: heads.cast_signed(),
            kv_heads: kv_heads.cast_signed(),
            head_dim: dim.cast_signed() / heads.cast_signed(),
            ffn: ffn.cast_signed(),
            norm_eps: 1e-5,
            rope_theta: 1e4,
            tied,
            attention: AttentionKind::Softmax,
            max_positions: match shape {
                Shape::Mistral7b => 32768,
                Shape::Llama2_7b => 4096,
            },
            sliding_window: None,
            bos: Some(1),
            eos: vec![2],
        }
    }

    /// Writes `config.json` in the published field names, which can say everything that this type can.
    pub fn save(&self, dir: &Path) -> Result<(), ModelError> {
        config_json::write(dir, &published::render(self))
    }

    /// The same model with another attention. Linear attention has no window.
    pub fn with_attention(self, attention: AttentionKind) -> ModelConfig {
        let sliding_window = match attention {
            AttentionKind::Softmax => self.sliding_window,
            AttentionKind::Supra(_) => None,
        };
        ModelConfig {
            attention,
            sliding_window,
            ..self
        }
    }

    /// The choices of a SUPRA model; none for a softmax model.
    pub fn supra(&self) -> Option<&SupraConfig> {
        match &self.attention {
            AttentionKind::Supra(supra) => Some(supra),
            AttentionKind::Softmax => None,
        }
    }

    /// The dimensions that a plan counts with.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            vocab: self.vocab.cast_unsigned(),
            dim: self.dim.cast_unsigned(),
            layers: self.layers.cast_unsigned(),
            heads: self.heads.cast_unsigned(),
            kv_heads: self.kv_heads.cast_unsigned(),
            ffn: self.ffn.cast_unsigned(),
            tied: self.tied,
        }
    }

    /// Query heads that share one key/value head.
    pub fn group(&self) -> i64 {
        self.heads / self.kv_heads
    }

    /// Refuses sequences on which the base would have looked through its sliding window.
    pub fn check_sequence_length(&self, tokens: i64) -> Result<(), ModelError> {
        match self.sliding_window {
            Some(window) if window < tokens => Err(ModelError::Unfit(format!(
                "the base has a sliding window of {window} tokens (`sliding_window` in its config.json), shorter than the \
                 sequence of {tokens}; use sequences of at most {window} tokens"
            ))),
            _ => Ok(()),
        }
    }

    /// What makes the numbers impossible, if anything.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("vocabulary", self.vocab),
            ("model width", self.dim),
            ("number of layers", self.layers),
            ("number of heads", self.heads),
            ("number of key/value heads", self.kv_heads),
            ("feed-forward width", self.ffn),
            ("number of positions", self.max_positions),
            ("sliding window", self.sliding_window.unwrap_or(1)),
        ] {
            // The upper bound keeps every product of two sizes inside an i64.
            if !(1..=1 << 30).contains(&value) {
                return Err(format!(
                    "the {name} is {value}; it must lie between 1 and 2^30"
                ));
            }
        }
        if self.dim != self.heads * self.head_dim {
            return Err(format!(
                "{} heads of {} channels do not make a width of {}; only head_dim = width / heads is supported",
                self.heads, self.head_dim, self.dim
            ));
        }
        if self.heads % self.kv_heads != 0 {
            return Err(format!(
                "{} query heads cannot share {} key/value heads evenly",
                self.heads, self.kv_heads
            ));
        }
        if self.head_dim % 2 != 0 {
            return Err(format!(
                "rotary embedding needs an even number of channels per head, not {}",
                self.head_dim
            ));
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(format!(
                "the norm's epsilon is {}; it must lie between 0 and 1",
                self.norm_eps
            ));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return Err(format!(
                "the rotary base is {}; it must be above 1",
                self.rope_theta
            ));
        }
        match self.supra() {
            Some(supra) if supra.chunk < 1 => Err(format!(
                "a chunk of {} tokens; it must have at least 1",
                supra.chunk
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small model for tests.
    pub(crate) fn small(attention: AttentionKind) -> ModelConfig {
        ModelConfig {
            vocab: 50,
            dim: 64,
            layers: 2,
            heads: 4,
            kv_heads: 1,
            head_dim: 16,
            ffn: 96,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            tied: false,
            attention,
            max_positions: 128,
            sliding_window: None,
            bos: None,
            eos: Vec::new(),
        }
    }

    #[test]
    fn weights_have_the_published_names() {
        let names = |attention| {
            small(attention)
                .params()
                .into_iter()
                .map(|spec| spec.name)
                .collect::<Vec<_>>()
        };
        let supra = names(AttentionKind::Supra(SupraConfig {
            qk_norm: true,
            ..SupraConfig::default()
        }));
        assert_eq!(
            &supra[..8],
            [
                "tok_embeddings.weight",
                "layers.0.attention_norm.weight",
                "layers.0.attention.in_proj.weight",
                "layers.0.attention._totrain_embed.weight",
                "layers.0.attention._totrain_embed.bias",
                "layers.0.attention._totrain_embed_kv.weight",
                "layers.0.attention._totrain_embed_kv.bias",
                "layers.0.attention._totrain_q_norm.weight",
            ]
        );
        assert_eq!(&supra[supra.len() - 2..], ["norm.weight", "output.weight"]);
        let base: Vec<String> = supra
            .into_iter()
            .filter(|name| !name.contains("_totrain_"))
            .collect();
        assert_eq!(names(AttentionKind::Softmax), base);
    }

    #[test]
    fn the_published_model_has_its_size() {
        let supra = AttentionKind::Supra(SupraConfig::default());
        let mistral = ModelConfig::named(Shape::Mistral7b).with_attention(supra);
        mistral.check().unwrap();
        let elements = |config: &ModelConfig| {
            config
                .params()
                .iter()
                .map(|spec| spec.elements())
                .sum::<i64>()
        };
        assert_eq!(elements(&mistral), 7_812_321_280);
        assert_eq!(
            elements(&mistral.clone().with_attention(AttentionKind::Softmax)),
            7_812_321_280 - 570_589_184
        );
    }
}
