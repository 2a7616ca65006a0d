//! One completion in the making, from what the schedule tells to what the client reads. It waits for nothing.

use std::collections::VecDeque;

use super::{
    fault::Fault,
    logprobs::{Entry, Logprobs},
    request::{Prompt, Wishes},
    schedule::{Drawn, Event},
    served::Served,
};
use crate::inference::{
    completion::{Completion, Finish, Limits},
    score::Score,
    text::TextStream,
};

/// A piece of a completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// Text that may be shown now.
    pub text: String,
    /// If they were asked for.
    pub logprobs: Option<Logprobs>,
    /// The tokens, if they were asked for.
    pub token_ids: Vec<u32>,
    /// Whether and why that was all.
    pub finish: Option<Finish>,
}

impl Part {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        let silent = self
            .logprobs
            .as_ref()
            .is_none_or(|told| told.tokens.is_empty());
        self.text.is_empty() && self.token_ids.is_empty() && self.finish.is_none() && silent
    }

    /// Adds a later piece.
    pub fn extend(&mut self, more: Part) {
        self.text += &more.text;
        self.token_ids.extend(more.token_ids);
        self.finish = self.finish.or(more.finish);
        match (&mut self.logprobs, more.logprobs) {
            (Some(told), Some(more)) => told.extend(more),
            (told @ None, more) => *told = more,
            (Some(_), None) => {}
        }
    }
}

/// A completion in the making.
pub struct Choice<'a> {
    served: &'a Served,
    prompt: &'a Prompt,
    wishes: Wishes,
    /// The text, where there is a tokenizer.
    completion: Option<Completion<'a>>,
    /// The same text without what stop strings do to it, for the places of tokens in it.
    places: Option<TextStream<'a>>,
    /// How likely the prompt's tokens are, as far as that is known.
    scores: Vec<Score>,
    /// Characters that were told, with the echo.
    told: usize,
    /// Characters up to the next token's place.
    place: usize,
    /// Tokens whose text was not told yet.
    held: VecDeque<Entry>,
    /// New tokens.
    tokens: usize,
    finished: bool,
}

/// The tokenizer knows its own tokens, or it is broken.
fn broken(error: impl std::fmt::Display) -> Fault {
    Fault::internal(format!("the tokenizer fails: {error}"))
}

impl<'a> Choice<'a> {
    /// A completion of a prompt, and what is told before its first token.
    ///
    /// # Errors
    ///
    /// The tokenizer cannot decode.
    pub fn begin(
        served: &'a Served,
        prompt: &'a Prompt,
        wishes: Wishes,
        max_tokens: usize,
        stop_strings: &[String],
    ) -> Result<(Choice<'a>, Part), Fault> {
        let limits = Limits {
            max_tokens,
            // The schedule knows them.
            stop_tokens: Vec::new(),
            stop_strings: stop_strings.to_vec(),
        };
        let tokenizer = served.tokenizer.as_ref();
        let completion =
            tokenizer.map(|tokenizer| Completion::new(tokenizer, &prompt.tokens, limits));
        let places = tokenizer
            .filter(|_| wishes.logprobs.is_some())
            .map(|tokenizer| TextStream::after(tokenizer, &prompt.tokens));
        let mut choice = Choice {
            served,
            prompt,
            wishes,
            completion: completion.transpose().map_err(broken)?,
            places: places.transpose().map_err(broken)?,
            scores: Vec::new(),
            told: 0,
            place: 0,
            held: VecDeque::new(),
            tokens: 0,
            finished: false,
        };
        let part = choice.echo()?;
        Ok((choice, part))
    }

    /// New tokens so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether nothing comes any more.
    pub fn finished(&self) -> bool {
        self.finished
    }

    /// Takes what the schedule tells. After the end there is nothing more to say.
    ///
    /// # Errors
    ///
    /// There is no completion, or the tokenizer cannot decode.
    pub fn push(&mut self, event: Event) -> Result<Part, Fault> {
        if self.finished {
            return Ok(Part::default());
        }
        let part = match event {
            Event::Failed(fault) => return Err(fault),
            Event::Scores(scores) => {
                self.scores.extend(scores);
                self.echo()?
            }
            Event::Token(drawn) => self.token(drawn)?,
            Event::Finished(finish) => self.end(finish)?,
        };
        self.finished = part.finish.is_some();
        Ok(part)
    }

