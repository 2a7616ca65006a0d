//! Models as Meta and Mistral publish them themselves: `params.json` and `consolidated.*`.
//!
//! The names are those of the first Llama code. Two things differ from everybody else's files: large models are cut for as many
//! devices as they were trained on, and the rows of queries and keys are in the order of an interleaved rotary embedding.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tch::Tensor;

use super::config_json::{fields, unsupported};
use super::tensors::TensorFiles;
use crate::model::{AttentionKind, ModelConfig, ModelError};

const DEFAULT_THETA: f64 = 10_000.0;
const DEFAULT_EPS: f64 = 1e-5;
const DEFAULT_POSITIONS: i64 = 2048;

/// Both programs' fields, and those that would change what the model computes.
#[derive(Deserialize)]
struct Fields {
    dim: i64,
    n_layers: i64,
    n_heads: i64,
    n_kv_heads: Option<i64>,
    head_dim: Option<i64>,
    /// Mistral's. Llama's files say how to compute it.
    hidden_dim: Option<i64>,
    multiple_of: Option<i64>,
    ffn_dim_multiplier: Option<f64>,
    vocab_size: i64,
    norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    sliding_window: Option<Value>,
    max_seq_len: Option<i64>,
    #[serde(flatten)]
    others: serde_json::Map<String, Value>,
}

/// The model that a `params.json` describes. `model` is where its weights lie: some files leave the vocabulary to them.
pub fn parse(path: &Path, json: Value, model: &Path) -> Result<ModelConfig, ModelError> {
    let fields: Fields = fields(path, json)?;
    let harmless = |value: &Value| matches!(value, Value::Null | Value::Bool(false));
    for field in [
        "use_scaled_rope",
        "rope_scaling",
        "yarn",
        "moe",
        "quantization",
        "quantization_args",
        "vision_encoder",
    ] {
        if let Some(value) = fields.others.get(field).filter(|value| !harmless(value)) {
            return Err(unsupported(path, field, value, "absent"));
        }
    }
    let sliding_window = match fields
        .sliding_window
        .as_ref()
        .filter(|value| !value.is_null())
    {
        None => None,
        Some(window) => match window.as_i64() {
            Some(tokens) => Some(tokens),
            None => {
                return Err(unsupported(
                    path,
                    "sliding_window",
                    window,
                    "a number of tokens",
                ));
            }
        },
    };
    let head_dim = fields.dim.checked_div(fields.n_heads).unwrap_or(0);
    if let Some(declared) = fields.head_dim.filter(|&declared| declared != head_dim) {
        let supported = format!("dim / n_heads = {head_dim}");
        return Err(unsupported(path, "head_dim", declared, &supported));
    }
    Ok(ModelConfig {
        vocab: vocabulary(&fields, model)?,
        dim: fields.dim,
        layers: fields.n_layers,
        heads: fields.n_heads,
        kv_heads: fields.n_kv_heads.unwrap_or(fields.n_heads),
        head_dim,
        ffn: feed_forward(path, &fields)?,
        norm_eps: fields.norm_eps.unwrap_or(DEFAULT_EPS),
        rope_theta: theta(path, &fields)?,
        tied: false,
        attention: AttentionKind::Softmax,
        max_positions: fields.max_seq_len.unwrap_or(DEFAULT_POSITIONS),
        sliding_window,
        bos: None,
        eos: Vec::new(),
    })
}

/// Llama 2 says -1: as many as the tokenizer has, for which the embedding was made.
fn vocabulary(fields: &Fields, model: &Path) -> Result<i64, ModelError> {
    if fields.vocab_size != -1 {
        return Ok(fields.vocab_size);
    }
    let shape = TensorFiles::open(model)?.shape("tok_embeddings.weight");
    Ok(shape.and_then(|shape| shape.first().copied()).unwrap_or(-1))
}

/// F, which Llama's code computes: two thirds of 4 D, times a factor, rounded up.
fn feed_forward(path: &Path, fields: &Fields) -> Result<i64, ModelError> {
    let (width, factor) = match (fields.hidden_dim, fields.multiple_of) {
        (Some(width), _) => return Ok(width),
        (None, Some(multiple)) if multiple > 0 => (fields.dim.saturating_mul(8) / 3, multiple),
        _ => {
            let found = "missing, as is `multiple_of`";
            return Err(unsupported(path, "hidden_dim", found, "one of the two"));
        }
    };
    let width = match fields.ffn_dim_multiplier {
        Some(multiplier) => (multiplier * width as f64) as i64,
        None => width,
    };
    Ok(width.saturating_add(factor - 1) / factor * factor)
}

/// Where it is missing, Llama's code and Mistral's code for its first model take 10000, and Mistral's later code a million.
fn theta(path: &Path, fields: &Fields) -> Result<f64, ModelError> {
    let known = fields.hidden_dim.is_none() || fields.sliding_window.is_some();
    match fields.rope_theta {
        Some(theta) => Ok(theta),
        None if known => Ok(DEFAULT_THETA),
        None => Err(unsupported(
            path,
            "rope_theta",
            "missing, and Mistral's programs have taken different values for that",
            "a number: 1000000.0 since Mistral 7B v0.2",
        )),
    }
}

/// How a tensor was cut for several devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Not at all: every file has all of it.
    Copies,
    /// Along this axis, in the order of the files.
    Along(i64),
}

