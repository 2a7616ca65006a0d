//! `config.json` of Hugging Face's Llama and Mistral models.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::config_json::{fields, unsupported};
use crate::model::{AttentionKind, ModelConfig, ModelError};

/// What both libraries assume where the field is missing.
const DEFAULT_THETA: f64 = 10_000.0;
const DEFAULT_EPS: f64 = 1e-6;
const DEFAULT_POSITIONS: i64 = 2048;

#[derive(Deserialize)]
struct Fields {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<i64>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    sliding_window: Option<i64>,
    use_sliding_window: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<Value>,
    bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
}

/// `eos_token_id` may be a number or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl OneOrMany {
    pub(super) fn into_vec(self) -> Vec<i64> {
        match self {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

/// `eos_token_id` as it is written: null, a number or a list.
pub(super) fn eos_json(eos: &[i64]) -> Value {
    match eos {
        [] => Value::Null,
        [id] => json!(id),
        ids => json!(ids),
    }
}

/// The model that a `config.json` describes.
pub fn parse(path: &Path, json: Value) -> Result<ModelConfig, ModelError> {
    let fields: Fields = fields(path, json)?;
    refuse_unsupported(path, &fields)?;
    let heads = fields.num_attention_heads;
    let head_dim = if heads > 0 {
        fields.hidden_size / heads
    } else {
        0
    };
    if let Some(declared) = fields.head_dim.filter(|&declared| declared != head_dim) {
        let supported = format!("hidden_size / num_attention_heads = {head_dim}");
        return Err(unsupported(path, "head_dim", declared, &supported));
    }
    let nested_theta = fields
        .rope_parameters
        .as_ref()
        .and_then(|rope| rope.get("rope_theta"))
        .and_then(Value::as_f64);
    Ok(ModelConfig {
        vocab: fields.vocab_size,
        dim: fields.hidden_size,
        layers: fields.num_hidden_layers,
        heads,
        kv_heads: fields.num_key_value_heads.unwrap_or(heads),
        head_dim,
        ffn: fields.intermediate_size,
        norm_eps: fields.rms_norm_eps.unwrap_or(DEFAULT_EPS),
        rope_theta: nested_theta.or(fields.rope_theta).unwrap_or(DEFAULT_THETA),
        tied: fields.tie_word_embeddings.unwrap_or(false),
        attention: AttentionKind::Softmax,
        max_positions: fields.max_position_embeddings.unwrap_or(DEFAULT_POSITIONS),
        sliding_window: fields
            .sliding_window
            .filter(|_| fields.use_sliding_window != Some(false)),
        bos: fields.bos_token_id,
        eos: fields
            .eos_token_id
            .map(OneOrMany::into_vec)
            .unwrap_or_default(),
    })
}

fn refuse_unsupported(path: &Path, fields: &Fields) -> Result<(), ModelError> {
    if let Some(scaling) = fields
        .rope_scaling
        .as_ref()
        .filter(|rope| !is_default_rope(rope))
    {
        return Err(unsupported(path, "rope_scaling", scaling, "null"));
    }
    if let Some(rope) = fields
        .rope_parameters
        .as_ref()
        .filter(|rope| !is_default_rope(rope))
    {
        return Err(unsupported(
            path,
            "rope_parameters",
            rope,
            "rope_type `default`",
        ));
    }
    for (field, value) in [
        ("attention_bias", fields.attention_bias),
        ("mlp_bias", fields.mlp_bias),
    ] {
        if value == Some(true) {
            return Err(unsupported(path, field, true, "false"));
        }
    }
    if let Some(activation) = fields.hidden_act.as_deref().filter(|&name| name != "silu") {
        return Err(unsupported(
            path,
            "hidden_act",
            format!("`{activation}`"),
            "`silu`",
        ));
    }
    if let Some(part) = fields.partial_rotary_factor.filter(|&part| part != 1.0) {
        return Err(unsupported(path, "partial_rotary_factor", part, "1.0"));
    }
    if fields.quantization_config.is_some() {
        return Err(unsupported(
            path,
            "quantization_config",
            "present",
            "unquantized weights",
        ));
    }
    Ok(())
}

/// Whether rotary parameters (in any of the library's spellings) change nothing but the base.
fn is_default_rope(rope: &Value) -> bool {
    let Some(entries) = rope.as_object() else {
        return rope.is_null();
    };
    entries.iter().all(|(key, value)| match key.as_str() {
        "rope_type" | "type" => value.as_str() == Some("default"),
        "rope_theta" => true,
        "partial_rotary_factor" | "factor" => value.as_f64() == Some(1.0),
        _ => value.is_null(),
    })
}

/// The `config.json` of a softmax model. It is a Llama, or a Mistral if it has a sliding window: the two differ in
/// nothing else here.
pub fn render(config: &ModelConfig, dtype: &str) -> Value {
    let (architecture, model_type) = match config.sliding_window {
        Some(_) => ("MistralForCausalLM", "mistral"),
        None => ("LlamaForCausalLM", "llama"),
    };
    let mut json = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "bos_token_id": config.bos,
        "eos_token_id": eos_json(&config.eos),
        "torch_dtype": dtype,
    });
    match config.sliding_window {
        Some(window) => json["sliding_window"] = json!(window),
        None => {
            json["attention_bias"] = json!(false);
            json["mlp_bias"] = json!(false);
        }
    }
    json
}
