//! A text and what a model remembers of it, in a file: read a long prompt once, go on from it often.
//!
//! The file is safetensors: the state's tensors, `tokens` (all of the text) and `logits` (after the last of them). Its
//! metadata tie it to the model: a state means nothing to other weights.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::TensorView};
use tch::{Kind, TchError, Tensor};
use tempfile::NamedTempFile;
use thiserror::Error;

use super::{engine::SavedState, load::LoadedModel};
use crate::model::{ModelConfig, Params, SupraConfig};

/// Says what the file is, and the version of its layout.
const FORMAT: &str = "supra-state-1";
/// The tokens of the text.
const TOKENS: &str = "tokens";
/// The logits after the last of them.
const LOGITS: &str = "logits";
/// Goes before the names of the state's tensors.
const STATE: &str = "state.";
/// Values of each weight that tell it from others: training changes all of them.
const SAMPLE: i64 = 64;

/// A text that can be continued without reading it again.
#[derive(Debug)]
pub struct SavedText {
    /// What the model remembers.
    pub state: SavedState,
    /// All tokens that it has read.
    pub tokens: Vec<u32>,
    /// Logits [V] after the last of them.
    pub logits: Vec<f32>,
}

/// Why a text is not saved, or cannot be continued.
#[derive(Debug, Error)]
pub enum SavedError {
    /// The system refuses.
    #[error("cannot {action} the saved state {path}: {source}")]
    Io {
        /// "read" or "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file is something else.
    #[error(
        "{path} is no saved state: {problem}. `supra-worker generate --save-state` writes them"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        problem: String,
    },
    /// The bytes are not those that were written.
    #[error("the saved state {path} is damaged: {problem}; save it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// It is of another model.
    #[error("the saved state {path} does not fit this model: {difference}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What differs, and the remedy.
        difference: String,
    },
    /// libtorch refused.
    #[error("libtorch")]
    Torch(#[from] TchError),
}

/// What ties a state to a model.
struct Fingerprint {
    shape: String,
    kind: String,
    weights: String,
}

impl Fingerprint {
    fn of(model: &LoadedModel) -> Result<Fingerprint, TchError> {
        Ok(Fingerprint {
            shape: shape(model.transformer.config()),
            kind: format!("{:?}", model.params.kind()),
            weights: weights(&model.params)?,
        })
    }

    fn entries(&self) -> [(&'static str, &String); 3] {
        [
            ("shape", &self.shape),
            ("kind", &self.kind),
            ("weights", &self.weights),
        ]
    }

    /// What is different in the metadata of a file.
    fn difference(&self, metadata: &HashMap<String, String>) -> Option<String> {
        let (key, here) = self
            .entries()
            .into_iter()
            .find(|(key, here)| metadata.get(*key) != Some(here))?;
        let saved = metadata.get(key).map_or("nothing", String::as_str);
        Some(match key {
            "shape" => format!("it was saved for {saved}, this is {here}; load the model that saved it"),
            "kind" => format!("it was saved in {saved}, this model computes in {here}; choose the same --dtype"),
            _ => "it was saved for a model of this shape with other weights; load the model, or the step of its training, that \
                  saved it"
                .to_owned(),
        })
    }
}

/// Everything in a configuration that a state depends on, for people.
fn shape(config: &ModelConfig) -> String {
    let attention = match config.supra() {
        None => "softmax".to_owned(),
        Some(SupraConfig {
            decay,
            qk_norm,
            rope_frequencies,
            chunk: _,
        }) => format!(
            "supra (decay {decay:?}, norms of queries and keys {qk_norm}, rotary frequencies {rope_frequencies:?})"
        ),
    };
    format!(
        "{} blocks of width {} with {} heads for queries, {} for keys, {attention}, {} tokens, rotary base {}",
        config.layers, config.dim, config.heads, config.kv_heads, config.vocab, config.rope_theta
    )
}

/// A hash of some values of every weight.
fn weights(params: &Params) -> Result<String, TchError> {
    let mut hasher = blake3::Hasher::new();
    let mut samples = Vec::new();
    for (name, tensor) in params.iter() {
        hasher.update(format!("{name}{:?}", tensor.size()).as_bytes());
        let flat = tensor.f_reshape([-1])?;
        let stride = (flat.numel() as i64 / SAMPLE).max(1);
        samples.push(flat.f_slice(0, None, None, stride)?);
    }
    let all = Tensor::f_cat(&samples, 0)?.f_to_kind(Kind::Double)?;
    for value in Vec::<f64>::try_from(all)? {
        hasher.update(&value.to_le_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A tensor as bytes.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn new(name: String, tensor: &Tensor) -> Stored {
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        let dtype = match tensor.kind() {
            Kind::Double => Dtype::F64,
            Kind::BFloat16 => Dtype::BF16,
            Kind::Int64 => Dtype::I64,
            Kind::Float => Dtype::F32,
            other => unreachable!("invariant: no state is kept in {other:?}"),
        };
        let shape = tensor.size().into_iter().map(|size| size as usize);
        Stored {
            name,
            dtype,
            shape: shape.collect(),
            bytes,
        }
    }
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::F32 => Kind::Float,
        _ => return None,
    })
}

/// A hash of all tensors, by name.
fn content<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort();
    let mut hasher = blake3::Hasher::new();
    for (name, bytes) in tensors {
        hasher.update(name.as_bytes()).update(bytes);
    }
    hasher.finalize().to_hex().to_string()
}

