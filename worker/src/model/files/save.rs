//! From weights to a model directory: complete, or not there at all.

use std::fs;
use std::path::Path;

use serde_json::json;
use tch::{Kind, Tensor};

use super::draft::Draft;
use super::inventory::{self, SaveReport};
use super::layout::Layout;
use super::tensors::TensorFiles;
use super::{config_json, hub, huggingface, linear_open_lm, published, tensors, torch_save};
use crate::model::{ModelConfig, ModelError, Params};

/// A file is never larger, so that it fits every object store and file system.
const SHARD_BYTES: u64 = 4 << 30;

/// What makes a tokenizer, whoever trained it, and what goes with generation.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// How a directory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveFormat {
    /// Published names, fp32: what this program works with.
    Native,
    /// What the transformers library loads. Softmax models: its own Llama (or Mistral). SUPRA models: published names behind
    /// `model.`, as the released model has them, with the code that computes them.
    HuggingFace {
        /// Float, BFloat16 or Half.
        kind: Kind,
    },
    /// What linear_open_lm's wrapper of that library loads.
    OpenLm {
        /// Float, BFloat16 or Half.
        kind: Kind,
    },
    /// A checkpoint of linear_open_lm's training code.
    OpenLmTraining {
        /// Float, BFloat16 or Half.
        kind: Kind,
    },
}

impl SaveFormat {
    fn kind(self) -> Kind {
        match self {
            SaveFormat::Native => Kind::Float,
            SaveFormat::HuggingFace { kind }
            | SaveFormat::OpenLm { kind }
            | SaveFormat::OpenLmTraining { kind } => kind,
        }
    }

    fn layout(self, config: &ModelConfig) -> Layout {
        let published = |prefix: &str| Layout::Published {
            prefix: prefix.to_owned(),
        };
        match (self, config.supra()) {
            (SaveFormat::Native | SaveFormat::OpenLmTraining { .. }, _) => published(""),
            (SaveFormat::HuggingFace { .. }, None) => Layout::HuggingFace,
            (SaveFormat::HuggingFace { .. }, Some(_)) | (SaveFormat::OpenLm { .. }, _) => {
                published(linear_open_lm::WRAPPER_PREFIX)
            }
        }
    }

    /// Whether readers want the output matrix of a tied model, too.
    fn repeats_tied(self) -> bool {
        matches!(
            self,
            SaveFormat::OpenLm { .. } | SaveFormat::OpenLmTraining { .. }
        )
    }
}

/// Writes configuration, weights and the tokenizer of `companions_from` to a new directory. It appears under its name
/// only when it is complete and on the disk.
pub fn save_model(
    dir: &Path,
    config: &ModelConfig,
    params: &Params,
    companions_from: Option<&Path>,
    format: SaveFormat,
) -> Result<SaveReport, ModelError> {
    save_model_with(dir, config, params, companions_from, format, &[])
}

/// As [`save_model`], with further files, by name, beside those.
pub fn save_model_with(
    dir: &Path,
    config: &ModelConfig,
    params: &Params,
    companions_from: Option<&Path>,
    format: SaveFormat,
    further: &[(&str, &[u8])],
) -> Result<SaveReport, ModelError> {
    let kind = format.kind();
    if format.repeats_tied() {
        linear_open_lm::check(config, matches!(format, SaveFormat::OpenLmTraining { .. }))?;
    }
    let draft = Draft::begin(dir)?;
    let layout = format.layout(config);
    let (tensors, report) = inventory::list(config, params, &layout, format.repeats_tied())?;
    let expected = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.size()))
        .collect();
    if let Some(from) = companions_from {
        copy_companions(from, &draft.path)?;
    }
    match format {
        SaveFormat::HuggingFace { .. } if config.supra().is_some() => {
            config_json::write(&draft.path, &hub::render(config, dtype_name(kind)))?;
            hub::complete(&draft, config)?;
        }
        SaveFormat::HuggingFace { .. } => {
            config_json::write(&draft.path, &huggingface::render(config, dtype_name(kind)))?;
        }
        SaveFormat::Native | SaveFormat::OpenLm { .. } => {
            config_json::write(&draft.path, &published::render(config))?;
        }
        SaveFormat::OpenLmTraining { .. } => {
            let text = format!("{:#}\n", linear_open_lm::training_config(config));
            draft.write(linear_open_lm::TRAINING_CONFIG, text.as_bytes())?;
        }
    }
    if let SaveFormat::OpenLmTraining { .. } = format {
        let facts = [
            ("epoch", torch_save::Value::Number(0)),
            ("name", torch_save::Value::Text("supra")),
        ];
        let path = draft.path.join(linear_open_lm::CHECKPOINT);
        torch_save::write(&path, &facts, &tensors, kind)?;
    } else {
        write_weights(&draft.path, tensors, kind, SHARD_BYTES)?;
        let files = TensorFiles::open(&draft.path)?;
        let shape = |name: &str| Some((name.to_owned(), files.shape(name)?));
        inventory::check(dir, &expected, &files.names().filter_map(shape).collect())?;
    }
    for (name, bytes) in further {
        draft.write(name, bytes)?;
    }
    draft.publish()?;
    Ok(report)
}

