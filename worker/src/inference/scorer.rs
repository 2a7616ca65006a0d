//! A model that says how likely given tokens are, in any of its forms.
//!
//! Windows of packed text go through the network as in training; requests, which are of any length and share contexts, through the
//! [`Engine`], unless the parallel form is asked for. All forms give the same numbers up to rounding.

mod shared;
pub mod sharing;
mod whole;

use serde::{Deserialize, Serialize};
use sharing::{Request, group};
use supra_data::Sample;
use tch::{Kind, Reduction, Tensor};
use thiserror::Error;

use super::{
    engine::{Engine, EngineError, EngineForm, Output, Piece, Slot, Want},
    load::LoadedModel,
    score::Score,
};
use crate::{
    model::{AttentionKind, Form, LossInput, ModelError, accumulate_kind},
    trainer::{Layout, LayoutError},
};

/// In which form a model reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScoreForm {
    /// By chunks, as in training.
    #[default]
    Chunkwise,
    /// Every token sees every earlier one: the definition, quadratic in the length.
    Parallel,
    /// One token after the other.
    Recurrent,
}

/// What a model says of a continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Sum of the log-probabilities of its tokens, in nats.
    pub logprob: f64,
    /// Whether each token is the likeliest one at its place.
    pub greedy: bool,
}

impl Scored {
    fn of(scores: &[Score]) -> Scored {
        Scored {
            logprob: scores.iter().map(|score| score.logprob).sum(),
            greedy: scores.iter().all(|score| score.greedy),
        }
    }
}

/// Why there are no scores.
#[derive(Debug, Error)]
pub enum ScoreError {
    /// The model cannot run these tokens.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It cannot take sequences of this length.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The samples do not fit the model.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// What came out is no probability.
    #[error("the model's logits are not numbers: its weights are damaged or did not converge")]
    NotNumbers,
}

/// Bytes that states of sequences may take on the processor.
const HOST_BYTES: u64 = 4 << 30;
/// More sequences at once bring nothing.
const MOST_SLOTS: u64 = 128;

/// How many sequences of `context` tokens a model should have in memory at once: what fits into a quarter of the GPU memory that
/// was `free` before the model was loaded, the rest being for weights and work.
pub fn usual_slots(model: &LoadedModel, context: usize, free: Option<u64>) -> usize {
    let config = model.transformer.config();
    let each = match config.attention {
        AttentionKind::Supra(_) => 4 * config.heads * config.head_dim * config.head_dim,
        AttentionKind::Softmax => {
            let bytes = model.params.kind().elt_size_in_bytes() as i64;
            2 * bytes * config.kv_heads * config.head_dim * context as i64
        }
    };
    let each = (config.layers * each).max(1).cast_unsigned();
    let room = free.map_or(HOST_BYTES, |free| free / 4);
    (room / each).clamp(2, MOST_SLOTS) as usize
}

const ENOUGH: &str = "invariant: a batch takes no more sequences than there are slots";

/// A model to score with.
pub struct Scorer {
    engine: Engine,
    form: ScoreForm,
}

impl Scorer {
    /// Takes a model into use. `slots` sequences are in memory at once: at least two.
    pub fn new(model: LoadedModel, form: ScoreForm, slots: usize) -> Result<Scorer, ScoreError> {
        let engine = Engine::new(model, slots.max(2))?;
        let engine = match form {
            ScoreForm::Recurrent => engine.with_form(EngineForm::Recurrent),
            ScoreForm::Chunkwise | ScoreForm::Parallel => engine,
        };
        Ok(Scorer { engine, form })
    }

    /// The model.
    pub fn model(&self) -> &LoadedModel {
        self.engine.model()
    }

    /// The form.
    pub fn form(&self) -> ScoreForm {
        self.form
    }

    /// What runs it token by token.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Negative log-probability of each target of windows of one length, in nats; none for those that do not count, because they begin
    /// a document and documents do not see each other.
    pub fn windows(
        &mut self,
        samples: &[Sample],
        reset_at_document: bool,
    ) -> Result<Vec<Vec<Option<f64>>>, ScoreError> {
        let model = self.engine.model();
        let layout = Layout {
            vocabulary: model.transformer.config().vocab,
            reset_at_document,
            rows: samples.len(),
            device: model.params.device(),
        };
        // The recurrent form needs no tensors, but the same tokens are refused in the same words.
        let batch = layout.lay_out(samples)?;
        if self.form == ScoreForm::Recurrent {
            return self.windows_by_token(samples, reset_at_document);
        }
        let form = match self.form {
            ScoreForm::Parallel => Form::Parallel,
            _ => Form::Chunkwise,
        };
        let transformer = model.transformer.clone().with_form(form);
        let mut losses = Vec::with_capacity(samples.len());
        for input in batch.micro_batches() {
            let LossInput {
                inputs_bt,
                targets_bt,
                mask_bt,
                documents,
            } = &input;
            let losses_bt = tch::no_grad(|| {
                let logits_btv = transformer.logits(&model.params, inputs_bt, documents.as_ref());
                cross_entropy(&logits_btv, targets_bt)
            });
            losses.extend(masked_rows(&losses_bt, mask_bt));
        }
        Ok(losses)
    }

