//! `config.json` in the field names of the published SUPRA checkpoints.
//!
//! Fields beyond the published ones are written only where they differ from what a reader of those would assume:
//! `rotary_base_frequency` (10000), `rope_frequencies` (exact), `sliding_window`, `bos_token_id`, `eos_token_id`.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::config_json::{fields, unsupported};
use super::huggingface::{OneOrMany, eos_json};
use crate::model::{AttentionKind, Decay, ModelConfig, ModelError, RopeFrequencies, SupraConfig};

const LINEAR: &str = "linear_attn";
/// What the reference code calls softmax attention; they differ in implementation only.
const SOFTMAX: [&str; 4] = ["torch_attn", "xformers_attn", "flash_attn", "auto"];
const DEFAULT_THETA: f64 = 10_000.0;

#[derive(Deserialize)]
struct Fields {
    dim: i64,
    intermediate_dim_ffn: i64,
    n_layers: i64,
    n_heads: i64,
    /// The reference code assumes 8 where it is missing.
    n_heads_kv: Option<i64>,
    vocab_size: i64,
    norm_eps: Option<f64>,
    seq_len: Option<i64>,
    weight_tying: Option<bool>,
    apply_qk_norm: Option<bool>,
    qk_head_dim: Option<i64>,
    v_head_dim: Option<i64>,
    norm_type: Option<String>,
    attn_name: String,
    positional_embedding_type: Option<String>,
    ffn_type: Option<String>,
    use_decay: Option<bool>,
    use_retnet_slopes: Option<bool>,
    decay_start: Option<f64>,
    rotary_base_frequency: Option<f64>,
    rope_frequencies: Option<String>,
    sliding_window: Option<i64>,
    bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
}

/// The model that a `config.json` describes.
pub fn parse(path: &Path, json: Value) -> Result<ModelConfig, ModelError> {
    let fields: Fields = fields(path, json)?;
    refuse_unsupported(path, &fields)?;
    let head_dim = if fields.n_heads > 0 {
        fields.dim / fields.n_heads
    } else {
        0
    };
    for (field, value) in [
        ("qk_head_dim", fields.qk_head_dim),
        ("v_head_dim", fields.v_head_dim),
    ] {
        // -1 is the reference code's way to say D/H.
        if let Some(declared) = value.filter(|&declared| declared != head_dim && declared != -1) {
            return Err(unsupported(
                path,
                field,
                declared,
                &format!("dim / n_heads = {head_dim}"),
            ));
        }
    }
    Ok(ModelConfig {
        vocab: fields.vocab_size,
        dim: fields.dim,
        layers: fields.n_layers,
        heads: fields.n_heads,
        kv_heads: fields.n_heads_kv.unwrap_or(8),
        head_dim,
        ffn: fields.intermediate_dim_ffn,
        norm_eps: fields.norm_eps.unwrap_or(1e-5),
        rope_theta: fields.rotary_base_frequency.unwrap_or(DEFAULT_THETA),
        tied: fields.weight_tying.unwrap_or(false),
        attention: attention(path, &fields)?,
        max_positions: fields.seq_len.unwrap_or(2048),
        sliding_window: fields.sliding_window,
        bos: fields.bos_token_id,
        eos: fields
            .eos_token_id
            .map(OneOrMany::into_vec)
            .unwrap_or_default(),
    })
}

fn attention(path: &Path, fields: &Fields) -> Result<AttentionKind, ModelError> {
    let qk_norm = fields.apply_qk_norm.unwrap_or(false);
    if SOFTMAX.contains(&fields.attn_name.as_str()) {
        return match qk_norm {
            true => Err(unsupported(
                path,
                "apply_qk_norm",
                "true with softmax attention",
                "false",
            )),
            false => Ok(AttentionKind::Softmax),
        };
    }
    let decay = match (fields.use_decay, fields.use_retnet_slopes) {
        (Some(false), _) => Decay::None,
        (Some(true), Some(true)) => Decay::Retnet,
        (Some(true), _) => Decay::Alibi,
        (None, _) => return Err(unsupported(path, "use_decay", "missing", "true or false")),
    };
    let rope_frequencies = match fields.rope_frequencies.as_deref() {
        None | Some("exact") => RopeFrequencies::Exact,
        Some("bf16") => RopeFrequencies::Bf16,
        Some(other) => {
            return Err(unsupported(
                path,
                "rope_frequencies",
                format!("`{other}`"),
                "`exact`, `bf16`",
            ));
        }
    };
    Ok(AttentionKind::Supra(SupraConfig {
        decay,
        qk_norm,
        rope_frequencies,
        ..SupraConfig::default()
    }))
}

fn refuse_unsupported(path: &Path, fields: &Fields) -> Result<(), ModelError> {
    let only = |field, value: &Option<String>, supported: &str| match value.as_deref() {
        Some(found) if found != supported => Err(unsupported(
            path,
            field,
            format!("`{found}`"),
            &format!("`{supported}`"),
        )),
        _ => Ok(()),
    };
    only("norm_type", &fields.norm_type, "rms_norm")?;
    only(
        "positional_embedding_type",
        &fields.positional_embedding_type,
        "rotary",
    )?;
    only("ffn_type", &fields.ffn_type, "swiglu")?;
    if fields.attn_name != LINEAR && !SOFTMAX.contains(&fields.attn_name.as_str()) {
        let supported = format!("`{LINEAR}`, `{}`", SOFTMAX.join("`, `"));
        return Err(unsupported(
            path,
            "attn_name",
            format!("`{}`", fields.attn_name),
            &supported,
        ));
    }
    if let Some(start) = fields.decay_start {
        return Err(unsupported(path, "decay_start", start, "null"));
    }
    Ok(())
}

/// The `config.json` of a model.
pub fn render(config: &ModelConfig) -> Value {
    let supra = config.supra();
    let mut json = json!({
        "architectures": ["OpenLMForCausalLM"],
        "model_type": "openlm",
        "dim": config.dim,
        "intermediate_dim_ffn": config.ffn,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_heads_kv": config.kv_heads,
        "vocab_size": config.vocab,
        "norm_eps": config.norm_eps,
        "seq_len": config.max_positions,
        "weight_tying": config.tied,
        "apply_qk_norm": supra.is_some_and(|supra| supra.qk_norm),
        "qk_head_dim": config.head_dim,
        "v_head_dim": config.head_dim,
        "norm_type": "rms_norm",
        "attn_name": supra.map_or(SOFTMAX[0], |_| LINEAR),
        "positional_embedding_type": "rotary",
        "ffn_type": "swiglu",
        "use_decay": supra.is_some_and(|supra| supra.decay != Decay::None),
        "use_retnet_slopes": supra.is_some_and(|supra| supra.decay == Decay::Retnet),
        "decay_start": null,
    });
    if config.rope_theta != DEFAULT_THETA {
        json["rotary_base_frequency"] = json!(config.rope_theta);
    }
    if supra.is_some_and(|supra| supra.rope_frequencies == RopeFrequencies::Bf16) {
        json["rope_frequencies"] = json!("bf16");
    }
    if let Some(window) = config.sliding_window {
        json["sliding_window"] = json!(window);
    }
    if let Some(bos) = config.bos {
        json["bos_token_id"] = json!(bos);
    }
    if !config.eos.is_empty() {
        json["eos_token_id"] = eos_json(&config.eos);
    }
    json
}
