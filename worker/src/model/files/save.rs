//! From weights to a model directory: complete, or not there at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::json;
use tch::{Kind, Tensor};

use super::layout::Layout;
use super::{config_json, huggingface, published, tensors};
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
    /// What other programs expect. Softmax models: Hugging Face's Llama (or Mistral). SUPRA models: published names
    /// behind `model.`, as the released model has them.
    Interchange {
        /// Float, BFloat16 or Half.
        kind: Kind,
    },
}

impl SaveFormat {
    fn kind(self) -> Kind {
        match self {
            SaveFormat::Native => Kind::Float,
            SaveFormat::Interchange { kind } => kind,
        }
    }

    fn layout(self, config: &ModelConfig) -> Layout {
        match (self, config.supra()) {
            (SaveFormat::Native, _) => Layout::Published {
                prefix: String::new(),
            },
            (SaveFormat::Interchange { .. }, Some(_)) => Layout::Published {
                prefix: "model.".to_owned(),
            },
            (SaveFormat::Interchange { .. }, None) => Layout::HuggingFace,
        }
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
) -> Result<(), ModelError> {
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
) -> Result<(), ModelError> {
    let draft = Draft::begin(dir)?;
    let (layout, kind) = (format.layout(config), format.kind());
    match layout {
        Layout::HuggingFace => {
            config_json::write(&draft.path, &huggingface::render(config, dtype_name(kind)))?
        }
        Layout::Published { .. } => config_json::write(&draft.path, &published::render(config))?,
    }
    write_weights(&draft.path, config, params, &layout, kind, SHARD_BYTES)?;
    if let Some(from) = companions_from {
        copy_companions(from, &draft.path)?;
    }
    for (name, bytes) in further {
        let path = draft.path.join(name);
        fs::write(&path, bytes).map_err(|source| ModelError::Io {
            action: "write",
            path,
            source,
        })?;
    }
    draft.publish()
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
    config: &ModelConfig,
    params: &Params,
    layout: &Layout,
    kind: Kind,
    shard_bytes: u64,
) -> Result<(), ModelError> {
    let mut shards: Vec<Vec<(String, Tensor)>> = vec![Vec::new()];
    let (mut total, mut in_shard) = (0, 0);
    for spec in config.params() {
        let pieces = layout.pieces(config, &spec).ok_or_else(|| {
            ModelError::Unfit(format!(
                "`{}` has no name in Hugging Face's layout of softmax models",
                spec.name
            ))
        })?;
        let mut row = 0;
        for piece in pieces {
            let part = params.get(&spec.name).narrow(0, row, piece.shape[0]);
            row += piece.shape[0];
            let bytes = part.numel() as u64 * kind.elt_size_in_bytes() as u64;
            if in_shard > 0 && in_shard + bytes > shard_bytes {
                shards.push(Vec::new());
                in_shard = 0;
            }
            in_shard += bytes;
            total += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push((piece.name, part));
            }
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

/// A directory under construction, beside its final place; removed unless it is published.
struct Draft {
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Draft {
    fn begin(target: &Path) -> Result<Draft, ModelError> {
        let occupied = || ModelError::Occupied {
            path: target.to_owned(),
        };
        let free = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(source) => source.kind() == std::io::ErrorKind::NotFound,
        };
        if !free {
            return Err(occupied());
        }
        let name = target.file_name().ok_or_else(occupied)?;
        let path = target.with_file_name(format!(
            ".{}.partial-{}",
            name.display(),
            std::process::id()
        ));
        let io = |source| ModelError::Io {
            action: "create",
            path: path.clone(),
            source,
        };
        if path.exists() {
            fs::remove_dir_all(&path).map_err(io)?;
        }
        fs::create_dir_all(&path).map_err(io)?;
        Ok(Draft {
            path: path.clone(),
            target: target.to_owned(),
            published: false,
        })
    }

    fn publish(mut self) -> Result<(), ModelError> {
        let io = |source| ModelError::Io {
            action: "create",
            path: self.target.clone(),
            source,
        };
        for entry in fs::read_dir(&self.path).map_err(io)? {
            entry
                .and_then(|entry| File::open(entry.path())?.sync_all())
                .map_err(io)?;
        }
        fs::rename(&self.path, &self.target).map_err(io)?;
        // The name is on the disk when the directory that holds it is.
        let parent = self
            .target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(io)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
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
        write_weights(dir.path(), &config, &params, &layout, Kind::Float, limit).unwrap();
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
