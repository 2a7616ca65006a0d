//! Texts on the screen: in their order, each as it grows, or as JSON when it is whole.

use serde::Serialize;
use supra_worker::inference::{
    compare::Comparison,
    generate::{End, Event, GenerateError, Generated},
    text::token_text,
};
use tokenizers::Tokenizer;

use super::{failure::Failure, out};

/// How texts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// As they grow.
    Running,
    /// Each as a JSON object when it has ended.
    Json {
        /// With the probabilities of tokens.
        logprobs: bool,
        /// Not by itself: [`Texts::answer`] adds something.
        later: bool,
    },
}

/// Several texts in the making, of which one is written at a time.
pub struct Texts<'a> {
    prompts: &'a [String],
    tokenizer: &'a Tokenizer,
    continuations: usize,
    style: Style,
    /// The text that is being written.
    current: usize,
    texts: Vec<Text>,
}

#[derive(Default)]
struct Text {
    /// Whether its prompt is written.
    begun: bool,
    /// New text that is not written yet.
    waiting: String,
    done: Option<Box<Generated>>,
}

/// A text that has ended.
pub struct Done<'a> {
    text: usize,
    /// All of it.
    pub generated: &'a Generated,
}

/// The JSON answer.
#[derive(Serialize)]
struct Answer<'a> {
    prompt: &'a str,
    /// Which continuation of the prompt, from 0 on.
    continuation: usize,
    text: &'a str,
    finish_reason: End,
    /// Tokens before the new ones, those of a loaded state included.
    prompt_tokens: usize,
    tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<Token>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<&'a Comparison>,
}

#[derive(Serialize)]
struct Token {
    #[serde(flatten)]
    token: Named,
    /// The likeliest tokens in its place, from the likeliest on.
    top: Vec<Named>,
}

#[derive(Serialize)]
struct Named {
    id: u32,
    text: String,
    logprob: f64,
}

impl<'a> Texts<'a> {
    /// So many continuations of each prompt.
    pub fn new(
        prompts: &'a [String],
        tokenizer: &'a Tokenizer,
        continuations: usize,
        style: Style,
    ) -> Texts<'a> {
        let all = prompts.len() * continuations;
        Texts {
            prompts,
            tokenizer,
            continuations,
            style,
            current: 0,
            texts: (0..all).map(|_| Text::default()).collect(),
        }
    }

    /// Takes what has happened, and writes what can be written now.
    pub fn hear(&mut self, event: Event<'_>) -> Result<(), Failure> {
        match event {
            Event::Text { text, piece } => self.texts[text].waiting += piece,
            Event::Done { text, generated } => self.texts[text].done = Some(generated),
        }
        while let Some(text) = self.texts.get_mut(self.current) {
            if self.style == Style::Running && !text.waiting.is_empty() {
                if !std::mem::replace(&mut text.begun, true) {
                    text.waiting
                        .insert_str(0, &self.prompts[self.current / self.continuations]);
                }
                out::write(&std::mem::take(&mut text.waiting))?;
            }
            let Some(generated) = self.texts[self.current].done.as_deref() else {
                break;
            };
            let done = Done {
                text: self.current,
                generated,
            };
            match self.style {
                Style::Json { later: true, .. } => {}
                Style::Json { .. } => self.answer(&done, None)?,
                Style::Running => self.conclude(&done)?,
            }
            self.current += 1;
        }
        Ok(())
    }

    /// Those that have ended, in their order.
    pub fn done(&self) -> Vec<Done<'_>> {
        let texts = self.texts.iter().enumerate();
        texts
            .filter_map(|(text, state)| {
                let generated = state.done.as_deref()?;
                Some(Done { text, generated })
            })
            .collect()
    }

    /// Which text it is, where there are several; a line.
    pub fn heading(&self, done: &Done<'_>) -> String {
        let (prompt, continuation) = (
            done.text / self.continuations + 1,
            done.text % self.continuations + 1,
        );
        match (self.texts.len(), self.continuations) {
            (1, _) => String::new(),
            (_, 1) => format!("prompt {prompt}: "),
            _ => format!("prompt {prompt}, continuation {continuation}: "),
        }
    }

    /// Prints a text as JSON.
    pub fn answer(&self, done: &Done<'_>, comparison: Option<&Comparison>) -> Result<(), Failure> {
        let generated = done.generated;
        let named = |id, logprob| {
            let text = token_text(self.tokenizer, id).map_err(GenerateError::Tokenizer)?;
            Ok(Named { id, text, logprob })
        };
        let tokens = generated.tokens.iter().filter_map(|token| {
            let logprob = token.logprob?;
            let top = token.top.iter().map(|&(id, logprob)| named(id, logprob));
            let both = named(token.id, logprob).and_then(|token| {
                let top = top.collect::<Result<_, _>>()?;
                Ok(Token { token, top })
            });
            Some(both)
        });
        let tokens: Result<Vec<Token>, GenerateError> = tokens.collect();
        out::json(&Answer {
            prompt: &self.prompts[done.text / self.continuations],
            continuation: done.text % self.continuations,
            text: &generated.text,
            finish_reason: generated.end,
            prompt_tokens: generated.prompt_tokens(),
            tokens: generated.tokens.len(),
            prefill_seconds: generated.prefill.as_secs_f64(),
            decode_seconds: generated.decode.as_secs_f64(),
            logprobs: matches!(self.style, Style::Json { logprobs: true, .. }).then_some(tokens?),
            comparison,
        })
    }

    fn conclude(&self, done: &Done<'_>) -> Result<(), Failure> {
        let generated = done.generated;
        if !self.texts[done.text].begun {
            out::write(&self.prompts[done.text / self.continuations])?;
        }
        out::write("\n")?;
        let (tokens, seconds) = (generated.tokens.len(), generated.decode.as_secs_f64());
        out::complain(&format!(
            "[{tokens} tokens in {seconds:.2} s: {:.1} tokens/s; prompt of {} tokens in {:.2} s]",
            tokens as f64 / seconds.max(1e-9),
            generated.prompt_tokens(),
            generated.prefill.as_secs_f64()
        ));
        Ok(())
    }
}
