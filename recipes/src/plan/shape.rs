//! The dimensions of a model, read from a `config.json` of Hugging Face or of a published SUPRA model, and its exact parameter
//! count.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::schema::{Attention, Shape};

/// The dimensions that decide what a model needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Rows of the embedding.
    pub vocab: u64,
    /// Width of the residual stream.
    pub dim: u64,
    /// Blocks.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of the feed-forward part.
    pub ffn: u64,
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// A `config.json` that gives no shape.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}; base.path must name a model directory with a config.json", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the JSON of a Llama, Mistral or SUPRA configuration.
    #[error("{path}: {source}; expected the config.json of a Llama, Mistral or SUPRA model", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The numbers fit no model.
    #[error("{path}: {reason}", path = path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The fields of `config.json` that matter here, by Hugging Face's names or the published ones; others are ignored.
#[derive(Deserialize)]
struct Config {
    vocab_size: u64,
    #[serde(alias = "dim")]
    hidden_size: u64,
    #[serde(alias = "n_layers")]
    num_hidden_layers: u64,
    #[serde(alias = "n_heads")]
    num_attention_heads: u64,
    #[serde(alias = "n_heads_kv")]
    num_key_value_heads: Option<u64>,
    #[serde(alias = "intermediate_dim_ffn")]
    intermediate_size: u64,
    head_dim: Option<u64>,
    #[serde(default, alias = "weight_tying")]
    tie_word_embeddings: bool,
}

