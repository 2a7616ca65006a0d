//! `config.json` and what others have in its place: reading, writing, telling the dialects apart.

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{find, hub, open_lm};
use crate::model::ModelError;

/// Whose field names a `config.json` uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// Llama or Mistral as Hugging Face saves them.
    HuggingFace,
    /// The names of the published SUPRA checkpoints.
    Published,
    /// The names of open_lm's model configurations.
    OpenLm,
    /// Meta's or Mistral's own `params.json`.
    Meta,
}

impl Dialect {
    /// By `model_type`, or by `architectures` where that is missing; where both are, by the names of the fields.
    pub fn of(path: &Path, json: &Value) -> Result<Dialect, ModelError> {
        let architecture = json
            .get("architectures")
            .and_then(|names| names.get(0))
            .and_then(Value::as_str);
        let model_type = json.get("model_type").and_then(Value::as_str);
        let has = |field: &str| json.get(field).is_some();
        match (model_type, architecture) {
            (Some("openlm" | hub::MODEL_TYPE), _)
            | (None, Some("OpenLMForCausalLM" | hub::ARCHITECTURE)) => Ok(Dialect::Published),
            (Some("llama"), None | Some("LlamaForCausalLM")) | (None, Some("LlamaForCausalLM")) => {
                Ok(Dialect::HuggingFace)
            }
            (Some("mistral"), None | Some("MistralForCausalLM"))
            | (None, Some("MistralForCausalLM")) => Ok(Dialect::HuggingFace),
            (None, None) if has("dim") && has("attn_name") => Ok(Dialect::Published),
            (None, None) if has("dim") && has("n_layers") => Ok(Dialect::Meta),
            (None, None) if has("hidden_dim") && has("n_layers") => Ok(Dialect::OpenLm),
            _ => Err(ModelError::Unsupported {
                path: path.to_owned(),
                field: "architectures".to_owned(),
                found: match (architecture, model_type) {
                    (Some(architecture), _) => format!("`{architecture}`"),
                    (None, Some(model_type)) => format!("missing, with model_type `{model_type}`"),
                    (None, None) => "missing".to_owned(),
                },
                supported:
                    "LlamaForCausalLM, MistralForCausalLM, OpenLMForCausalLM, SupraForCausalLM"
                        .to_owned(),
            }),
        }
    }
}

/// Path and content of a model's configuration.
pub fn read(model: &Path) -> Result<(PathBuf, Value), ModelError> {
    let path = find::configuration(model);
    if path.extension().is_some_and(|extension| extension == "txt") {
        let json = open_lm::read_run(&path)?;
        return Ok((path, json));
    }
    let text = fs::read(&path).map_err(|source| ModelError::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let json = serde_json::from_slice(&text).map_err(|source| ModelError::Json {
        path: path.clone(),
        source,
    })?;
    Ok((path, json))
}

/// The fields of a `config.json`.
pub fn fields<T: DeserializeOwned>(path: &Path, json: Value) -> Result<T, ModelError> {
    serde_json::from_value(json).map_err(|source| ModelError::Json {
        path: path.to_owned(),
        source,
    })
}

/// Writes the directory's `config.json`.
pub fn write(dir: &Path, json: &Value) -> Result<(), ModelError> {
    let path = dir.join("config.json");
    let text = format!("{json:#}\n");
    fs::write(&path, text).map_err(|source| ModelError::Io {
        action: "write",
        path,
        source,
    })
}

/// Refuses what is not implemented, by name.
pub fn unsupported(path: &Path, field: &str, found: impl ToString, supported: &str) -> ModelError {
    ModelError::Unsupported {
        path: path.to_owned(),
        field: field.to_owned(),
        found: found.to_string(),
        supported: supported.to_owned(),
    }
}
