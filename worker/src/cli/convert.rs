//! `supra-worker convert`: a softmax model becomes a SUPRA model, not trained yet.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use supra_worker::model::files::find;
use supra_worker::model::{
    self, AttentionKind, Decay, ModelConfig, NewWeights, RopeFrequencies, SaveFormat, SupraConfig,
};

use super::{failure::Failure, out};

/// Replaces softmax attention by SUPRA's and draws the weights that the base lacks. The result runs at once and has
/// to be uptrained to be of use.
#[derive(Debug, Args)]
pub struct Convert {
    /// Softmax model: a Hugging Face, open_lm or Meta directory, or a file of weights in one. Files of PyTorch's (.bin, .pt,
    /// .pth) are read without executing anything in them
    #[arg(long, value_name = "MODEL")]
    base: PathBuf,
    /// Directory to write, new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of the new weights
    #[arg(long, default_value_t = 17)]
    seed: u64,
    /// Fixed decay of each head
    #[arg(long, value_enum, default_value_t)]
    decay: DecayName,
    /// Normalise queries and keys
    #[arg(long)]
    qk_norm: bool,
    /// Rounding of the rotary frequencies
    #[arg(long, value_enum, default_value_t)]
    rope_frequencies: RopeName,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum DecayName {
    #[default]
    Alibi,
    Retnet,
    None,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum RopeName {
    #[default]
    Exact,
    Bf16,
}

impl Convert {
    /// Writes the converted model.
    pub fn execute(self) -> Result<(), Failure> {
        let base = ModelConfig::load(&self.base)?;
        if base.supra().is_some() {
            return Err(Failure::input(format!(
                "{} is a SUPRA model already",
                self.base.display()
            )));
        }
        let config = base.with_attention(AttentionKind::Supra(SupraConfig {
            decay: match self.decay {
                DecayName::Alibi => Decay::Alibi,
                DecayName::Retnet => Decay::Retnet,
                DecayName::None => Decay::None,
            },
            qk_norm: self.qk_norm,
            rope_frequencies: match self.rope_frequencies {
                RopeName::Exact => RopeFrequencies::Exact,
                RopeName::Bf16 => RopeFrequencies::Bf16,
            },
            ..SupraConfig::default()
        }));
        let (params, report) =
            model::load_params(&self.base, &config, NewWeights::Seeded(self.seed))?;
        out::complain(&format!("{}: {report}", self.base.display()));
        model::save_model(
            &self.out,
            &config,
            &params,
            Some(find::directory(&self.base)),
            SaveFormat::Native,
        )?;
        if let Some(remedy) = find::foreign_tokenizer(&self.out) {
            out::complain(&remedy);
        }
        out::line(&format!(
            "{}: {} tensors of the base kept, {} new ones drawn with seed {}",
            self.out.display(),
            report.matched.len(),
            report.missing.len(),
            self.seed
        ))
    }
}