impl ModelShape {
    /// Reads `config.json` of the model directory `directory`.
    ///
    /// # Errors
    /// When the file is missing, is not the configuration of a Llama-like model, or its numbers fit no model.
    pub fn load(directory: &Path) -> Result<ModelShape, ShapeError> {
        let path = directory.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ShapeError::Read {
            path: path.clone(),
            source,
        })?;
        ModelShape::parse(&text, &path)
    }

    /// Reads the text of a `config.json`; `path` appears in errors.
    ///
    /// # Errors
    /// As [`ModelShape::load`].
    pub fn parse(text: &str, path: &Path) -> Result<ModelShape, ShapeError> {
        let config: Config = serde_json::from_str(text).map_err(|source| ShapeError::Json {
            path: path.to_owned(),
            source,
        })?;
        let shape = ModelShape {
            vocab: config.vocab_size,
            dim: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            kv_heads: config
                .num_key_value_heads
                .unwrap_or(config.num_attention_heads),
            ffn: config.intermediate_size,
            tied: config.tie_word_embeddings,
        };
        match shape.unfit(config.head_dim) {
            Some(reason) => Err(ShapeError::Unfit {
                path: path.to_owned(),
                reason,
            }),
            None => Ok(shape),
        }
    }

    /// Why these numbers fit no model that can be trained here.
    fn unfit(&self, head_dim: Option<u64>) -> Option<String> {
        /// Far above any model, and low enough for all products here to fit 64 bits.
        const LARGEST: u64 = 1 << 20;
        let named = [
            ("vocab_size", self.vocab),
            ("hidden_size", self.dim),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("intermediate_size", self.ffn),
        ];
        if let Some((name, value)) = named
            .iter()
            .find(|(_, value)| !(1..=LARGEST).contains(value))
        {
            return Some(format!("{name} is {value}, expected 1 to {LARGEST}"));
        }
        if !self.dim.is_multiple_of(self.heads) {
            return Some(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                self.dim, self.heads
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return Some(format!(
                "num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            ));
        }
        let expected = self.head_dim();
        head_dim
            .filter(|head_dim| *head_dim != expected)
            .map(|head_dim| format!("head_dim {head_dim} is not supported, it must be hidden_size / heads = {expected}"))
    }

    /// Mistral 7B.
    pub const MISTRAL_7B: ModelShape = ModelShape {
        vocab: 32000,
        dim: 4096,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        ffn: 14336,
        tied: false,
    };

    /// Llama 2 7B.
    pub const LLAMA2_7B: ModelShape = ModelShape {
        kv_heads: 32,
        ffn: 11008,
        ..ModelShape::MISTRAL_7B
    };

    /// Channels per head.
    pub fn head_dim(&self) -> u64 {
        self.dim / self.heads
    }

    /// Floating-point operations per token, forward and backward, nothing computed twice: six for every entry of every
    /// matrix that a token meets, and for every product inside attention over `length` tokens in chunks of `chunk`.
    pub fn flops_per_token(&self, attention: Attention, length: u64, chunk: u64) -> f64 {
        let looked_up = if self.tied { 0 } else { self.vocab * self.dim };
        let shared_map = match attention {
            // Keys go through the queries' map.
            Attention::Supra if self.kv_heads == self.heads => self.layers * self.dim * self.dim,
            _ => 0,
        };
        let products_per_channel = match attention {
            // Into and out of the state, and inside the chunk.
            Attention::Supra => 2 * self.head_dim() + 2 * chunk,
            // Scores and their use, half of which the causal mask drops.
            Attention::Softmax => length,
        };
        let entries = self.parameters(attention, false) - looked_up + shared_map;
        6.0 * (entries + self.layers * self.dim * products_per_channel) as f64
    }

    /// Parameters of the model with this kind of attention: for [`Attention::Supra`] with the dense feature map over all
    /// query heads, a second one over the key heads where those are fewer, and the gains of q and k norms if asked for.
    pub fn parameters(&self, attention: Attention, qk_norm: bool) -> u64 {
        let [embedding, block, output] = self.buckets(attention, qk_norm);
        embedding + self.layers * block + output
    }

    /// The same of the embedding, of one block, and of what comes after the last: its norm and the output's matrix.
    pub fn buckets(&self, attention: Attention, qk_norm: bool) -> [u64; 3] {
        let keys = self.kv_heads * self.head_dim();
        let projections = (self.dim + 2 * keys) * self.dim + self.dim * self.dim;
        let feed_forward = 3 * self.dim * self.ffn;
        let norms = 2 * self.dim;
        let layer = projections + feed_forward + norms;
        let new = match attention {
            Attention::Softmax => 0,
            Attention::Supra => {
                let map = |width: u64| width * width + width;
                let second = if self.kv_heads == self.heads {
                    0
                } else {
                    map(keys)
                };
                let gains = if qk_norm { 2 * self.dim } else { 0 };
                map(self.dim) + second + gains
            }
        };
        let embedding = self.vocab * self.dim;
        let matrix = if self.tied { 0 } else { embedding };
        [embedding, layer + new, self.dim + matrix]
    }
}

impl From<Shape> for ModelShape {
    fn from(shape: Shape) -> ModelShape {
        match shape {
            Shape::Mistral7b => ModelShape::MISTRAL_7B,
            Shape::Llama2_7b => ModelShape::LLAMA2_7B,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_7b_models_take_46_39_gflop_per_token() {
        for shape in [ModelShape::MISTRAL_7B, ModelShape::LLAMA2_7B] {
            let flops = shape.flops_per_token(Attention::Supra, 2048, 64);
            assert!((flops / 46.39e9 - 1.0).abs() < 1e-3, "{shape:?}: {flops}");
        }
    }

    fn config(kv_heads: u64, ffn: u64) -> String {
        format!(
            r#"{{"architectures": ["MistralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": {kv_heads},
                 "intermediate_size": {ffn}, "tie_word_embeddings": false}}"#
        )
    }

    fn shape(text: &str) -> Result<ModelShape, ShapeError> {
        ModelShape::parse(text, Path::new("config.json"))
    }

    #[test]
    fn mistral_counts_as_released() {
        let mistral = shape(&config(8, 14336)).unwrap();
        assert_eq!(mistral, ModelShape::MISTRAL_7B);
        assert_eq!(mistral.parameters(Attention::Softmax, false), 7_241_732_096);
        assert_eq!(mistral.parameters(Attention::Supra, false), 7_812_321_280);
    }

    #[test]
    fn llama_shares_one_feature_map() {
        let llama = shape(&config(32, 11008)).unwrap();
        assert_eq!(llama, ModelShape::LLAMA2_7B);
        let added =
            llama.parameters(Attention::Supra, false) - llama.parameters(Attention::Softmax, false);
        assert_eq!(llama.parameters(Attention::Softmax, false), 6_738_415_616);
        assert_eq!(added, 537_001_984);
    }

    #[test]
    fn published_names_are_known() {
        let text = r#"{"model_type": "openlm", "vocab_size": 32000, "dim": 4096, "n_layers": 32, "n_heads": 32,
                       "n_heads_kv": 8, "intermediate_dim_ffn": 14336, "weight_tying": false}"#;
        assert_eq!(shape(text).unwrap(), ModelShape::MISTRAL_7B);
    }

    #[test]
    fn what_fits_no_model_is_named() {
        let error = |text: &str| shape(text).unwrap_err().to_string();
        assert!(error(&config(7, 11008)).contains("num_key_value_heads 7"));
        assert!(error(&config(0, 11008)).contains("num_key_value_heads is 0"));
        assert!(error("{}").contains("missing field `vocab_size`"));
        let wide = config(8, 14336).replacen('{', r#"{"head_dim": 256, "#, 1);
        assert!(error(&wide).contains("head_dim 256"));
    }
}
