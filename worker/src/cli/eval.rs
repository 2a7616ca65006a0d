//! `supra-worker eval`: loss and perplexity on a dataset.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
};

use clap::Args;
use serde::Serialize;
use supra_checkpoint::fetch::ModelDirectory;
use supra_data::Reader;
use supra_worker::inference::{
    evaluate::{EvaluateOptions, Evaluation, evaluate},
    load::LoadedModel,
};

use super::{
    failure::Failure,
    options::{DeviceOptions, Dtype},
    out,
};

/// Measures the loss of a model directory: softmax (Hugging Face, open_lm, Meta), SUPRA, or a training checkpoint. Windows are taken
/// in the dataset's own order.
#[derive(Debug, Args)]
pub struct Eval {
    /// Model directory, file of weights in one, checkpoint, or a checkpoint's URL (s3://, gs://)
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Dataset manifest (dataset.json, heldout.json), or its directory
    #[arg(long, value_name = "MANIFEST")]
    data: PathBuf,
    /// Tokens per window [default: those that the model was made for, at most 2048]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    sequence_length: Option<u64>,
    /// Windows to measure, from the first on [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    windows: Option<u64>,
    /// Windows that go through the model at once
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Let documents see the ones before them in the same window
    #[arg(long)]
    ignore_documents: bool,
    /// Number format to compute in
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The JSON answer.
#[derive(Serialize)]
struct Answer<'a> {
    model: &'a str,
    attention: &'static str,
    data: &'a str,
    #[serde(flatten)]
    evaluation: &'a Evaluation,
}

impl Eval {
    /// Measures and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let files = ModelDirectory::open(&self.model)?;
        let place = self.device.open()?;
        let model = LoadedModel::open(files.path(), place.device, self.dtype.into())?;
        out::complain(&format!("{}: {}", self.model, model.report));
        let sequence_length = self
            .sequence_length
            .unwrap_or_else(|| model.usual_sequence_length());
        let mut reader = Reader::open(&self.data, sequence_length)?;
        let options = EvaluateOptions {
            windows: self.windows,
            batch: self.batch as usize,
            reset_at_document: !self.ignore_documents,
        };
        let show = std::io::stderr().is_terminal() && !self.json;
        let progress = |done, of| {
            if show {
                let _ = write!(
                    std::io::stderr(),
                    "\r{done} of {of} windows{}",
                    if done == of { "\n" } else { "" }
                );
            }
        };
        let evaluation = evaluate(&model, &mut reader, sequence_length, options, progress)?;
        if self.json {
            let data = self.data.display().to_string();
            return out::json(&Answer {
                model: &self.model,
                attention: model.attention(),
                data: &data,
                evaluation: &evaluation,
            });
        }
        out::line(&format!(
            "{} ({}): loss {:.4}, perplexity {:.2}, over {} tokens in {} windows of {}, {:.1} s",
            self.model,
            model.attention(),
            evaluation.loss,
            evaluation.perplexity,
            evaluation.targets,
            evaluation.windows,
            evaluation.sequence_length,
            evaluation.seconds
        ))
    }
}
