//! Texts from a model: prompts are read at once, and continued token by token, several side by side.
//!
//! A SUPRA model needs the same memory and time for every token; a softmax model keeps and reads all keys and values. Several
//! continuations of one prompt go on from copies of its state.

use std::time::{Duration, Instant};

use serde::Serialize;
use thiserror::Error;
use tokenizers::Tokenizer;

use super::{
    completion::{Completion, CompletionError, Finish, Limits},
    engine::{Engine, EngineError, Output, Piece, Slot, Want},
    sampler::{Choice, Sampler, Sampling, likeliest},
    saved::SavedText,
};

/// How to go on.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// What ends a text.
    pub limits: Limits,
    /// How tokens are drawn. Continuation i of each prompt has the seed behind this by i.
    pub sampling: Sampling,
    /// Continuations of each prompt, at least one.
    pub continuations: usize,
    /// Whether the probabilities of tokens are told, and of how many others beside each.
    pub logprobs: Option<usize>,
    /// Whether each text is kept with what the model remembers of it.
    pub save: bool,
}

/// What is to be continued.
#[derive(Clone, Copy, Debug)]
pub struct Start<'a> {
    /// A text that was read before; none begins a new one.
    pub from: Option<&'a SavedText>,
    /// Tokens behind it, at least one of a new text.
    pub tokens: &'a [u32],
}

/// A new token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its number.
    pub id: u32,
    /// Natural logarithm of its probability, if that was asked for.
    pub logprob: Option<f64>,
    /// The likeliest tokens in its place with theirs, as many as were asked for.
    pub top: Vec<(u32, f64)>,
}

/// Why a text ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum End {
    /// By itself, or by its limits.
    Finished(Finish),
    /// Somebody wanted no more.
    #[serde(serialize_with = "interrupted")]
    Interrupted,
}

fn interrupted<S: serde::Serializer>(serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str("interrupted")
}

/// A continuation that has ended.
#[derive(Debug)]
pub struct Generated {
    /// The new text.
    pub text: String,
    /// The new tokens; one that ends the text is not among them.
    pub tokens: Vec<Token>,
    /// All tokens, the prompt's and those before it included.
    pub all_tokens: Vec<u32>,
    /// Why it ended.
    pub end: End,
    /// Time from its beginning to the first logits.
    pub prefill: Duration,
    /// Time from there to its end.
    pub decode: Duration,
    /// What was asked to be kept.
    pub saved: Option<SavedText>,
}

impl Generated {
    /// Tokens before the new ones.
    pub fn prompt_tokens(&self) -> usize {
        self.all_tokens.len() - self.tokens.len()
    }
}

