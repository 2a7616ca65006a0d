//! Answers that the model writes itself: the likeliest token each time, up to the end of the line.

use tokenizers::Tokenizer;

use super::{
    super::engine::{Engine, EngineError, Output, Piece, Slot, Want},
    TaskError,
};

/// When an answer ends.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// Most tokens.
    pub tokens: usize,
    /// Tokens that end it.
    pub stop: &'a [u32],
}

/// An answer under way.
struct Writing {
    prompt: usize,
    slot: Slot,
    written: Vec<u32>,
}

/// The text behind each prompt up to its first line break. New prompts are read beside answers that are under way.
pub fn write(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    limits: Limits<'_>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<String>, WriteError> {
    let mut answers = vec![String::new(); prompts.len()];
    let mut waiting = (0..prompts.len()).rev().collect::<Vec<_>>();
    // The longest first: what does not fit into memory shows at once.
    waiting.sort_by_key(|&prompt| prompts[prompt].len());
    let mut writing: Vec<Writing> = Vec::new();
    let mut done = 0;
    while !(waiting.is_empty() && writing.is_empty()) {
        while let Some(&prompt) = waiting.last() {
            let Some(slot) = engine.open() else { break };
            waiting.pop();
            writing.push(Writing {
                prompt,
                slot,
                written: Vec::new(),
            });
        }
        let pieces: Vec<Piece<'_>> = writing
            .iter()
            .map(|answer| Piece {
                slot: &answer.slot,
                tokens: match answer.written.last() {
                    Some(last) => std::slice::from_ref(last),
                    None => &prompts[answer.prompt],
                },
                want: Want::Greedy,
            })
            .collect();
        let outputs = engine.advance(&pieces)?;
        let mut going_on = Vec::with_capacity(writing.len());
        for (mut answer, output) in writing.into_iter().zip(outputs) {
            let Output::Greedy(token) = output else {
                unreachable!("invariant: the likeliest token was asked for")
            };
            let ended = limits.stop.contains(&token);
            if !ended {
                answer.written.push(token);
            }
            let text = tokenizer.decode(&answer.written, true)?;
            let line = text.split('\n').next().unwrap_or_default();
            if ended || line.len() < text.len() || answer.written.len() >= limits.tokens {
                answers[answer.prompt] = line.to_owned();
                engine.close(answer.slot);
                done += 1;
                progress(done, prompts.len());
            } else {
                going_on.push(answer);
            }
        }
        writing = going_on;
    }
    Ok(answers)
}

/// Why an answer is not written.
pub enum WriteError {
    /// The model does not go on.
    Engine(EngineError),
    /// What it wrote is no text.
    Tokenizer(tokenizers::Error),
}

impl From<EngineError> for WriteError {
    fn from(error: EngineError) -> WriteError {
        WriteError::Engine(error)
    }
}

impl From<tokenizers::Error> for WriteError {
    fn from(error: tokenizers::Error) -> WriteError {
        WriteError::Tokenizer(error)
    }
}

impl WriteError {
    /// The error of the task at `path`.
    pub fn of(self, path: &std::path::Path) -> TaskError {
        match self {
            WriteError::Engine(error) => error.into(),
            WriteError::Tokenizer(cause) => TaskError::Tokenizer {
                path: path.to_owned(),
                cause,
            },
        }
    }
}
