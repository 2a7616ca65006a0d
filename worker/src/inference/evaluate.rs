//! Loss on text that a model was not trained on: per token, per byte, and by how much text stands before a token.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use supra_data::{DataError, Reader, Sample};
use thiserror::Error;

use super::{
    scorer::{ScoreError, Scorer},
    statistics::{Cluster, clustered},
    token_bytes::TokenBytes,
};
use crate::{model::ModelError, trainer::check_data};

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

/// The loss of a model on a dataset. Standard errors take windows as independent, not the tokens inside of one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy per target token, natural logarithm.
    pub loss: f64,
    /// Its standard error; none with one window.
    #[serde(default)]
    pub loss_stderr: Option<f64>,
    /// exp(loss).
    pub perplexity: f64,
    /// Its standard error.
    pub perplexity_stderr: Option<f64>,
    /// Target tokens.
    pub targets: u64,
    /// Per byte of text; none where the tokenizer does not say which text a token stands for.
    #[serde(flatten)]
    pub per_byte: Option<PerByte>,
    /// Windows.
    pub windows: u64,
    /// Tokens per window.
    pub sequence_length: u64,
    /// Loss by how many tokens the model sees when it predicts: how far it makes use of them.
    pub positions: Vec<Position>,
    /// Wall time.
    pub seconds: f64,
}

/// The same loss per byte of the text behind the targets: comparable between tokenizers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerByte {
    /// UTF-8 bytes that the targets stand for.
    pub bytes: u64,
    /// Summed loss in bits, per byte.
    pub bits_per_byte: f64,
    /// exp of the summed loss in nats, per byte.
    pub byte_perplexity: f64,
}

/// Mean loss of the targets that see from `first` to `last` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Fewest tokens seen.
    pub first: u64,
    /// Most tokens seen.
    pub last: u64,
    /// Targets.
    pub targets: u64,
    /// Mean loss in nats.
    pub loss: f64,
    /// Its standard error; none with one window.
    pub loss_stderr: Option<f64>,
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
    /// The model does not score them.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// Data and model do not fit each other.
    #[error("{0}")]
    Mismatch(String),
}