    /// The prompt, as soon as all that is to be told of it is known.
    fn echo(&mut self) -> Result<Part, Fault> {
        let scored = self.wishes.logprobs.is_some();
        if !self.wishes.echo || (scored && self.scores.len() + 1 < self.prompt.tokens.len()) {
            return Ok(Part::default());
        }
        let tokens = &self.prompt.tokens;
        let (places, decoded) = self.prompt_text()?;
        let text = self.prompt.text.clone().unwrap_or(decoded);
        let logprobs = scored.then(|| {
            let mut told = Logprobs::default();
            let scores = std::iter::once(None).chain(self.scores.drain(..).map(Some));
            for ((&token, offset), score) in tokens.iter().zip(places).zip(scores) {
                let entry = Entry {
                    offset,
                    token,
                    logprob: score.as_ref().map(|score| score.logprob),
                    top: score.map_or_else(Vec::new, |score| score.top),
                };
                told.push(self.served.tokenizer.as_ref(), &entry)?;
            }
            Ok(told)
        });
        self.told = text.chars().count();
        self.place = self.told;
        Ok(Part {
            text,
            logprobs: logprobs
                .transpose()
                .map_err(|error: tokenizers::Error| broken(error))?,
            token_ids: match self.wishes.token_ids {
                true => tokens.to_vec(),
                false => Vec::new(),
            },
            finish: None,
        })
    }

    /// Where each token of the prompt stands in its text, and the text.
    fn prompt_text(&self) -> Result<(Vec<usize>, String), Fault> {
        let Some(tokenizer) = &self.served.tokenizer else {
            return Ok((vec![0; self.prompt.tokens.len()], String::new()));
        };
        let mut stream = TextStream::after(tokenizer, &[]).map_err(broken)?;
        let (mut places, mut text, mut characters) = (Vec::new(), String::new(), 0);
        for &token in &*self.prompt.tokens {
            places.push(characters);
            let piece = stream.push(token).map_err(broken)?;
            characters += piece.chars().count();
            text += &piece;
        }
        text += &stream.finish().map_err(broken)?;
        Ok((places, text))
    }

    fn token(&mut self, drawn: Drawn) -> Result<Part, Fault> {
        self.tokens += 1;
        let token = drawn.token;
        if self.wishes.logprobs.is_some() {
            self.held.push_back(Entry {
                offset: self.place,
                token,
                logprob: drawn.logprob,
                top: drawn.top,
            });
        }
        if let Some(places) = &mut self.places {
            self.place += places.push(token).map_err(broken)?.chars().count();
        }
        let progress = self
            .completion
            .as_mut()
            .map(|completion| completion.push(token));
        let progress = progress.transpose().map_err(broken)?.unwrap_or_default();
        let whole = progress.finished == Some(Finish::Length) || self.completion.is_none();
        let mut part = self.release(progress.text, progress.finished, whole)?;
        if self.wishes.token_ids {
            part.token_ids.push(token);
        }
        Ok(part)
    }

    /// The end that the schedule has seen.
    fn end(&mut self, finish: Finish) -> Result<Part, Fault> {
        let rest = self.completion.as_mut().map(Completion::interrupt);
        let rest = rest.transpose().map_err(broken)?.unwrap_or_default();
        self.release(rest, Some(finish), true)
    }

    /// Text, with the tokens that begin in it; with all tokens, if no stop string cuts the text before the last of them.
    fn release(
        &mut self,
        text: String,
        finish: Option<Finish>,
        whole: bool,
    ) -> Result<Part, Fault> {
        self.told += text.chars().count();
        let logprobs = self.wishes.logprobs.map(|_| {
            let mut told = Logprobs::default();
            while let Some(entry) = self
                .held
                .pop_front_if(|entry| whole || entry.offset < self.told)
            {
                told.push(self.served.tokenizer.as_ref(), &entry)?;
            }
            Ok(told)
        });
        Ok(Part {
            text,
            logprobs: logprobs
                .transpose()
                .map_err(|error: tokenizers::Error| broken(error))?,
            token_ids: Vec::new(),
            finish,
        })
    }
}
