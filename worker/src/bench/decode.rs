//! How fast a model is at inference: tokens per second of several sequences at once, time to the first token of a prompt, and
//! time and memory per token as a sequence grows. Random weights and tokens, through the [`Engine`], as users have it.

use std::{path::PathBuf, time::Instant};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tch::{Device, Kind, TchError, Tensor};
use thiserror::Error;

use crate::{
    inference::{
        engine::{Engine, EngineError, Output, Piece, SavedState, Slot, Want},
        load::LoadedModel,
    },
    model::{LoadReport, ModelConfig, ParamSpec, Params, Slots, Transformer},
};

/// Standard deviation of the entries of matrices.
const SPREAD: f64 = 0.02;
/// Tokens of each sequence before the clock runs.
const PROMPT: usize = 16;
/// How often a time is taken; the median counts.
const TURNS: usize = 3;
/// What an H200's memory was measured to move, bytes per second, and its matrix units to compute in bf16, operations per
/// second: what [`Decoded::share_of_bound`] is of.
const BANDWIDTH: f64 = 4.3e12;
const OPERATIONS: f64 = 790e12;

/// Why there is no figure.
#[derive(Debug, Error)]
pub enum BenchError {
    /// No memory for the weights.
    #[error("there is no memory for the weights")]
    Weights(#[from] TchError),
    /// The model cannot go on.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// A token of each of several sequences.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Decoded {
    /// Sequences.
    pub batch: usize,
    /// Milliseconds of a step, in which each sequence gets a token.
    pub milliseconds: f64,
    /// Of all sequences together.
    pub tokens_per_second: f64,
    /// Of what an H200 could do at best: weights read once, or multiplied, and states read and written.
    pub share_of_bound: f64,
}

/// A prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prefilled {
    /// Its tokens.
    pub tokens: usize,
    /// Until the first new token is known.
    pub seconds: f64,
    /// Tokens of the prompt per second.
    pub tokens_per_second: f64,
}

/// The next token of a long sequence.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Far {
    /// Tokens before it.
    pub tokens: usize,
    /// Milliseconds.
    pub milliseconds: f64,
    /// What the sequence needs.
    pub bytes: u64,
}

/// A model of random weights: matrices from N(0, 0.02), norms' gains 1, biases 0.
pub fn random_model(
    config: ModelConfig,
    (kind, device): (Kind, Device),
    seed: i64,
) -> Result<LoadedModel, BenchError> {
    tch::manual_seed(seed);
    let draw = |spec: ParamSpec| -> Result<(String, Tensor), TchError> {
        let mut weight = Tensor::f_empty(&spec.shape, (kind, device))?;
        let _ = match spec.shape.len() {
            1 if spec.name.ends_with("norm.weight") => weight.fill_(1.0),
            1 => weight.zero_(),
            _ => weight.normal_(0.0, SPREAD),
        };
        Ok((spec.name, weight))
    };
    let weights = config.params().into_iter().map(draw);
    Ok(LoadedModel {
        params: Params::new(weights.collect::<Result<_, _>>()?),
        transformer: Transformer::new(config),
        dir: PathBuf::new(),
        report: LoadReport::default(),
    })
}

/// Steps of `batch` sequences, the likeliest token being the next one.
pub fn decode(engine: &mut Engine, batch: usize, steps: u32) -> Result<Decoded, BenchError> {
    let slots = opened(engine, batch)?;
    let mut random = ChaCha8Rng::seed_from_u64(batch as u64);
    let prompts: Vec<Vec<u32>> = slots
        .iter()
        .map(|_| tokens(&mut random, engine.vocabulary(), PROMPT))
        .collect();
    let mut next = greedy(engine, &slots, &prompts)?;
    next = greedy(engine, &slots, &next)?;
    let mut seconds = Vec::new();
    for _ in 0..TURNS {
        let clock = Instant::now();
        for _ in 0..steps {
            next = greedy(engine, &slots, &next)?;
        }
        seconds.push(clock.elapsed().as_secs_f64() / f64::from(steps));
    }
    slots.into_iter().for_each(|slot| engine.close(slot));
    let seconds = median(seconds);
    Ok(Decoded {
        batch,
        milliseconds: seconds * 1e3,
        tokens_per_second: batch as f64 / seconds,
        share_of_bound: bound(engine, batch) / seconds,
    })
}