/// Puts the windows of a dataset through a model in their own order and averages over all targets. `progress` hears
/// how many windows of how many are done.
pub fn evaluate(
    scorer: &mut Scorer,
    reader: &mut Reader,
    options: EvaluateOptions,
    mut progress: impl FnMut(u64, u64),
) -> Result<Evaluation, EvaluateError> {
    let clock = Instant::now();
    let sequence_length = reader.sequence_length();
    let windows = reader.windows().min(options.windows.unwrap_or(u64::MAX));
    if windows == 0 {
        return Err(EvaluateError::Mismatch(format!(
            "{} has {} tokens, too few for one window of {sequence_length}: choose a smaller --sequence-length",
            reader.manifest().path().display(),
            reader.manifest().tokens()
        )));
    }
    let model = scorer.model();
    let config = model.transformer.config();
    config.check_sequence_length(sequence_length as i64)?;
    let name = model.dir.display().to_string();
    check_data(reader.manifest(), config, &name, Some(&model.dir))
        .map_err(EvaluateError::Mismatch)?;
    let bytes = model.tokenizer().ok().as_ref().and_then(TokenBytes::new);
    let mut tally = Tally::new(bytes, options.reset_at_document);
    for first in (0..windows).step_by(options.batch.max(1)) {
        let last = windows.min(first + options.batch.max(1) as u64);
        let samples = (first..last)
            .map(|id| {
                reader
                    .window(id)
                    .map(|(tokens, starts)| Sample { id, tokens, starts })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let losses = scorer.windows(&samples, options.reset_at_document)?;
        for (sample, losses) in samples.iter().zip(&losses) {
            tally.add(sample, losses);
        }
        progress(last, windows);
    }
    tally
        .finish(sequence_length, clock.elapsed().as_secs_f64())
        .ok_or_else(|| {
            EvaluateError::Mismatch(format!(
                "every target of {} begins a document, and nothing is there to predict it from: choose a larger \
                 --sequence-length",
                reader.manifest().path().display()
            ))
        })
}

/// What the windows so far have come to.
struct Tally {
    bytes: Option<TokenBytes>,
    reset_at_document: bool,
    text_bytes: u64,
    windows: Vec<Cluster>,
    /// Per bin of positions, the windows' part of it.
    positions: Vec<Vec<Cluster>>,
}

impl Tally {
    fn new(bytes: Option<TokenBytes>, reset_at_document: bool) -> Tally {
        Tally {
            bytes,
            reset_at_document,
            text_bytes: 0,
            windows: Vec::new(),
            positions: Vec::new(),
        }
    }

    /// Adds a window: the loss of target `t`, which is token `t + 1`, stands at `t`.
    fn add(&mut self, sample: &Sample, losses: &[Option<f64>]) {
        let mut whole = Cluster::default();
        let mut bins: Vec<Cluster> = Vec::new();
        let starts = if self.reset_at_document {
            sample.starts.as_slice()
        } else {
            &[]
        };
        let mut upcoming = starts.iter().map(|&start| start as usize).peekable();
        let mut begin = 0;
        for (input, loss) in losses.iter().enumerate() {
            while let Some(start) = upcoming.next_if(|&start| start <= input) {
                begin = start;
            }
            let Some(loss) = *loss else { continue };
            whole.add(loss);
            let bin = (input - begin + 1).ilog2() as usize;
            if bins.len() <= bin {
                bins.resize(bin + 1, Cluster::default());
            }
            bins[bin].add(loss);
        }
        self.windows.push(whole);
        for (bin, cluster) in bins.into_iter().enumerate() {
            if self.positions.len() <= bin {
                self.positions.resize(bin + 1, Vec::new());
            }
            self.positions[bin].push(cluster);
        }
        if let Some(bytes) = &self.bytes {
            let of_targets = bytes.of_stream(&sample.tokens, &sample.starts);
            let counted = of_targets[1..].iter().zip(losses);
            self.text_bytes += counted
                .filter(|(_, loss)| loss.is_some())
                .map(|(&bytes, _)| u64::from(bytes))
                .sum::<u64>();
        }
    }

    fn finish(self, sequence_length: u64, seconds: f64) -> Option<Evaluation> {
        let loss = clustered(&self.windows)?;
        let perplexity = loss.exp();
        let targets = self.windows.iter().map(|window| window.count).sum();
        let nats = loss.value * targets as f64;
        let per_byte = (self.bytes.is_some() && self.text_bytes > 0).then(|| {
            let per_byte = nats / self.text_bytes as f64;
            PerByte {
                bytes: self.text_bytes,
                bits_per_byte: per_byte / std::f64::consts::LN_2,
                byte_perplexity: per_byte.exp(),
            }
        });
        let positions = self
            .positions
            .iter()
            .enumerate()
            .filter_map(|(bin, parts)| {
                let loss = clustered(parts)?;
                let first = 1 << bin;
                Some(Position {
                    first,
                    last: (2 * first - 1).min(sequence_length),
                    targets: parts.iter().map(|part| part.count).sum(),
                    loss: loss.value,
                    loss_stderr: loss.stderr,
                })
            });
        Some(Evaluation {
            loss: loss.value,
            loss_stderr: loss.stderr,
            perplexity: perplexity.value,
            perplexity_stderr: perplexity.stderr,
            targets,
            per_byte,
            windows: self.windows.len() as u64,
            sequence_length,
            positions: positions.collect(),
            seconds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_what_the_model_sees() {
        let sample = Sample {
            id: 0,
            tokens: vec![0; 8],
            starts: vec![0, 4],
        };
        let some = |values: &[f64]| values.iter().map(|&x| Some(x)).collect::<Vec<_>>();
        // The target that begins a document does not count.
        let mut losses = some(&[1.0, 2.0, 4.0, 0.0, 3.0, 6.0, 8.0]);
        losses[3] = None;
        let mut tally = Tally::new(None, true);
        tally.add(&sample, &losses);
        let found = tally.finish(7, 0.0).unwrap();
        let bins: Vec<_> = found
            .positions
            .iter()
            .map(|bin| (bin.first, bin.last, bin.targets, bin.loss))
            .collect();
        assert_eq!(bins, [(1, 1, 2, 2.0), (2, 3, 4, 5.0)]);
        assert_eq!((found.targets, found.loss), (6, 4.0));
        assert_eq!((found.loss_stderr, found.per_byte), (None, None));

        let mut tally = Tally::new(None, false);
        tally.add(&sample, &some(&[1.0, 2.0, 4.0, 5.0, 3.0, 6.0, 8.0]));
        tally.add(&sample, &some(&[1.0; 7]));
        let found = tally.finish(7, 0.0).unwrap();
        let bins: Vec<_> = found
            .positions
            .iter()
            .map(|bin| (bin.first, bin.last, bin.targets, bin.loss))
            .collect();
        assert_eq!(
            bins,
            [(1, 1, 2, 1.0), (2, 3, 4, 2.0), (4, 7, 8, 26.0 / 8.0)]
        );
        assert!(found.loss_stderr.is_some());
    }

    #[test]
    fn nothing_counts_where_every_target_begins_a_document() {
        let mut tally = Tally::new(None, true);
        let sample = Sample {
            id: 0,
            tokens: vec![0; 3],
            starts: vec![0, 1, 2],
        };
        tally.add(&sample, &[None, None]);
        assert_eq!(tally.finish(2, 0.0), None);
    }
}