    /// The same from the recurrent form: each document of a window is a sequence of its own.
    fn windows_by_token(
        &mut self,
        samples: &[Sample],
        reset_at_document: bool,
    ) -> Result<Vec<Vec<Option<f64>>>, ScoreError> {
        let mut losses: Vec<Vec<Option<f64>>> = samples
            .iter()
            .map(|sample| vec![None; sample.tokens.len() - 1])
            .collect();
        let runs: Vec<(usize, usize, usize)> = (0..)
            .zip(samples)
            .flat_map(|(row, sample)| {
                let runs = runs(sample, reset_at_document);
                runs.into_iter().map(move |(from, to)| (row, from, to))
            })
            .collect();
        for some in runs.chunks(self.engine.slots()) {
            let slots = self.open(some.len());
            let pieces: Vec<Piece<'_>> = some
                .iter()
                .zip(&slots)
                .map(|(&(row, from, to), slot)| Piece {
                    slot,
                    tokens: &samples[row].tokens[from..to],
                    want: Want::Scores {
                        next: &samples[row].tokens[from + 1..=to],
                        top: 0,
                    },
                })
                .collect();
            let outputs = self.engine.advance(&pieces)?;
            for (&(row, from, _), output) in some.iter().zip(outputs) {
                for (at, score) in (from..).zip(of_piece(output)) {
                    losses[row][at] = Some(-score.logprob);
                }
            }
            self.close(slots);
        }
        Ok(losses)
    }

    /// Scores of requests, in their order. `progress` hears how many of how many are done.
    pub fn requests(
        &mut self,
        requests: &[Request],
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Vec<Scored>, ScoreError> {
        let mut found = vec![None; requests.len()];
        let groups = group(requests);
        if self.form == ScoreForm::Parallel {
            self.requests_whole(requests, &groups, &mut found, &mut progress)?;
        } else {
            self.requests_shared(requests, &groups, &mut found, &mut progress)?;
        }
        let all: Option<Vec<Scored>> = found.into_iter().collect();
        all.filter(|all| all.iter().all(|scored| scored.logprob.is_finite()))
            .ok_or(ScoreError::NotNumbers)
    }

    fn open(&mut self, count: usize) -> Vec<Slot> {
        (0..count)
            .map(|_| self.engine.open().expect(ENOUGH))
            .collect()
    }

    fn close(&mut self, slots: Vec<Slot>) {
        for slot in slots {
            self.engine.close(slot);
        }
    }
}

/// Ranges of the inputs of a window whose targets count, each seen by nothing before it.
fn runs(sample: &Sample, reset_at_document: bool) -> Vec<(usize, usize)> {
    let inputs = sample.tokens.len() - 1;
    let inside = |&start: &usize| reset_at_document && (1..=inputs).contains(&start);
    let starts = sample.starts.iter().map(|&start| start as usize);
    let mut borders: Vec<usize> = starts.filter(inside).collect();
    borders.insert(0, 0);
    // The window's last token is a target only.
    borders.push(inputs + 1);
    borders
        .windows(2)
        .map(|border| (border[0], border[1] - 1))
        .filter(|(from, to)| from < to)
        .collect()
}

fn of_piece(output: Output) -> Vec<Score> {
    match output {
        Output::Scores(scores) => scores,
        _ => unreachable!("invariant: scores were asked for"),
    }
}

/// Negative log-probability of each target: [..] from logits [.., V] and targets [..].
fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Tensor {
    let vocabulary = *logits.size().last().unwrap_or(&0);
    logits
        .to_kind(accumulate_kind(logits.kind()))
        .reshape([-1, vocabulary])
        .cross_entropy_loss(
            &targets.flatten(0, -1),
            None::<&Tensor>,
            Reduction::None,
            -100,
            0.0,
        )
        .view_as(targets)
}

/// Rows of losses; none where the mask is off.
fn masked_rows(losses_bt: &Tensor, mask_bt: &Tensor) -> Vec<Vec<Option<f64>>> {
    let length = losses_bt.size()[1] as usize;
    let (losses, mask) = (to_host(losses_bt), to_host(mask_bt));
    let all: Vec<Option<f64>> = losses
        .into_iter()
        .zip(mask)
        .map(|(loss, counts)| (counts == 1.0).then_some(loss))
        .collect();
    all.chunks(length).map(<[_]>::to_vec).collect()
}

fn to_host(x: &Tensor) -> Vec<f64> {
    let flat = x.flatten(0, -1).to_kind(Kind::Double);
    let mut host = vec![0.0; flat.numel()];
    flat.copy_data(&mut host, flat.numel());
    host
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_before_the_next_document() {
        let sample = |starts: &[u32]| Sample {
            id: 0,
            tokens: vec![5; 7],
            starts: starts.to_vec(),
        };
        assert_eq!(runs(&sample(&[0, 3]), true), [(0, 2), (3, 6)]);
        assert_eq!(runs(&sample(&[0, 3]), false), [(0, 6)]);
        // The last token begins a document: it is no target. A document of one token has none.
        assert_eq!(runs(&sample(&[4, 5, 6]), true), [(0, 3)]);
        assert_eq!(runs(&sample(&[]), true), [(0, 6)]);
    }
}
