//! `supra-worker export`: a training checkpoint, or any model directory, becomes what other programs load.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use supra_checkpoint::{Manifest, Store, StoredError, fetch::ModelDirectory, verify};
use supra_recipes::Recipe;
use supra_worker::{
    checkpoint::{
        CARD, ORIGIN, Origin,
        card::{self, Training},
    },
    model::{self, LoadReport, ModelConfig, NewWeights, SaveFormat, SaveReport},
};

use super::{failure::Failure, options::Dtype, out};

/// Writes the weights of a checkpoint without optimizer state, for other programs. The checkpoint's hashes are verified first;
/// every tensor that was read and written is accounted for. `supra_origin.json` beside the weights says run, step and the head
/// of the ledger, for `supra audit --export`; README.md is a model card with all that the checkpoint knows.
#[derive(Debug, Args)]
pub struct Export {
    /// Directory or URL of one checkpoint (`supra checkpoints` lists them)
    #[arg(
        long,
        value_name = "DIR|URL",
        required_unless_present = "model",
        conflicts_with = "model"
    )]
    checkpoint: Option<String>,
    /// Model directory instead of a checkpoint, to write it in another format; nothing says how it came to be
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Directory to write, new or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Who is to load it
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Number format of the written weights
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Print one JSON object with the name of every tensor
    #[arg(long)]
    json: bool,
}

/// What is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Hugging Face's transformers. Softmax models are plain Llama or Mistral; SUPRA models bring their code along and load with
    /// trust_remote_code=True
    #[default]
    Hf,
    /// linear_open_lm's wrapper of transformers: config.json and safetensors, as the released SUPRA model
    Openlm,
    /// linear_open_lm's training code: epoch_0.pt for --pretrained, config.json for --model
    OpenlmPt,
}

/// The JSON answer.
#[derive(Serialize)]
struct Answer<'a> {
    out: &'a Path,
    layout: &'static str,
    run: Option<&'a str>,
    step: Option<u64>,
    tokens: Option<u64>,
    read: Read<'a>,
    written: &'a SaveReport,
}

/// What was read: there is nothing missing or unexpected, which would have been an error.
#[derive(Serialize)]
struct Read<'a> {
    matched: &'a [String],
    ignored: &'a [String],
}

/// The checkpoint that is exported.
struct Source {
    manifest: Manifest,
    hash: [u8; 32],
    files: ModelDirectory,
}

impl Export {
    /// Verifies, writes, and tells what was written.
    pub fn execute(self) -> Result<(), Failure> {
        let source = match &self.checkpoint {
            Some(location) => Some(Source::proved(location)?),
            None => None,
        };
        let dir = match (&source, &self.model) {
            (Some(source), _) => source.files.path(),
            (None, Some(dir)) => dir,
            (None, None) => {
                return Err(Failure::input(
                    "name a --checkpoint or a --model".to_owned(),
                ));
            }
        };
        let config = ModelConfig::load(dir)?;
        let (params, read) = model::load_params(dir, &config, NewWeights::Refuse)?;
        let further = self.side_files(dir, &config, source.as_ref());
        let further: Vec<(&str, &[u8])> = further
            .iter()
            .map(|(name, bytes)| (*name, bytes.as_slice()))
            .collect();
        let written = model::save_model_with(
            &self.out,
            &config,
            &params,
            Some(dir),
            self.save_format(),
            &further,
        )?;
        self.tell(&config, source.as_ref(), &read, &written)
    }

    fn save_format(&self) -> SaveFormat {
        let kind = self.dtype.into();
        match self.format {
            Format::Hf => SaveFormat::HuggingFace { kind },
            Format::Openlm => SaveFormat::OpenLm { kind },
            Format::OpenlmPt => SaveFormat::OpenLmTraining { kind },
        }
    }

    /// Model card and origin. Those that a model directory has stay with its weights.
    fn side_files(
        &self,
        dir: &Path,
        config: &ModelConfig,
        source: Option<&Source>,
    ) -> Vec<(&'static str, Vec<u8>)> {
        let card = |training: Option<&Training>| {
            let library = self.format == Format::Hf;
            card::render(config, self.dtype.name(), library, training).into_bytes()
        };
        let Some(Source { manifest, hash, .. }) = source else {
            let origin = fs::read(dir.join(ORIGIN)).ok().map(|bytes| (ORIGIN, bytes));
            let kept = fs::read(dir.join(CARD)).ok();
            // A card says how to load the model, so it holds for its own format.
            let text = kept.filter(|_| self.format == Format::Hf);
            let card = (CARD, text.unwrap_or_else(|| card(None)));
            return origin.into_iter().chain([card]).collect();
        };
        let origin = Origin::new(manifest, *hash);
        let base_card = base_card(manifest);
        let training = Training {
            manifest,
            origin: &origin,
            base_card: base_card.as_deref(),
        };
        vec![(ORIGIN, origin.to_bytes()), (CARD, card(Some(&training)))]
    }

    fn tell(
        &self,
        config: &ModelConfig,
        source: Option<&Source>,
        read: &LoadReport,
        written: &SaveReport,
    ) -> Result<(), Failure> {
        let layout = match (self.format, config.supra()) {
            (Format::Hf, Some(_)) => "SUPRA",
            (Format::Hf, None) => "Hugging Face",
            (Format::Openlm, _) => "linear_open_lm",
            (Format::OpenlmPt, _) => "linear_open_lm training",
        };
        let manifest = source.map(|source| &source.manifest);
        if self.json {
            return out::json(&Answer {
                out: &self.out,
                layout,
                run: manifest.map(|manifest| manifest.run.as_str()),
                step: manifest.map(|manifest| manifest.step),
                tokens: manifest.map(|manifest| manifest.tokens),
                read: Read {
                    matched: &read.matched,
                    ignored: &read.ignored,
                },
                written,
            });
        }
        let of = match manifest {
            Some(Manifest {
                run, step, tokens, ..
            }) => format!("run {run} at step {step}, after {tokens} tokens"),
            None => "no known run".to_owned(),
        };
        let cut: usize = written.reshaped.values().map(Vec::len).sum();
        out::line(&format!(
            "{}: {layout} model of {of}\n{} weights read; {} tensors written: {} whole, {cut} of {} weights that were cut, {} \
             stored twice; none missing, none unexpected",
            self.out.display(),
            read.matched.len(),
            written.tensors,
            written.matched.len(),
            written.reshaped.len(),
            written.repeated.len(),
        ))
    }
}

impl Source {
    /// Proves every byte that the model needs.
    fn proved(location: &str) -> Result<Source, StoredError> {
        let store = Store::open(location)?;
        let hash = verify::manifest_hash(&store, "")?;
        let manifest = verify::manifest(&store, "", Some(&hash))?;
        let files = ModelDirectory::of_checkpoint(&store, &manifest)?;
        Ok(Source {
            manifest,
            hash,
            files,
        })
    }
}

/// The model card beside the base that the run began with, if this machine has it.
fn base_card(manifest: &Manifest) -> Option<String> {
    let recipe = Recipe::parse(&manifest.recipe, &manifest.run).ok()?;
    fs::read_to_string(recipe.base.directory()?.join(CARD)).ok()
}
