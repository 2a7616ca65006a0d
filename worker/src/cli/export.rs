//! `supra-worker export`: a training checkpoint becomes a model directory.

use std::path::PathBuf;

use super::{failure::Failure, options::Dtype, out};
use clap::Args;
use supra_worker::{
    checkpoint,
    model::{self, ModelConfig, NewWeights, SaveFormat},
};

/// Writes the weights of a checkpoint without optimizer state: a softmax model as a Hugging Face directory, a SUPRA
/// model in the published layout. The checkpoint's hashes are verified first.
#[derive(Debug, Args)]
pub struct Export {
    /// Directory of one checkpoint (`supra checkpoints` lists them)
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Directory to write, new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the written weights
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
}

impl Export {
    /// Verifies and writes.
    pub fn execute(self) -> Result<(), Failure> {
        let manifest = checkpoint::read::manifest(&self.checkpoint, None)?;
        checkpoint::read::verify_model(&self.checkpoint, &manifest)?;
        let config = ModelConfig::load(&self.checkpoint)?;
        let (params, _) = model::load_params(&self.checkpoint, &config, NewWeights::Refuse)?;
        let format = SaveFormat::Interchange {
            kind: self.dtype.into(),
        };
        model::save_model(&self.out, &config, &params, Some(&self.checkpoint), format)?;
        let layout = if config.supra().is_some() {
            "SUPRA"
        } else {
            "Hugging Face"
        };
        out::line(&format!(
            "{}: {layout} model of run {} at step {}, after {} tokens",
            self.out.display(),
            manifest.run,
            manifest.step,
            manifest.tokens
        ))
    }
}
