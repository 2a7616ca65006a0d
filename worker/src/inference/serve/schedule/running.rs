//! One completion in its slot: what it reads and draws next.

use std::collections::BTreeSet;

use super::{Drawn, Event, Key, Order, Turn};
use crate::inference::{
    completion::Finish,
    engine::{Output, Want},
    sampler::{Sampler, likeliest},
    serve::fault::Fault,
};

/// A completion in a slot.
pub(super) struct Running<S> {
    pub(super) key: Key,
    pub(super) order: Order,
    pub(super) slot: S,
    sampler: Sampler,
    /// Tokens of the prompt that are read.
    pub(super) read: usize,
    /// Where others wait for the state.
    pub(super) marks: BTreeSet<usize>,
    /// New tokens; all but the last are read.
    drawn: Vec<u32>,
}

impl<S> Running<S> {
    /// One in a slot, of whose prompt `read` tokens are read.
    pub(super) fn new(key: Key, order: Order, slot: S, read: usize) -> Running<S> {
        Running {
            sampler: Sampler::new(order.sampling, &order.prompt),
            key,
            order,
            slot,
            read,
            marks: BTreeSet::new(),
            drawn: Vec::new(),
        }
    }

    /// Whether the prompt is not read yet.
    pub(super) fn reads(&self) -> bool {
        self.read < self.order.prompt.len()
    }

    /// Where the piece of the prompt that is read next has to end. What follows the last token is drawn, and not scored.
    pub(super) fn stop(&self) -> usize {
        let length = self.order.prompt.len();
        let scored = self.order.score_prompt && self.read + 1 < length;
        let end = if scored { length - 1 } else { length };
        let mark = self.marks.range(self.read + 1..).next();
        mark.map_or(end, |&mark| mark.min(end))
    }

    /// What it reads next, up to token `end` of its prompt.
    pub(super) fn turn(&self, end: usize) -> Option<Turn<'_, S>> {
        let prompt = &self.order.prompt;
        let (tokens, want) = if !self.reads() {
            (self.drawn.last().map(std::slice::from_ref)?, self.draw())
        } else if end == prompt.len() {
            (&prompt[self.read..], self.draw())
        } else if self.order.score_prompt {
            let next = &prompt[self.read + 1..end + 1];
            let top = self.order.top.unwrap_or(0);
            (&prompt[self.read..end], Want::Scores { next, top })
        } else {
            (&prompt[self.read..end], Want::Nothing)
        };
        Some(Turn {
            slot: &self.slot,
            tokens,
            want,
        })
    }

    /// What a token is drawn from: where only the likeliest one matters, no logits have to come from the device.
    fn draw(&self) -> Want<'static> {
        match self.order.top.is_none() && self.order.sampling.is_greedy() {
            true => Want::Greedy,
            false => Want::Logits,
        }
    }

    /// What an output of its turn brings.
    pub(super) fn take(&mut self, output: Output) -> Vec<Event> {
        match output {
            Output::Nothing => Vec::new(),
            Output::Scores(scores) => {
                let last = self.read + 1 == self.order.prompt.len() && self.order.max_tokens == 0;
                let end = last.then_some(Event::Finished(Finish::Length));
                [Event::Scores(scores)].into_iter().chain(end).collect()
            }
            Output::Greedy(token) => self.add(Drawn {
                token,
                logprob: None,
                top: Vec::new(),
            }),
            Output::Logits(logits) => match self.sampler.pick(&logits) {
                Some(choice) => self.add(Drawn {
                    token: choice.token,
                    logprob: self.order.top.map(|_| choice.logprob),
                    top: (self.order.top).map_or_else(Vec::new, |top| likeliest(&logits, top)),
                }),
                None => vec![Event::Failed(Fault::internal(
                    "the model's logits are not numbers: its weights are damaged or did not converge",
                ))],
            },
        }
    }

    fn add(&mut self, drawn: Drawn) -> Vec<Event> {
        if self.order.stop_tokens.contains(&drawn.token) {
            return vec![Event::Finished(Finish::Stop)];
        }
        self.drawn.push(drawn.token);
        let full = self.drawn.len() >= self.order.max_tokens;
        let end = full.then_some(Event::Finished(Finish::Length));
        [Event::Token(drawn)].into_iter().chain(end).collect()
    }

    /// The tokens whose state is in the slot.
    pub(super) fn seen(&self) -> Vec<u32> {
        let mut tokens = self.order.prompt[..self.read].to_vec();
        // The last one was never put in, unless a token that is not told followed it.
        let ended = self.drawn.len() < self.order.max_tokens;
        let read = if ended {
            self.drawn.len()
        } else {
            self.drawn.len().saturating_sub(1)
        };
        tokens.extend(&self.drawn[..read]);
        tokens
    }
}
