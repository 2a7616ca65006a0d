//! Opening a model directory for use.

use std::path::{Path, PathBuf};

use tch::{Device, Kind};
use thiserror::Error;
use tokenizers::Tokenizer;

use crate::model::files::find;
use crate::model::{
    self, AttentionKind, LoadReport, ModelConfig, ModelError, NewWeights, Params, Transformer,
};

/// Why a model cannot be used.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Configuration or weights.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error("cannot read the tokenizer {path}: {cause}. A model directory for text needs its tokenizer.json", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizer library says.
        cause: tokenizers::Error,
    },
    /// A tokenizer in a form that is not read.
    #[error("{0}")]
    ForeignTokenizer(String),
}

/// A model ready to compute.
pub struct LoadedModel {
    /// The network.
    pub transformer: Transformer,
    /// Its weights, on the device.
    pub params: Params,
    /// Where it was read from.
    pub dir: PathBuf,
    /// What was found there.
    pub report: LoadReport,
}

impl LoadedModel {
    /// Loads a model in any layout or a training checkpoint, by its directory or by a file of weights in it, to compute in `kind`
    /// on `device`.
    pub fn open(model: &Path, device: Device, kind: Kind) -> Result<LoadedModel, LoadError> {
        let config = ModelConfig::load(model)?;
        let (params, report) = model::load_params(model, &config, NewWeights::Refuse)?;
        let params = params.to(device, kind);
        Ok(LoadedModel {
            transformer: Transformer::new(config),
            params,
            dir: find::directory(model).to_owned(),
            report,
        })
    }

    /// Its kind of attention, as recipes call it.
    pub fn attention(&self) -> &'static str {
        match self.transformer.config().attention {
            AttentionKind::Softmax => "softmax",
            AttentionKind::Supra(_) => "supra",
        }
    }

    /// Tokens of a window when nobody says: the model's positions, at most 2048.
    pub fn usual_sequence_length(&self) -> u64 {
        self.transformer.config().max_positions.clamp(1, 2048) as u64
    }

    /// The tokenizer beside the weights.
    pub fn tokenizer(&self) -> Result<Tokenizer, LoadError> {
        if let Some(remedy) = find::foreign_tokenizer(&self.dir) {
            return Err(LoadError::ForeignTokenizer(remedy));
        }
        let path = self.dir.join("tokenizer.json");
        Tokenizer::from_file(&path).map_err(|cause| LoadError::Tokenizer { path, cause })
    }

    /// Tokens that end a text, as the configuration names them.
    pub fn stop_tokens(&self) -> Vec<u32> {
        self.transformer
            .config()
            .eos
            .iter()
            .filter_map(|&token| token.try_into().ok())
            .collect()
    }
}
