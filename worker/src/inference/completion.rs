//! From sampled tokens to the text of an answer, and why it ends. It computes nothing and waits for nothing.

use serde::Serialize;
use thiserror::Error;
use tokenizers::Tokenizer;

use super::{stop::StopMatcher, text::TextStream};

/// What ends a completion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Most new tokens.
    pub max_tokens: usize,
    /// Tokens that end the text and are not part of it.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the text and are not part of it; empty ones are an error.
    pub stop_strings: Vec<String>,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// By a token or a string that ends texts.
    Stop,
    /// By the number of tokens.
    Length,
}

impl Finish {
    /// As OpenAI's interface calls it.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}

/// What a token brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Text that may be shown now; often empty, for what may become part of a character or of a stop string waits.
    pub text: String,
    /// Whether and why that was all.
    pub finished: Option<Finish>,
}

/// Why there is no completion.
#[derive(Debug, Error)]
pub enum CompletionError {
    /// It would end before it began.
    #[error("a stop string is empty: it would end every text at once; leave it out")]
    EmptyStop,
    /// The tokenizer does not know its own tokens.
    #[error("the tokenizer fails on the prompt: {0}")]
    Tokenizer(tokenizers::Error),
}

/// One text in the making.
#[derive(Debug)]
pub struct Completion<'a> {
    text: TextStream<'a>,
    stops: StopMatcher,
    limits: Limits,
    tokens: usize,
    finished: Option<Finish>,
}

impl<'a> Completion<'a> {
    /// The text behind a prompt. With no tokens to come it is finished from the start.
    ///
    /// # Errors
    ///
    /// A stop string is empty, or the prompt cannot be decoded.
    pub fn new(
        tokenizer: &'a Tokenizer,
        prompt: &[u32],
        limits: Limits,
    ) -> Result<Completion<'a>, CompletionError> {
        if limits.stop_strings.iter().any(String::is_empty) {
            return Err(CompletionError::EmptyStop);
        }
        Ok(Completion {
            text: TextStream::after(tokenizer, prompt).map_err(CompletionError::Tokenizer)?,
            stops: StopMatcher::new(limits.stop_strings.clone()),
            finished: (limits.max_tokens == 0).then_some(Finish::Length),
            limits,
            tokens: 0,
        })
    }

    /// Takes the next sampled token. After the end there is nothing more to say.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<Progress, tokenizers::Error> {
        if self.finished.is_some() {
            return Ok(Progress {
                text: String::new(),
                finished: self.finished,
            });
        }
        let stops = self.limits.stop_tokens.contains(&token);
        let mut piece = String::new();
        if !stops {
            self.tokens += 1;
            piece += &self.text.push(token)?;
        }
        let last = stops || self.tokens >= self.limits.max_tokens;
        if last {
            piece += &self.text.finish()?;
        }
        let mut cut = self.stops.push(&piece);
        if last && !cut.stopped {
            cut.text += &self.stops.finish();
        }
        self.finished = match (stops || cut.stopped, last) {
            (true, _) => Some(Finish::Stop),
            (false, true) => Some(Finish::Length),
            (false, false) => None,
        };
        Ok(Progress {
            text: cut.text,
            finished: self.finished,
        })
    }

    /// What still waits, when somebody ends the text before its time.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn interrupt(&mut self) -> Result<String, tokenizers::Error> {
        let rest = self.text.finish()?;
        let cut = self.stops.push(&rest);
        Ok(match cut.stopped {
            true => cut.text,
            false => cut.text + &self.stops.finish(),
        })
    }

    /// New tokens of the text so far; one that ends it is not counted.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether and why it has ended.
    pub fn finished(&self) -> Option<Finish> {
        self.finished
    }
}