/// Copies the tokenizer's files and the generation settings, as many as there are.
pub fn copy_companions(from: &Path, to: &Path) -> Result<(), ModelError> {
    for name in COMPANIONS {
        let source = from.join(name);
        if source.is_file() {
            let target = to.join(name);
            fs::copy(&source, &target).map_err(|source| ModelError::Io {
                action: "write",
                path: target,
                source,
            })?;
        }
    }
    Ok(())
}

/// Writes the weights as one file, or as shards with an index where they are larger than `shard_bytes`.
fn write_weights(
    dir: &Path,
    tensors: Vec<(String, Tensor)>,
    kind: Kind,
    shard_bytes: u64,
) -> Result<(), ModelError> {
    let mut shards: Vec<Vec<(String, Tensor)>> = vec![Vec::new()];
    let (mut total, mut in_shard) = (0, 0);
    for (name, tensor) in tensors {
        let bytes = tensor.numel() as u64 * kind.elt_size_in_bytes() as u64;
        if in_shard > 0 && in_shard + bytes > shard_bytes {
            shards.push(Vec::new());
            in_shard = 0;
        }
        in_shard += bytes;
        total += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push((name, tensor));
        }
    }
    // Kinds change shard by shard, so that a large model is not copied as a whole.
    let convert = |shard: Vec<(String, Tensor)>| {
        shard
            .into_iter()
            .map(move |(name, part)| (name, part.detach().to_kind(kind)))
    };
    let count = shards.len();
    if count == 1 {
        return shards
            .into_iter()
            .try_for_each(|shard| tensors::write(&dir.join(tensors::SINGLE), convert(shard)));
    }
    let mut weight_map = serde_json::Map::new();
    for (shard, number) in shards.into_iter().zip(1..) {
        let name = format!("model-{number:05}-of-{count:05}.safetensors");
        weight_map.extend(
            shard
                .iter()
                .map(|(tensor, _)| (tensor.clone(), json!(name))),
        );
        tensors::write(&dir.join(name), convert(shard))?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let path = dir.join(tensors::INDEX);
    fs::write(&path, format!("{index:#}\n")).map_err(|source| ModelError::Io {
        action: "write",
        path,
        source,
    })
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Half => "float16",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::tests::small;
    use crate::model::{AttentionKind, NewWeights, SupraConfig, init_all, load_params};

    #[test]
    fn a_large_model_is_cut_into_shards() {
        let config = small(AttentionKind::Supra(SupraConfig::default()));
        let params = init_all(&config, 1);
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::Published {
            prefix: "model.".to_owned(),
        };
        let limit = 12 << 10;
        let (tensors, _) = inventory::list(&config, &params, &layout, false).unwrap();
        write_weights(dir.path(), tensors, Kind::Float, limit).unwrap();
        let files = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len());
        let sizes: Vec<u64> = files.collect();
        assert!(sizes.len() > 4, "{sizes:?}");
        // A tensor is never cut, and headers come on top.
        let largest = params
            .iter()
            .map(|(_, tensor)| tensor.numel() as u64 * 4)
            .max()
            .unwrap();
        assert!(
            sizes.iter().all(|&size| size < limit.max(largest) + 2048),
            "{sizes:?}"
        );
        let (read, _) = load_params(dir.path(), &config, NewWeights::Refuse).unwrap();
        assert!(
            read.iter()
                .zip(params.iter())
                .all(|((_, read), (_, written))| read == written)
        );
    }
}
