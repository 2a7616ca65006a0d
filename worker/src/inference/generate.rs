//! Text from a model: the prompt in one pass, then one token at a time from the recurrent state.
//!
//! A SUPRA model needs the same memory and time for every token; a softmax model keeps and reads all
//! keys and values.

use std::time::{Duration, Instant};

use tch::Tensor;
use thiserror::Error;
use tokenizers::Tokenizer;

use super::sampler::{Sampler, Sampling};
use crate::model::{Params, Transformer};

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
    /// The tokenizer belongs to another model.
    #[error(
        "the prompt has token {token}, but the model's vocabulary has {vocabulary} tokens: the tokenizer does not fit"
    )]
    Vocabulary {
        /// The token.
        token: u32,
        /// Tokens of the model.
        vocabulary: i64,
    },
    /// The weights are broken.
    #[error(
        "the model's logits are not numbers after {tokens} new tokens: its weights are damaged or did not converge"
    )]
    NotNumbers {
        /// New tokens so far.
        tokens: usize,
    },
}

/// Continues a prompt. `emit` gets the new text in pieces that are whole characters.
pub fn generate(
    model: &Transformer,
    params: &Params,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &GenerateOptions,
    emit: impl FnMut(&str),
) -> Result<Generated, GenerateError> {
    tch::no_grad(|| continue_prompt(model, params, tokenizer, prompt, options, emit))
}

fn continue_prompt(
    model: &Transformer,
    params: &Params,
    tokenizer: &Tokenizer,
    prompt: &str,
    options: &GenerateOptions,
    mut emit: impl FnMut(&str),
) -> Result<Generated, GenerateError> {
    let ids = encode(tokenizer, prompt, model.config().vocab)?;
    let clock = Instant::now();
    let wide: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let ids_bt = Tensor::from_slice(&wide)
        .unsqueeze(0)
        .to_device(params.device());
    let (logits_btv, mut state) = model.prefill(params, &ids_bt);
    let mut logits_v = to_host(&logits_btv.select(1, ids.len() as i64 - 1));
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
        let token = sampler.pick(&logits_v).ok_or(GenerateError::NotNumbers {
            tokens: generated.tokens,
        })?;
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
            let ids_b = Tensor::from_slice(&[i64::from(token)]).to_device(params.device());
            logits_v = to_host(&model.step(params, &mut state, &ids_b));
        }
    }
    generated.decode = clock.elapsed();
    Ok(generated)
}

fn encode(tokenizer: &Tokenizer, prompt: &str, vocabulary: i64) -> Result<Vec<u32>, GenerateError> {
    let encoding = tokenizer
        .encode(prompt, true)
        .map_err(GenerateError::Tokenizer)?;
    let ids = encoding.get_ids();
    match ids.iter().find(|&&token| i64::from(token) >= vocabulary) {
        Some(&token) => Err(GenerateError::Vocabulary { token, vocabulary }),
        None if ids.is_empty() => Err(GenerateError::EmptyPrompt),
        None => Ok(ids.to_vec()),
    }
}

fn to_host(logits_1v: &Tensor) -> Vec<f32> {
    let logits_v = logits_1v.reshape([-1]).to_kind(tch::Kind::Float);
    let mut host = vec![0f32; logits_v.numel()];
    logits_v.copy_data(&mut host, logits_v.numel());
    host
}
