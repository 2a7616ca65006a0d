//! `supra-worker export`: a training checkpoint becomes a model directory.

use std::path::PathBuf;

use super::{failure::Failure, options::Dtype, out};
use clap::Args;
use supra_checkpoint::{Store, fetch::ModelDirectory, verify};
use supra_worker::{
    checkpoint::{ORIGIN, Origin},
    model::{self, ModelConfig, NewWeights, SaveFormat},
};

/// Writes the weights of a checkpoint without optimizer state: a softmax model as a Hugging Face directory, a SUPRA
/// model in the published layout. The checkpoint's hashes are verified first. `supra_origin.json` beside the weights says run,
/// step and the head of the ledger, for `supra audit --export`.
#[derive(Debug, Args)]
pub struct Export {
    /// Directory or URL of one checkpoint (`supra checkpoints` lists them)
    #[arg(long, value_name = "DIR|URL")]
    checkpoint: String,
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
        let store = Store::open(&self.checkpoint)?;
        let hash = verify::manifest_hash(&store, "")?;
        let manifest = verify::manifest(&store, "", Some(&hash))?;
        let files = ModelDirectory::of_checkpoint(&store, &manifest)?;
        let config = ModelConfig::load(files.path())?;
        let (params, _) = model::load_params(files.path(), &config, NewWeights::Refuse)?;
        let format = SaveFormat::Interchange {
            kind: self.dtype.into(),
        };
        let origin = Origin::new(&manifest, hash).to_bytes();
        model::save_model_with(
            &self.out,
            &config,
            &params,
            Some(files.path()),
            format,
            &[(ORIGIN, &origin)],
        )?;
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
