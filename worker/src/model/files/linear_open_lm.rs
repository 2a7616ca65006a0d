//! What TRI-ML's linear_open_lm wants: its Hugging Face wrapper, and its training code.

use serde_json::{Value, json};

use super::published;
use crate::model::{Decay, ModelConfig, ModelError};

/// Prefix of the names in a directory for the wrapper.
pub const WRAPPER_PREFIX: &str = "model.";
/// The checkpoint of the training code.
pub const CHECKPOINT: &str = "epoch_0.pt";
/// What its option `--model` takes.
pub const TRAINING_CONFIG: &str = "config.json";

/// The epsilon of norms in the training code, which its configuration cannot change.
const TRAINING_NORM_EPS: f64 = 1e-5;

/// Refuses what linear_open_lm has no way to compute.
pub fn check(config: &ModelConfig, training: bool) -> Result<(), ModelError> {
    let alibi = config
        .supra()
        .is_some_and(|supra| supra.decay == Decay::Alibi);
    let remedy = "write the model with --format hf";
    if alibi && config.heads.count_ones() != 1 {
        return Err(ModelError::Unfit(format!(
            "linear_open_lm fails on {} heads, because its decay wants a power of two; {remedy}",
            config.heads
        )));
    }
    if training && config.norm_eps != TRAINING_NORM_EPS {
        return Err(ModelError::Unfit(format!(
            "the model's norms have an epsilon of {}, but linear_open_lm trains with {TRAINING_NORM_EPS} only; {remedy}, or \
             with --format openlm for inference",
            config.norm_eps
        )));
    }
    Ok(())
}

/// The configuration of the training code, in its own field names.
pub fn training_config(config: &ModelConfig) -> Value {
    let published = published::render(config);
    let mut json = json!({
        "hidden_dim": config.dim,
        "post_embed_norm": false,
        "model_norm": "rms_norm",
        "qk_norm": published["apply_qk_norm"],
        "rotary_base_frequency": config.rope_theta.round() as i64,
    });
    for field in [
        "intermediate_dim_ffn",
        "n_layers",
        "n_heads",
        "n_heads_kv",
        "qk_head_dim",
        "v_head_dim",
        "seq_len",
        "vocab_size",
        "weight_tying",
        "attn_name",
        "positional_embedding_type",
        "ffn_type",
        "use_decay",
        "use_retnet_slopes",
        "decay_start",
    ] {
        json[field] = published[field].clone();
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::small;
    use crate::model::{AttentionKind, SupraConfig};

    fn supra(decay: Decay) -> ModelConfig {
        small(AttentionKind::Supra(SupraConfig {
            decay,
            ..SupraConfig::default()
        }))
    }

    #[test]
    fn what_the_reference_cannot_compute_is_refused() {
        check(&supra(Decay::Alibi), true).unwrap();
        let six = |decay| ModelConfig {
            heads: 6,
            ..supra(decay)
        };
        let complaint = check(&six(Decay::Alibi), false).unwrap_err().to_string();
        assert!(
            complaint.contains("6 heads") && complaint.contains("--format hf"),
            "{complaint}"
        );
        check(&six(Decay::Retnet), false).unwrap();
        let fine = ModelConfig {
            norm_eps: 1e-6,
            ..supra(Decay::Alibi)
        };
        check(&fine, false).unwrap();
        let complaint = check(&fine, true).unwrap_err().to_string();
        assert!(complaint.contains("0.000001"), "{complaint}");
    }

    #[test]
    fn the_training_configuration_says_how_many_heads_share_a_key() {
        let json = training_config(&supra(Decay::Alibi));
        assert_eq!(json["n_heads_kv"], 1);
        assert_eq!(json["hidden_dim"], 64);
        assert_eq!(json["use_decay"], true);
        let fields = json.as_object().unwrap().iter();
        let unset: Vec<&String> = fields
            .filter(|(_, value)| value.is_null())
            .map(|(field, _)| field)
            .collect();
        assert_eq!(unset, ["decay_start"], "the others have no default there");
    }
}