impl Cut {
    /// By name and shape of the first part; `width` is D.
    pub fn of(name: &str, part: &[i64], width: Option<i64>) -> Cut {
        match part {
            // Norms and rotary tables.
            [] | [_] => Cut::Copies,
            // Llama 3 cut the vocabulary, its ancestors the channels.
            [_, columns] if name == "tok_embeddings.weight" => {
                Cut::Along(i64::from(Some(*columns) != width))
            }
            // These multiply what the devices have computed of a token: each takes its channels.
            _ if name.ends_with(".wo.weight") || name.ends_with(".w2.weight") => Cut::Along(1),
            _ => Cut::Along(0),
        }
    }

    /// The shape of the whole, or in words why these are not its parts.
    pub fn join(self, parts: &[Vec<i64>]) -> Result<(Cut, Vec<i64>), String> {
        let differ = || format!("its parts have the shapes {parts:?}");
        let mut whole = parts.first().cloned().unwrap_or_default();
        let axis = match self {
            Cut::Copies if parts.iter().all(|part| *part == whole) => return Ok((self, whole)),
            Cut::Copies => return Err(differ()),
            Cut::Along(axis) => axis as usize,
        };
        for part in &parts[1..] {
            let along = part.get(axis).copied().unwrap_or(0);
            let mut same = part.clone();
            if let (Some(size), Some(total)) = (same.get_mut(axis), whole.get_mut(axis)) {
                *size = *total;
                if same != whole {
                    return Err(differ());
                }
                whole[axis] += along;
            } else {
                return Err(differ());
            }
        }
        Ok((self, whole))
    }
}

/// Puts the rows of queries or keys, [heads * d, D], in the order of the half-split rotary embedding: per head, row 2p + r
/// becomes row r d/2 + p.
pub fn half_split(rows: &Tensor, heads: i64) -> Result<Tensor, ModelError> {
    let [total, columns] = rows.size2()?.into();
    let pairs = total / heads / 2;
    Ok(rows
        .f_view([heads, pairs, 2, columns])?
        .f_transpose(1, 2)?
        .f_reshape([total, columns])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_become_halves() {
        let rows = Tensor::arange(16, (tch::Kind::Float, tch::Device::Cpu)).view([8, 2]);
        let halves = half_split(&rows, 2).unwrap();
        let first: Vec<f64> = Vec::try_from(halves.select(1, 0)).unwrap();
        assert_eq!(first, [0.0, 4.0, 2.0, 6.0, 8.0, 12.0, 10.0, 14.0]);
    }

    #[test]
    fn parts_are_joined_by_name() {
        let cut = |name: &str, part: &[i64]| Cut::of(name, part, Some(64));
        assert_eq!(
            cut("layers.0.attention.wq.weight", &[32, 64]),
            Cut::Along(0)
        );
        assert_eq!(
            cut("layers.0.attention.wo.weight", &[64, 32]),
            Cut::Along(1)
        );
        assert_eq!(
            cut("layers.0.feed_forward.w2.weight", &[64, 80]),
            Cut::Along(1)
        );
        assert_eq!(cut("tok_embeddings.weight", &[97, 32]), Cut::Along(1));
        assert_eq!(cut("tok_embeddings.weight", &[49, 64]), Cut::Along(0));
        assert_eq!(cut("layers.0.ffn_norm.weight", &[64]), Cut::Copies);
        let join = |cut: Cut, parts: &[&[i64]]| {
            let parts: Vec<Vec<i64>> = parts.iter().map(|part| part.to_vec()).collect();
            cut.join(&parts).map(|(_, shape)| shape)
        };
        assert_eq!(
            join(Cut::Along(0), &[&[49, 64], &[48, 64]]).unwrap(),
            [97, 64]
        );
        assert!(join(Cut::Along(0), &[&[49, 64], &[48, 32]]).is_err());
        assert!(join(Cut::Along(1), &[&[49, 64], &[49]]).is_err());
        assert!(join(Cut::Copies, &[&[64], &[32]]).is_err());
    }

    #[test]
    fn published_parameters_give_published_models() {
        let model = |text: &str| {
            let json = serde_json::from_str(text).unwrap();
            parse(Path::new("params.json"), json, Path::new("nowhere"))
        };
        let llama = model(
            r#"{"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                "n_layers": 80, "norm_eps": 1e-05, "vocab_size": 32000}"#,
        )
        .unwrap();
        assert_eq!(
            (llama.ffn, llama.kv_heads, llama.rope_theta),
            (28672, 8, 1e4)
        );
        let seven = r#"{"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "vocab_size": 32000}"#;
        assert_eq!(model(seven).unwrap().ffn, 11008);
        let mistral = |more: &str| {
            model(&format!(
                r#"{{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
                     "norm_eps": 1e-05, "vocab_size": 32768{more}}}"#
            ))
        };
        assert_eq!(
            mistral(r#", "rope_theta": 1000000.0"#).unwrap().rope_theta,
            1e6
        );
        let first = mistral(r#", "sliding_window": 4096"#).unwrap();
        assert_eq!((first.rope_theta, first.sliding_window), (1e4, Some(4096)));
        for (more, word) in [
            ("", "`rope_theta`"),
            (r#", "rope_theta": 1e6, "moe": {"num_experts": 8}"#, "`moe`"),
            (
                r#", "rope_theta": 5e5, "use_scaled_rope": true"#,
                "`use_scaled_rope`",
            ),
            (
                r#", "rope_theta": 1e6, "sliding_window": [512, 4096]"#,
                "`sliding_window`",
            ),
        ] {
            let complaint = mistral(more).unwrap_err().to_string();
            assert!(complaint.contains(word), "{complaint}");
        }
    }
}
