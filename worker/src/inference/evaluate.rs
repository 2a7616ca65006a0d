//! Loss on text that a model was not trained on.

use std::time::Instant;

use serde::Serialize;
use supra_data::{DataError, Reader, Sample};
use thiserror::Error;

use super::load::LoadedModel;
use crate::{
    model::ModelError,
    trainer::{Layout, check_data},
};

/// What is evaluated, and how.
#[derive(Clone, Copy, Debug)]
pub struct EvaluateOptions {
    /// Windows from the first on; none = all.
    pub windows: Option<u64>,
    /// Windows that go through the model at once.
    pub batch: usize,
    /// Whether documents do not see each other.
    pub reset_at_document: bool,
}

/// The loss of a model on a dataset.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean cross-entropy per target token, natural logarithm.
    pub loss: f64,
    /// exp(loss).
    pub perplexity: f64,
    /// Target tokens.
    pub targets: u64,
    /// Windows.
    pub windows: u64,
    /// Tokens per window.
    pub sequence_length: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Why there is no result.
#[derive(Debug, Error)]
pub enum EvaluateError {
    /// The dataset cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model cannot take such sequences.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Data and model do not fit each other.
    #[error("{0}")]
    Mismatch(String),
}

/// Puts the windows of a dataset through a model in their own order and averages over all targets. `progress` hears
/// how many windows of how many are done.
pub fn evaluate(
    model: &LoadedModel,
    reader: &mut Reader,
    sequence_length: u64,
    options: EvaluateOptions,
    mut progress: impl FnMut(u64, u64),
) -> Result<Evaluation, EvaluateError> {
    let clock = Instant::now();
    let windows = reader.windows().min(options.windows.unwrap_or(u64::MAX));
    if windows == 0 {
        return Err(EvaluateError::Mismatch(format!(
            "{} has {} tokens, too few for one window of {sequence_length}: choose a smaller --sequence-length",
            reader.manifest().path().display(),
            reader.manifest().tokens()
        )));
    }
    let LoadedModel {
        transformer,
        params,
        dir,
        ..
    } = model;
    let config = transformer.config();
    config.check_sequence_length(sequence_length as i64)?;
    let name = dir.display().to_string();
    check_data(reader.manifest(), config, &name, Some(dir)).map_err(EvaluateError::Mismatch)?;
    let (mut loss_sum, mut targets) = (0.0, 0);
    for first in (0..windows).step_by(options.batch.max(1)) {
        let last = windows.min(first + options.batch.max(1) as u64);
        let samples = (first..last)
            .map(|id| {
                reader
                    .window(id)
                    .map(|(tokens, starts)| Sample { id, tokens, starts })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let layout = Layout {
            vocabulary: config.vocab,
            reset_at_document: options.reset_at_document,
            rows: samples.len(),
            device: params.device(),
        };
        let batch = layout
            .lay_out(&samples)
            .map_err(|error| EvaluateError::Mismatch(error.to_string()))?;
        for input in batch.micro_batches() {
            let loss = tch::no_grad(|| transformer.loss_sum(params, &input, 0.0));
            loss_sum += loss.cross_entropy.double_value(&[]);
        }
        targets += batch.targets;
        progress(last, windows);
    }
    let loss = loss_sum / targets as f64;
    let seconds = clock.elapsed().as_secs_f64();
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        targets,
        windows,
        sequence_length,
        seconds,
    })
}
