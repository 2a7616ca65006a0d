//! Log-probabilities beside a text, as OpenAI's completions tell them.

use std::collections::BTreeMap;

use serde::Serialize;
use tokenizers::Tokenizer;

use crate::inference::text::token_text;

/// JSON has no infinity; OpenAI's interface says this instead.
const IMPOSSIBLE: f64 = -9999.0;

/// Lists of the same length, one entry per token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Logprobs {
    /// Characters of the choice's text before the token.
    pub text_offset: Vec<usize>,
    /// Natural logarithm of the token's probability; null for the first one of a prompt, which nothing precedes.
    pub token_logprobs: Vec<Option<f64>>,
    /// The token as text.
    pub tokens: Vec<String>,
    /// The likeliest tokens at its place, and the token itself.
    pub top_logprobs: Vec<Option<BTreeMap<String, f64>>>,
}

/// What is known of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Characters before it.
    pub offset: usize,
    /// The token.
    pub token: u32,
    /// Its log-probability, if there is one.
    pub logprob: Option<f64>,
    /// The likeliest ones.
    pub top: Vec<(u32, f64)>,
}

impl Logprobs {
    /// Adds a token.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn push(
        &mut self,
        tokenizer: Option<&Tokenizer>,
        entry: &Entry,
    ) -> Result<(), tokenizers::Error> {
        let token = name(tokenizer, entry.token)?;
        let logprob = entry.logprob.map(|logprob| logprob.max(IMPOSSIBLE));
        let top = logprob.map(|own| {
            let mut top = BTreeMap::new();
            for &(token, logprob) in &entry.top {
                top.insert(name(tokenizer, token)?, logprob.max(IMPOSSIBLE));
            }
            top.insert(token.clone(), own);
            Ok::<_, tokenizers::Error>(top)
        });
        self.text_offset.push(entry.offset);
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top.transpose()?);
        self.tokens.push(token);
        Ok(())
    }

    /// Adds those of a later piece.
    pub fn extend(&mut self, more: Logprobs) {
        self.text_offset.extend(more.text_offset);
        self.token_logprobs.extend(more.token_logprobs);
        self.tokens.extend(more.tokens);
        self.top_logprobs.extend(more.top_logprobs);
    }
}

/// A token as text: one that is only a part of a character by its name in the vocabulary, so that no two are called the same.
fn name(tokenizer: Option<&Tokenizer>, token: u32) -> Result<String, tokenizers::Error> {
    let Some(tokenizer) = tokenizer else {
        return Ok(format!("token_id:{token}"));
    };
    let text = token_text(tokenizer, token)?;
    if !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) {
        return Ok(text);
    }
    Ok(tokenizer
        .id_to_token(token)
        .unwrap_or_else(|| format!("token_id:{token}")))
}