/// Writes a text that this model has read; the file is there whole or not at all, and replaces one of its name.
///
/// # Errors
///
/// The system refuses.
pub fn write(path: &Path, model: &LoadedModel, saved: &SavedText) -> Result<(), SavedError> {
    let state = saved.state.tensors.iter();
    let mut stored: Vec<Stored> = state
        .map(|(name, tensor)| Stored::new(format!("{STATE}{name}"), tensor))
        .collect();
    let tokens: Vec<i64> = saved.tokens.iter().map(|&token| token.into()).collect();
    stored.push(Stored::new(TOKENS.to_owned(), &Tensor::from_slice(&tokens)));
    stored.push(Stored::new(
        LOGITS.to_owned(),
        &Tensor::from_slice(&saved.logits),
    ));
    let fingerprint = Fingerprint::of(model)?;
    let mut metadata: HashMap<String, String> = fingerprint
        .entries()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .into();
    let content = content(
        stored
            .iter()
            .map(|stored| (stored.name.as_str(), stored.bytes.as_slice())),
    );
    metadata.insert("format".to_owned(), FORMAT.to_owned());
    metadata.insert("position".to_owned(), saved.state.position.to_string());
    metadata.insert("content".to_owned(), content);
    let failed = |error: SafeTensorError| match error {
        SafeTensorError::IoError(source) => failed("write", path)(source),
        other => failed("write", path)(io::Error::other(other)),
    };
    let views: Result<Vec<_>, SafeTensorError> = stored
        .iter()
        .map(|stored| {
            let view = TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes)?;
            Ok((stored.name.as_str(), view))
        })
        .collect();
    let bytes = safetensors::serialize(views.map_err(failed)?, Some(metadata)).map_err(failed)?;
    replace(path, &bytes).map_err(self::failed("write", path))
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let mut file = NamedTempFile::new_in(parent.unwrap_or(Path::new(".")))?;
    io::Write::write_all(&mut file, bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> SavedError {
    move |source| SavedError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Reads a text that this model, and no other, has read.
///
/// # Errors
///
/// The file is none, is damaged, or belongs to another model.
pub fn read(path: &Path, model: &LoadedModel) -> Result<SavedText, SavedError> {
    let bytes = fs::read(path).map_err(failed("read", path))?;
    let no_state = |problem: String| SavedError::Format {
        path: path.to_owned(),
        problem,
    };
    let damaged = |problem: &str| SavedError::Damaged {
        path: path.to_owned(),
        problem: problem.to_owned(),
    };
    let (_, header) =
        SafeTensors::read_metadata(&bytes).map_err(|error| no_state(error.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    match metadata.get("format").map(String::as_str) {
        Some(FORMAT) => {}
        Some(other) if other.starts_with("supra-state-") => {
            return Err(no_state(format!(
                "it has the layout {other}, this program reads {FORMAT}"
            )));
        }
        _ => {
            return Err(no_state(
                "it is a file of tensors of something else".to_owned(),
            ));
        }
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|error| damaged(&error.to_string()))?;
    let tensors = file.tensors();
    let found = content(
        tensors
            .iter()
            .map(|(name, view)| (name.as_str(), view.data())),
    );
    if metadata.get("content") != Some(&found) {
        return Err(damaged("its tensors are not those that were written"));
    }
    if let Some(difference) = Fingerprint::of(model)?.difference(&metadata) {
        return Err(SavedError::Foreign {
            path: path.to_owned(),
            difference,
        });
    }
    let position = metadata.get("position").and_then(|text| text.parse().ok());
    let mut saved = SavedText {
        state: SavedState {
            position: position.ok_or_else(|| damaged("it has no position"))?,
            tensors: Vec::new(),
        },
        tokens: Vec::new(),
        logits: Vec::new(),
    };
    for (name, view) in &tensors {
        let kind = kind_of(view.dtype())
            .ok_or_else(|| damaged("a tensor has a type that no state has"))?;
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)?;
        match name.as_str() {
            TOKENS => {
                saved.tokens = Vec::<i64>::try_from(tensor)?
                    .into_iter()
                    .map(|id| id as u32)
                    .collect()
            }
            LOGITS => saved.logits = Vec::<f32>::try_from(tensor)?,
            name => {
                let name = name.strip_prefix(STATE).unwrap_or(name).to_owned();
                saved.state.tensors.push((name, tensor));
            }
        }
    }
    let vocabulary = model.transformer.config().vocab as usize;
    match saved.tokens.len() as u64 == saved.state.position && saved.logits.len() == vocabulary {
        true => Ok(saved),
        false => Err(damaged("its tokens or logits are incomplete")),
    }
}
