//! Configurations of open_lm and linear_open_lm: a model's JSON file, and `params.txt`, which a run leaves beside its
//! checkpoints. A value of the JSON file precedes one of the run.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::config_json::{fields, unsupported};
use crate::model::ModelError;

/// Reads `params.txt` (lines `name: value`) and, from beside it, the JSON file of the model that it names.
pub fn read_run(path: &Path) -> Result<Value, ModelError> {
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|source| ModelError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })
    };
    let text = read(path)?;
    let lines = text.lines().filter_map(|line| line.split_once(": "));
    let mut run: Map<String, Value> = lines
        .map(|(name, value)| (name.trim().to_owned(), scalar(value.trim())))
        .collect();
    let model = run.get("model").and_then(Value::as_str).unwrap_or_default();
    let name = Path::new(model).file_stem().unwrap_or_default();
    let beside = path.with_file_name(format!("{}.json", name.display()));
    if name.is_empty() || !beside.is_file() {
        return Err(ModelError::Config {
            path: path.to_owned(),
            reason: format!(
                "the run was of the model `{model}`; copy its configuration from open_lm/model_configs to {}, or write a \
                 config.json",
                beside.display()
            ),
        });
    }
    let model = serde_json::from_str(&read(&beside)?);
    let model: Map<String, Value> = model.map_err(|source| ModelError::Json {
        path: beside,
        source,
    })?;
    run.extend(model);
    Ok(Value::Object(run))
}

/// A value as Python prints it.
fn scalar(text: &str) -> Value {
    match text {
        "None" => Value::Null,
        "True" => json!(true),
        "False" => json!(false),
        text => serde_json::from_str(text).unwrap_or_else(|_| json!(text)),
    }
}

/// The same configuration in the field names of the released models, with what open_lm assumes where a field is missing.
pub fn released(path: &Path, json: Value) -> Result<Value, ModelError> {
    let given: Map<String, Value> = fields(path, json)?;
    let get = |name: &str| given.get(name).filter(|value| !value.is_null()).cloned();
    for (field, plain) in [
        ("post_embed_norm", json!(false)),
        ("moe_freq", json!(0)),
        ("rotary_scale", json!(1.0)),
    ] {
        let same = |found: &Value| match (found.as_f64(), plain.as_f64()) {
            (Some(found), Some(plain)) => found == plain,
            _ => *found == plain,
        };
        if let Some(found) = get(field).filter(|found| !same(found)) {
            return Err(unsupported(path, field, found, &plain.to_string()));
        }
    }
    let heads = get("n_heads");
    let feed_forward = get("intermediate_dim_ffn").or_else(|| {
        // The first multiple of 256 from two thirds of 4 D on.
        let dim = get("hidden_dim")?.as_i64()?;
        Some(json!(
            (dim.checked_mul(8)? / 3).checked_add(255)? / 256 * 256
        ))
    });
    let feed_forward_type = get("ffn_type").filter(|name| name != "swiglu_torch");
    let mut json = json!({
        "dim": get("hidden_dim"),
        "intermediate_dim_ffn": feed_forward,
        "n_heads": heads,
        "n_heads_kv": get("n_heads_kv").or(heads.clone()),
        "norm_type": get("model_norm").unwrap_or(json!("default_layer_norm")),
        "attn_name": get("attn_name").unwrap_or(json!("auto")),
        "apply_qk_norm": get("qk_norm"),
        "ffn_type": feed_forward_type,
    });
    for name in [
        "n_layers",
        "vocab_size",
        "norm_eps",
        "seq_len",
        "weight_tying",
        "qk_head_dim",
        "v_head_dim",
        "positional_embedding_type",
        "rotary_base_frequency",
        "use_decay",
        "use_retnet_slopes",
        "decay_start",
    ] {
        json[name] = get(name).unwrap_or(Value::Null);
    }
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_run_are_read_as_python_prints_them() {
        let read = [
            "None",
            "True",
            "3e-05",
            "-7",
            "linear_1b",
            "[1, 2]",
            "['a']",
        ]
        .map(scalar);
        let expected = [
            Value::Null,
            json!(true),
            json!(3e-5),
            json!(-7),
            json!("linear_1b"),
            json!([1, 2]),
            json!("['a']"),
        ];
        assert_eq!(read, expected);
    }

    #[test]
    fn what_is_missing_is_what_open_lm_assumes() {
        let path = Path::new("m.json");
        let small = json!({"hidden_dim": 4096, "n_heads": 32, "model_norm": "rms_norm", "ffn_type": "swiglu_torch"});
        let json = released(path, small.clone()).unwrap();
        assert_eq!(json["intermediate_dim_ffn"], 11008);
        assert_eq!(
            (&json["n_heads_kv"], &json["attn_name"]),
            (&json!(32), &json!("auto"))
        );
        assert_eq!(
            (&json["ffn_type"], &json["norm_type"]),
            (&Value::Null, &json!("rms_norm"))
        );
        for (field, value) in [
            ("post_embed_norm", json!(true)),
            ("moe_freq", json!(2)),
            ("rotary_scale", json!(0.5)),
        ] {
            let mut other = small.clone();
            other[field] = value;
            let complaint = released(path, other).unwrap_err().to_string();
            assert!(complaint.contains(field), "{complaint}");
        }
    }
}
