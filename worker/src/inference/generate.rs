//! Text from a model: the prompt in one pass, then one token at a time from the recurrent state.
//!
//! A SUPRA model needs the same memory and time for every token; a softmax model keeps and reads all
//! keys and values.

use std::time::{Duration, Instant};

use thiserror::Error;
use tokenizers::Tokenizer;

use super::engine::{Engine, EngineError, Output, Piece, Slot, Want};
use super::sampler::{Sampler, Sampling};

/// How far to go.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most new tokens.
    pub max_tokens: usize,
    /// How they are drawn.
    pub sampling: Sampling,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
}

/// What was generated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// The new text.
    pub text: String,
    /// New tokens.
    pub tokens: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Time for the prompt.
    pub prefill: Duration,
    /// Time for the new tokens.
    pub decode: Duration,
}

/// Why there is no text.
#[derive(Debug, Error)]
pub enum GenerateError {
    /// The tokenizer fails on the prompt or on what the model said.
    #[error("the tokenizer fails: {0}")]
    Tokenizer(tokenizers::Error),
    /// Nothing to continue.
    #[error("the prompt has no tokens, and the tokenizer adds none: write a prompt")]
    EmptyPrompt,
    /// The model cannot go on.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Continues a prompt. `emit` gets the new text in pieces that are whole characters.
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &GenerateOptions,
    emit: impl FnMut(&str),
) -> Result<Generated, GenerateError> {
    let slots = engine.slots();
    let slot = engine.open().ok_or(EngineError::Full { slots })?;
    let generated = continue_prompt(engine, &slot, tokenizer, prompt, options, emit);
    engine.close(slot);
    generated
}

fn continue_prompt(
    engine: &mut Engine,
    slot: &Slot,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &GenerateOptions,
    mut emit: impl FnMut(&str),
) -> Result<Generated, GenerateError> {
    let ids = encode(tokenizer, prompt)?;
    let clock = Instant::now();
    let mut logits_v = read(engine, slot, &ids)?;
    let prefill = clock.elapsed();

    let clock = Instant::now();
    let mut sampler = Sampler::new(options.sampling);
    let mut stream = tokenizer.decode_stream(true);
    // The first new token may begin with a space only if something stands before it.
    for &id in &ids {
        stream.step(id).map_err(GenerateError::Tokenizer)?;
    }
    let mut generated = Generated {
        prompt_tokens: ids.len(),
        prefill,
        ..Generated::default()
    };
    while generated.tokens < options.max_tokens {
        let position = engine.position(slot);
        let token = sampler
            .pick(&logits_v)
            .ok_or(EngineError::NotNumbers { position })?;
        if options.stop.contains(&token) {
            break;
        }
        generated.tokens += 1;
        // None: the token ends inside a character, and its bytes wait for the next ones.
        if let Some(piece) = stream.step(token).map_err(GenerateError::Tokenizer)? {
            emit(&piece);
            generated.text += &piece;
        }
        if generated.tokens < options.max_tokens {
            logits_v = read(engine, slot, &[token])?;
        }
    }
    generated.decode = clock.elapsed();
    Ok(generated)
}

fn encode(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>, GenerateError> {
    let encoding = tokenizer
        .encode(prompt, true)
        .map_err(GenerateError::Tokenizer)?;
    match encoding.get_ids() {
        [] => Err(GenerateError::EmptyPrompt),
        ids => Ok(ids.to_vec()),
    }
}

/// The logits after more tokens.
fn read(engine: &mut Engine, slot: &Slot, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
    let want = Want::Logits;
    let outputs = engine.advance(&[Piece { slot, tokens, want }])?;
    match outputs.into_iter().next() {
        Some(Output::Logits(logits_v)) => Ok(logits_v),
        other => unreachable!("invariant: logits were wanted, not {other:?}"),
    }
}
