//! Which files of a model directory hold its weights and its configuration.

use std::fs;
use std::path::{Path, PathBuf};

use super::tensors::{INDEX, SINGLE};
use crate::model::ModelError;

/// What Hugging Face's library wrote before safetensors, and its index.
const PYTORCH_SINGLE: &str = "pytorch_model.bin";
const PYTORCH_INDEX: &str = "pytorch_model.bin.index.json";
/// Mistral's own file. Meta's have numbers: `consolidated.00.pth`.
const CONSOLIDATED: &str = "consolidated.safetensors";
/// Where open_lm keeps `epoch_N.pt`, below the folder of the run.
const CHECKPOINTS: &str = "checkpoints";

/// The files that hold the weights.
#[derive(Debug, PartialEq, Eq)]
pub enum Weights {
    /// Files of which each holds other tensors.
    Files(Vec<PathBuf>),
    /// The index that names such files.
    Indexed(PathBuf),
    /// Files of which each holds a part of every tensor, in order.
    Cut(Vec<PathBuf>),
}

/// The directory of a model that is named by its directory or by a file of weights in it.
pub fn directory(model: &Path) -> &Path {
    match model.parent() {
        Some(parent) if model.is_file() && parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) if model.is_file() => parent,
        _ => model,
    }
}

/// The configuration of a model: `config.json`, else Meta's `params.json`, else open_lm's `params.txt`. The first is named where
/// there is none.
pub fn configuration(model: &Path) -> PathBuf {
    let dir = directory(model);
    let run = dir.parent().filter(|_| dir.ends_with(CHECKPOINTS));
    let names = ["config.json", "params.json", "params.txt"];
    let mut places = [Some(dir), run]
        .into_iter()
        .flatten()
        .flat_map(|dir| names.map(|name| dir.join(name)));
    places
        .find(|path| path.is_file())
        .unwrap_or_else(|| dir.join(names[0]))
}

/// The weights of a model directory, safetensors first; a file that is named is taken as it is.
pub fn weights(model: &Path) -> Result<Weights, ModelError> {
    if model.is_file() {
        return Ok(Weights::Files(vec![model.to_owned()]));
    }
    let there = |name: &str| Some(model.join(name)).filter(|path| path.is_file());
    let one = |path| Weights::Files(vec![path]);
    let simple = there(SINGLE)
        .map(one)
        .or_else(|| there(INDEX).map(Weights::Indexed))
        .or_else(|| there(PYTORCH_SINGLE).map(one))
        .or_else(|| there(PYTORCH_INDEX).map(Weights::Indexed))
        .or_else(|| there(CONSOLIDATED).map(one));
    if let Some(weights) = simple {
        return Ok(weights);
    }
    let nothing = |reason| ModelError::NoWeights {
        path: model.to_owned(),
        reason,
    };
    if !model.is_dir() {
        return Err(nothing("no such directory".to_owned()));
    }
    let parts = numbered(model, "consolidated.", ".pth");
    if !parts.is_empty() {
        return consolidated(parts).map_err(nothing);
    }
    let mut epochs = numbered(model, "epoch_", ".pt");
    epochs.extend(numbered(&model.join(CHECKPOINTS), "epoch_", ".pt"));
    match epochs.as_slice() {
        [] => Err(nothing(format!(
            "no weights: neither {SINGLE} or {INDEX}, nor {PYTORCH_SINGLE} or {PYTORCH_INDEX}, {CONSOLIDATED}, \
             consolidated.00.pth or epoch_N.pt; give a model directory, or a file of weights in it"
        ))),
        [_] => Ok(one(epochs.remove(0).1)),
        [.., (_, last)] => Err(nothing(format!(
            "{} checkpoints of training; name the one to read, such as {}",
            epochs.len(),
            last.display()
        ))),
    }
}

/// Meta's files, of which none may be missing.
fn consolidated(parts: Vec<(u64, PathBuf)>) -> Result<Weights, String> {
    let gap = (0..).zip(&parts).find(|(number, part)| *number != part.0);
    if let Some((number, _)) = gap {
        return Err(format!(
            "consolidated.{number:02}.pth is missing; copy or download it again"
        ));
    }
    let mut files: Vec<PathBuf> = parts.into_iter().map(|(_, path)| path).collect();
    Ok(match files.len() {
        1 => Weights::Files(vec![files.remove(0)]),
        _ => Weights::Cut(files),
    })
}

/// The files of a directory whose names are a number between these, by number.
fn numbered(dir: &Path, before: &str, after: &str) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix(before)?.strip_suffix(after)?;
            Some((number.parse().ok()?, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// What to do about a model whose tokenizer only other programs read; none where there is `tokenizer.json`, or nothing.
pub fn foreign_tokenizer(model: &Path) -> Option<String> {
    let dir = directory(model);
    let foreign = dir.join("tokenizer.model");
    if dir.join("tokenizer.json").exists() || !foreign.is_file() {
        return None;
    }
    Some(format!(
        "{} is not read here; text needs a tokenizer.json beside it. Copy that of the same model on Hugging Face, or let \
         the transformers library write it: LlamaTokenizerFast.from_pretrained(\"{dir}\").save_pretrained(\"{dir}\")",
        foreign.display(),
        dir = dir.display()
    ))
}