/// What happens, to continuation `text % continuations` of prompt `text / continuations`.
#[derive(Debug)]
pub enum Event<'a> {
    /// New text.
    Text {
        /// Which text.
        text: usize,
        /// Its next piece: whole characters.
        piece: &'a str,
    },
    /// There will be no more of it.
    Done {
        /// Which text.
        text: usize,
        /// All of it.
        generated: Box<Generated>,
    },
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
    /// The limits are none.
    #[error(transparent)]
    Completion(#[from] CompletionError),
    /// The model cannot go on.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Tokens of a prompt: with what begins a text, unless it goes on from another.
///
/// # Errors
///
/// The tokenizer fails, or a new text has no token.
pub fn encode(
    tokenizer: &Tokenizer,
    prompt: &str,
    goes_on: bool,
) -> Result<Vec<u32>, GenerateError> {
    let encoding = tokenizer
        .encode(prompt, !goes_on)
        .map_err(GenerateError::Tokenizer)?;
    match encoding.get_ids() {
        [] if !goes_on => Err(GenerateError::EmptyPrompt),
        ids => Ok(ids.to_vec()),
    }
}

/// Continues prompts, as many at once as the engine has room for, and tells what happens until all have ended or
/// `interrupted`, which is asked before every token, says so. The engine has at least as many slots as each prompt has
/// continuations; after an error some stay taken.
///
/// # Errors
///
/// The model or the tokenizer cannot go on.
pub fn generate(
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    starts: &[Start<'_>],
    options: &GenerateOptions,
    interrupted: impl Fn() -> bool,
    mut tell: impl FnMut(Event<'_>),
) -> Result<(), GenerateError> {
    if engine.slots() < options.continuations {
        let slots = engine.slots();
        return Err(EngineError::Full { slots }.into());
    }
    let mut waiting = (0..).step_by(options.continuations).zip(starts);
    let mut active: Vec<Sequence<'_>> = Vec::new();
    loop {
        let mut arrived = Vec::new();
        while engine.free() >= options.continuations {
            let Some((text, start)) = waiting.next() else {
                break;
            };
            let sequence = Sequence::begin(engine, tokenizer, (text, start), options)?;
            match start.from.filter(|_| start.tokens.is_empty()) {
                Some(saved) => arrived.push((sequence, Next::Logits(saved.logits.clone()))),
                None => active.push(sequence),
            }
        }
        if interrupted() {
            let open = arrived.into_iter().map(|(sequence, _)| sequence);
            return open.chain(active).try_for_each(|sequence| {
                sequence.end(engine, End::Interrupted, options, &mut tell)
            });
        }
        arrived.extend(read(engine, std::mem::take(&mut active), options)?);
        if arrived.is_empty() {
            return Ok(());
        }
        for (sequence, next) in arrived {
            for mut sequence in sequence.split(engine, tokenizer, options)? {
                match sequence.take(&next, options, &mut tell)? {
                    None => active.push(sequence),
                    Some(finish) => {
                        sequence.end(engine, End::Finished(finish), options, &mut tell)?;
                    }
                }
            }
        }
    }
}

/// What the next token is drawn from.
enum Next {
    Logits(Vec<f32>),
    /// Nothing else is wanted than the likeliest one.
    Greedy(u32),
}

/// Lets sequences read what they have not read, all at once.
fn read<'a>(
    engine: &mut Engine,
    sequences: Vec<Sequence<'a>>,
    options: &GenerateOptions,
) -> Result<Vec<(Sequence<'a>, Next)>, EngineError> {
    if sequences.is_empty() {
        return Ok(Vec::new());
    }
    let only_likeliest =
        options.sampling.is_greedy() && options.logprobs.is_none() && !options.save;
    let want = match only_likeliest {
        true => Want::Greedy,
        false => Want::Logits,
    };
    let pieces: Vec<Piece<'_>> = sequences
        .iter()
        .map(|sequence| sequence.piece(want))
        .collect();
    let outputs = engine
        .advance(&pieces)?
        .into_iter()
        .map(|output| match output {
            Output::Logits(logits) => Next::Logits(logits),
            Output::Greedy(token) => Next::Greedy(token),
            other => unreachable!("invariant: {want:?} was wanted, not {other:?}"),
        });
    let outputs: Vec<Next> = outputs.collect();
    Ok(sequences.into_iter().zip(outputs).collect())
}

/// A text in the making, or a prompt that is being read.
struct Sequence<'a> {
    text: usize,
    slot: Slot,
    unread: Vec<u32>,
    all_tokens: Vec<u32>,
    completion: Completion<'a>,
    sampler: Sampler,
    logits: Vec<f32>,
    written: String,
    tokens: Vec<Token>,
    begun: Instant,
    prefill: Option<Duration>,
}

impl<'a> Sequence<'a> {
    /// Takes a slot for a prompt.
    fn begin(
        engine: &mut Engine,
        tokenizer: &'a Tokenizer,
        (text, start): (usize, &Start<'_>),
        options: &GenerateOptions,
    ) -> Result<Sequence<'a>, GenerateError> {
        let full = EngineError::Full {
            slots: engine.slots(),
        };
        let (slot, before) = match start.from {
            Some(saved) => (engine.load(&saved.state)?, saved.tokens.as_slice()),
            None if start.tokens.is_empty() => return Err(GenerateError::EmptyPrompt),
            None => (engine.open().ok_or(full)?, [].as_slice()),
        };
        let all_tokens = [before, start.tokens].concat();
        Sequence::new(
            tokenizer,
            (text, slot, start.tokens),
            all_tokens,
            Instant::now(),
            options,
        )
    }

    fn new(
        tokenizer: &'a Tokenizer,
        (text, slot, unread): (usize, Slot, &[u32]),
        all_tokens: Vec<u32>,
        begun: Instant,
        options: &GenerateOptions,
    ) -> Result<Sequence<'a>, GenerateError> {
        let continuation = (text % options.continuations) as u64;
        let sampling = Sampling {
            seed: options.sampling.seed.wrapping_add(continuation),
            ..options.sampling
        };
        Ok(Sequence {
            text,
            slot,
            unread: unread.to_owned(),
            completion: Completion::new(tokenizer, &all_tokens, options.limits.clone())?,
            sampler: Sampler::new(sampling, &all_tokens),
            all_tokens,
            logits: Vec::new(),
            written: String::new(),
            tokens: Vec::new(),
            begun,
            prefill: None,
        })
    }

    /// What it has not read.
    fn piece(&self, want: Want<'static>) -> Piece<'_> {
        Piece {
            slot: &self.slot,
            tokens: &self.unread,
            want,
        }
    }

    /// All continuations of a prompt that has just been read; of a text that goes on, itself.
    fn split(
        self,
        engine: &mut Engine,
        tokenizer: &'a Tokenizer,
        options: &GenerateOptions,
    ) -> Result<Vec<Sequence<'a>>, GenerateError> {
        let mut all = vec![self];
        if all[0].prefill.is_some() {
            return Ok(all);
        }
        for continuation in 1..options.continuations {
            let first = &all[0];
            let (text, slots) = (first.text + continuation, engine.slots());
            let slot = engine
                .fork(&first.slot)
                .ok_or(EngineError::Full { slots })?;
            let (all_tokens, begun) = (first.all_tokens.clone(), first.begun);
            all.push(Sequence::new(
                tokenizer,
                (text, slot, &[]),
                all_tokens,
                begun,
                options,
            )?);
        }
        Ok(all)
    }

    /// Draws the next token, and tells what it says; gives why it was the last one.
    fn take(
        &mut self,
        next: &Next,
        options: &GenerateOptions,
        tell: &mut impl FnMut(Event<'_>),
    ) -> Result<Option<Finish>, GenerateError> {
        self.unread.clear();
        self.prefill.get_or_insert_with(|| self.begun.elapsed());
        if let (Next::Logits(logits), true) = (next, options.save) {
            self.logits.clone_from(logits);
        }
        if let Some(finish) = self.completion.finished() {
            return Ok(Some(finish));
        }
        let token = self.draw(next, options)?;
        let progress = self
            .completion
            .push(token.id)
            .map_err(GenerateError::Tokenizer)?;
        // A token that ends the text is not part of it.
        if self.completion.tokens() > self.tokens.len() {
            self.unread.push(token.id);
            self.all_tokens.push(token.id);
            self.tokens.push(token);
        }
        self.tell(&progress.text, tell);
        Ok(progress.finished)
    }

    fn draw(&mut self, next: &Next, options: &GenerateOptions) -> Result<Token, EngineError> {
        let logits = match next {
            Next::Logits(logits) => logits,
            &Next::Greedy(id) => {
                return Ok(Token {
                    id,
                    logprob: None,
                    top: Vec::new(),
                });
            }
        };
        let position = self.all_tokens.len() as u64;
        let choice = self.sampler.pick(logits);
        let Choice { token, logprob } = choice.ok_or(EngineError::NotNumbers { position })?;
        Ok(Token {
            id: token,
            logprob: options.logprobs.map(|_| logprob),
            top: options
                .logprobs
                .map_or(Vec::new(), |top| likeliest(logits, top)),
        })
    }

    fn tell(&mut self, piece: &str, tell: &mut impl FnMut(Event<'_>)) {
        if !piece.is_empty() {
            self.written += piece;
            tell(Event::Text {
                text: self.text,
                piece,
            });
        }
    }

    /// Gives the slot back, and tells that this was all.
    fn end(
        mut self,
        engine: &mut Engine,
        end: End,
        options: &GenerateOptions,
        tell: &mut impl FnMut(Event<'_>),
    ) -> Result<(), GenerateError> {
        let rest = self
            .completion
            .interrupt()
            .map_err(GenerateError::Tokenizer)?;
        self.tell(&rest, tell);
        let lasted = self.begun.elapsed();
        // A prompt that was not read to its end is not worth keeping.
        let saved = match self.prefill.filter(|_| options.save) {
            Some(_) => Some(self.save(engine)?),
            None => None,
        };
        engine.close(self.slot);
        let prefill = self.prefill.unwrap_or(lasted);
        let generated = Box::new(Generated {
            text: self.written,
            tokens: self.tokens,
            all_tokens: self.all_tokens,
            end,
            prefill,
            decode: lasted.saturating_sub(prefill),
            saved,
        });
        tell(Event::Done {
            text: self.text,
            generated,
        });
        Ok(())
    }

    /// The text with all of its tokens read.
    fn save(&mut self, engine: &mut Engine) -> Result<SavedText, EngineError> {
        if !self.unread.is_empty() {
            let outputs = engine.advance(&[self.piece(Want::Logits)])?;
            if let Some(Output::Logits(logits)) = outputs.into_iter().next() {
                self.logits = logits;
            }
        }
        Ok(SavedText {
            state: engine.save(&self.slot),
            tokens: self.all_tokens.clone(),
            logits: self.logits.clone(),
        })
    }
}