/// Seconds of a step at best.
fn bound(engine: &Engine, batch: usize) -> f64 {
    let LoadedModel {
        transformer,
        params,
        ..
    } = engine.model();
    let config = transformer.config();
    let embedding = config.vocab * config.dim;
    let weights = (params.elements() - if config.tied { 0 } else { embedding }) as f64;
    let bytes = params.kind().elt_size_in_bytes() as f64 * weights;
    let batch = batch as f64;
    let states = Slots::bytes_of_each(config, params.kind()).unwrap_or(0) as f64;
    (bytes / BANDWIDTH).max(2.0 * weights * batch / OPERATIONS) + 2.0 * batch * states / BANDWIDTH
}

/// The time to the first token of a prompt of so many tokens.
pub fn prefill(engine: &mut Engine, length: usize) -> Result<Prefilled, BenchError> {
    let mut random = ChaCha8Rng::seed_from_u64(length as u64);
    let mut seconds = Vec::new();
    for _ in 0..TURNS {
        let slots = opened(engine, 1)?;
        let prompt = tokens(&mut random, engine.vocabulary(), length);
        let clock = Instant::now();
        greedy(engine, &slots, &[prompt])?;
        seconds.push(clock.elapsed().as_secs_f64());
        slots.into_iter().for_each(|slot| engine.close(slot));
    }
    let seconds = median(seconds);
    Ok(Prefilled {
        tokens: length,
        seconds,
        tokens_per_second: length as f64 / seconds,
    })
}

/// The time of a token after each of `lengths`, which ascend. A SUPRA model reads all tokens up to there; a softmax model
/// gets a cache of random numbers, since reading that far takes it minutes.
pub fn far(engine: &mut Engine, lengths: &[usize], steps: u32) -> Result<Vec<Far>, BenchError> {
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let recurrent = engine.model().transformer.config().supra().is_some();
    let mut slots = opened(engine, 1)?;
    let mut rows = Vec::new();
    for &length in lengths {
        let position = engine.position(&slots[0]) as usize;
        if recurrent {
            let unread = length.saturating_sub(position + 1).max(1);
            let unread = tokens(&mut random, engine.vocabulary(), unread);
            greedy(engine, &slots, &[unread])?;
        } else {
            slots.into_iter().for_each(|slot| engine.close(slot));
            slots = vec![engine.load(&random_cache(engine, length))?];
        }
        let mut next = tokens(&mut random, engine.vocabulary(), 1);
        let mut times = Vec::new();
        for _ in 0..steps.max(2) {
            let clock = Instant::now();
            next = greedy(engine, &slots, &[next])?.remove(0);
            times.push(clock.elapsed().as_secs_f64());
        }
        rows.push(Far {
            tokens: length,
            milliseconds: median(times) * 1e3,
            bytes: engine.state_bytes(&slots[0]),
        });
    }
    slots.into_iter().for_each(|slot| engine.close(slot));
    Ok(rows)
}

fn random_cache(engine: &Engine, length: usize) -> SavedState {
    let LoadedModel {
        transformer,
        params,
        ..
    } = engine.model();
    let config = transformer.config();
    let shape = [config.kv_heads, length as i64, config.head_dim];
    let names = (0..config.layers)
        .flat_map(|layer| ["k_ktd", "v_kte"].map(|name| format!("layers.{layer}.{name}")));
    let draw = |name| (name, Tensor::randn(shape, (params.kind(), params.device())));
    SavedState {
        position: length as u64,
        tensors: names.map(draw).collect(),
    }
}

fn opened(engine: &mut Engine, count: usize) -> Result<Vec<Slot>, EngineError> {
    let slots = engine.slots();
    (0..count)
        .map(|_| engine.open().ok_or(EngineError::Full { slots }))
        .collect()
}

/// Reads tokens of each sequence, and gives the likeliest next one of each.
fn greedy(
    engine: &mut Engine,
    slots: &[Slot],
    tokens: &[Vec<u32>],
) -> Result<Vec<Vec<u32>>, EngineError> {
    let pieces: Vec<Piece<'_>> = slots
        .iter()
        .zip(tokens)
        .map(|(slot, tokens)| Piece {
            slot,
            tokens,
            want: Want::Greedy,
        })
        .collect();
    let next = |output| match output {
        Output::Greedy(token) => vec![token],
        other => unreachable!("invariant: the likeliest token was wanted, not {other:?}"),
    };
    Ok(engine.advance(&pieces)?.into_iter().map(next).collect())
}

fn tokens(random: &mut ChaCha8Rng, vocabulary: u32, count: usize) -> Vec<u32> {
    (0..count)
        .map(|_| random.random_range(0..vocabulary))
        .collect()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
