//! Which sequence gets which tokens through the model next: continuous batching. It holds no socket, clock or tensor.
//!
//! A sequence waits until a slot is free, reads its prompt in pieces, and then gets one token a turn until it ends, which frees the
//! slot at once. Every turn takes all sequences that draw tokens and a bounded piece of prompts, so that a long prompt slows the
//! others down and does not stop them. What several prompts begin with is read once and forked.

mod running;

use std::{collections::VecDeque, fmt::Display, sync::Arc};

use rayon::prelude::*;

use self::running::Running;
use super::{
    fault::Fault,
    prefixes::{Prefixes, SHORTEST, common},
};
use crate::inference::{
    completion::Finish,
    engine::{Output, Want},
    sampler::Sampling,
    score::Score,
};

/// Tokens of prompts in a turn beside sequences that draw tokens, which wait for them.
const PROMPT_BESIDE: usize = 256;
/// Tokens of prompts in a turn when nobody waits for it.
const PROMPT_ALONE: usize = 2048;
/// Waiting sequences that are looked at in a turn.
const LOOK: usize = 64;
/// Sequences for which another thread draws, at least.
const DRAWS_PER_THREAD: usize = 4;

/// What reads and continues sequences in slots.
pub trait Machine {
    /// An open sequence.
    type Slot: Send + Sync;
    /// Why it cannot go on.
    type Error: Display;

    /// Slots that are not taken.
    fn free(&self) -> usize;
    /// An empty sequence, if a slot is free.
    fn open(&mut self) -> Option<Self::Slot>;
    /// A copy of a sequence, if a slot is free.
    fn fork(&mut self, from: &Self::Slot) -> Option<Self::Slot>;
    /// Gives a slot back.
    fn close(&mut self, slot: Self::Slot);
    /// Reads the next tokens of sequences, each at most once. After an error these sequences can only be closed.
    fn advance(&mut self, turns: &[Turn<'_, Self::Slot>]) -> Result<Vec<Output>, Self::Error>;
}

/// The next tokens of a sequence, and what is to be told of them.
#[derive(Debug)]
pub struct Turn<'a, S> {
    /// Which sequence.
    pub slot: &'a S,
    /// At least one token.
    pub tokens: &'a [u32],
    /// What is wanted of the logits.
    pub want: Want<'a>,
}

/// One completion to be made.
#[derive(Clone, Debug)]
pub struct Order {
    /// At least one token.
    pub prompt: Arc<[u32]>,
    /// Whether it is told how likely the prompt's own tokens are.
    pub score_prompt: bool,
    /// Most new tokens.
    pub max_tokens: usize,
    /// Tokens that end the text.
    pub stop_tokens: Arc<[u32]>,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Whether log-probabilities are told, and of how many of the likeliest tokens.
    pub top: Option<usize>,
}

/// Which completion of which request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The request.
    pub request: u64,
    /// The completion's number in it.
    pub choice: usize,
}

/// A token that was drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability, if it was asked for.
    pub logprob: Option<f64>,
    /// The likeliest tokens and theirs.
    pub top: Vec<(u32, f64)>,
}

/// What became of a completion.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// How likely the next tokens of the prompt are, from its second one on.
    Scores(Vec<Score>),
    /// The next token. One that ends the text is not told.
    Token(Drawn),
    /// That was all.
    Finished(Finish),
    /// There will be no more.
    Failed(Fault),
}

/// What a turn brought.
#[derive(Debug, Default)]
pub struct Told {
    /// In the order of each completion.
    pub events: Vec<(Key, Event)>,
    /// Tokens of prompts that were read.
    pub read: usize,
}

/// A completion that has no slot yet.
struct Waiting {
    key: Key,
    order: Order,
}

/// The sequences of one model.
pub struct Schedule<M: Machine> {
    waiting: VecDeque<Waiting>,
    running: Vec<Running<M::Slot>>,
    prefixes: Prefixes<M::Slot>,
    /// Whether prompts share what they begin with.
    share: bool,
    /// Events that need no turn.
    ready: Vec<(Key, Event)>,
}

impl<M: Machine> Schedule<M> {
    /// Nothing to do. With `share`, what one prompt has read another one that begins alike need not read again.
    pub fn new(share: bool) -> Schedule<M> {
        Schedule {
            waiting: VecDeque::new(),
            running: Vec::new(),
            prefixes: Prefixes::default(),
            share,
            ready: Vec::new(),
        }
    }

    /// Takes an order, which waits behind those that wait already.
    pub fn submit(&mut self, key: Key, order: Order) {
        let scored = !order.score_prompt || order.prompt.len() == 1;
        if order.max_tokens == 0 && scored {
            self.ready.push((key, Event::Finished(Finish::Length)));
        } else {
            self.waiting.push_back(Waiting { key, order });
        }
    }

    /// Forgets all completions of which `gone` says so; their slots are free at once.
    pub fn cancel(&mut self, machine: &mut M, gone: impl Fn(Key) -> bool) {
        self.waiting.retain(|waiting| !gone(waiting.key));
        self.ready.retain(|(key, _)| !gone(*key));
        for at in (0..self.running.len()).rev() {
            if gone(self.running[at].key) {
                machine.close(self.running.remove(at).slot);
            }
        }
    }

    /// Gives up all states that are kept for later prompts.
    pub fn forget_prefixes(&mut self, machine: &mut M) {
        self.prefixes.drain().for_each(|slot| machine.close(slot));
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.ready.is_empty()
    }

    /// Completions without a slot.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Completions in a slot.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Slots that hold what later prompts may begin with; they are free for whoever needs one.
    pub fn kept(&self) -> usize {
        self.prefixes.count()
    }

    /// Goes one turn further.
    pub fn turn(&mut self, machine: &mut M) -> Told {
        let mut told = Told {
            events: std::mem::take(&mut self.ready),
            read: 0,
        };
        self.admit(machine);
        let ends = self.plan();
        let turns: Vec<_> = (self.running.iter().zip(&ends))
            .filter_map(|(running, &end)| running.turn(end?))
            .collect();
        if turns.is_empty() {
            return told;
        }
        match machine.advance(&turns) {
            Ok(outputs) => self.take(machine, &ends, outputs, &mut told),
            Err(error) => self.fail(machine, &ends, &error.to_string(), &mut told),
        }
        told
    }

    /// Gives slots to those that wait longest. Whoever will find its beginning read by another one waits for that.
    fn admit(&mut self, machine: &mut M) {
        let mut at = 0;
        while at < self.waiting.len().min(LOOK) && machine.free() + self.prefixes.count() > 0 {
            if self.waits_for_prefix(at) {
                at += 1;
                continue;
            }
            let order = &self.waiting[at].order;
            let Some((slot, read)) = place(&mut self.prefixes, machine, order) else {
                return;
            };
            let Some(Waiting { key, order }) = self.waiting.remove(at) else {
                return machine.close(slot);
            };
            self.running.push(Running::new(key, order, slot, read));
        }
    }

    /// Whether some sequence is about to read what this one begins with; it then leaves the state there.
    fn waits_for_prefix(&mut self, at: usize) -> bool {
        let order = &self.waiting[at].order;
        if order.score_prompt || !self.share {
            return false;
        }
        let kept = self.prefixes.covers(&order.prompt);
        let shared =
            |running: &Running<M::Slot>| match Arc::ptr_eq(&running.order.prompt, &order.prompt) {
                true => order.prompt.len() - 1,
                false => common(&running.order.prompt, &order.prompt).min(order.prompt.len() - 1),
            };
        let best = self
            .running
            .iter_mut()
            .map(|running| (shared(running), running));
        let best = best
            .filter(|(shared, running)| *shared >= SHORTEST && *shared > running.read.max(kept))
            .max_by_key(|(shared, _)| *shared);
        match best {
            Some((shared, running)) => {
                running.marks.insert(shared);
                true
            }
            None => false,
        }
    }

    /// How far each sequence gets in the next turn: the tokens of its prompt that are read then; none if it has to wait.
    fn plan(&self) -> Vec<Option<usize>> {
        let draws = self.running.iter().any(|running| !running.reads());
        let mut room = if draws { PROMPT_BESIDE } else { PROMPT_ALONE };
        let mut end = |running: &Running<M::Slot>| {
            if !running.reads() {
                return Some(running.read);
            }
            let end = running.stop().min(running.read + room);
            room -= end - running.read;
            (end > running.read).then_some(end)
        };
        self.running.iter().map(&mut end).collect()
    }

    /// Notes what the machine said of a turn that went up to `ends`.
    fn take(
        &mut self,
        machine: &mut M,
        ends: &[Option<usize>],
        outputs: Vec<Output>,
        told: &mut Told,
    ) {
        let mut outputs = outputs.into_iter();
        let outputs: Vec<Option<Output>> =
            (ends.iter().map(|end| end.and_then(|_| outputs.next()))).collect();
        for (running, end) in self.running.iter_mut().zip(ends) {
            let end = end.unwrap_or(running.read);
            told.read += end - running.read;
            running.read = end;
        }
        let keys: Vec<Key> = self.running.iter().map(|running| running.key).collect();
        // Drawing from a large vocabulary takes long enough for several threads.
        let events: Vec<Vec<Event>> = (self.running.par_iter_mut(), outputs)
            .into_par_iter()
            .with_min_len(DRAWS_PER_THREAD)
            .map(|(running, output)| output.map_or_else(Vec::new, |output| running.take(output)))
            .collect();
        self.leave_prefixes(machine);
        // From the last one on, so that those before it stay where they are.
        for (at, events) in events.iter().enumerate().rev() {
            match events.last() {
                Some(Event::Finished(_)) if self.share => {
                    let running = self.running.remove(at);
                    keep(&mut self.prefixes, machine, running.seen(), running.slot);
                }
                Some(Event::Finished(_) | Event::Failed(_)) => {
                    machine.close(self.running.remove(at).slot);
                }
                _ => {}
            }
        }
        let keyed = keys.into_iter().zip(events);
        let each =
            keyed.flat_map(|(key, events)| events.into_iter().map(move |event| (key, event)));
        told.events.extend(each);
    }

    /// Copies the states that others wait for.
    fn leave_prefixes(&mut self, machine: &mut M) {
        for running in &mut self.running {
            if !running.marks.remove(&running.read) {
                continue;
            }
            if machine.free() == 0 {
                // Who was to find it reads for itself if there is no room.
                let Some((slot, _)) = self.prefixes.oldest() else {
                    continue;
                };
                machine.close(slot);
            }
            if let Some(copy) = machine.fork(&running.slot) {
                let tokens = running.order.prompt[..running.read].to_vec();
                keep(&mut self.prefixes, machine, tokens, copy);
            }
        }
    }

    /// Ends all sequences of a turn that went wrong.
    fn fail(&mut self, machine: &mut M, ends: &[Option<usize>], problem: &str, told: &mut Told) {
        for at in (0..ends.len()).rev().filter(|&at| ends[at].is_some()) {
            let running = self.running.remove(at);
            machine.close(running.slot);
            let fault = Fault::internal(problem);
            told.events.push((running.key, Event::Failed(fault)));
        }
    }
}

/// A slot for an order, and how much of its prompt is read in it.
fn place<M: Machine>(
    prefixes: &mut Prefixes<M::Slot>,
    machine: &mut M,
    order: &Order,
) -> Option<(M::Slot, usize)> {
    // Only what is read is scored.
    let begun = !order.score_prompt && prefixes.longest(&order.prompt).is_some();
    if machine.free() == 0 {
        let (slot, tokens) = prefixes.oldest()?;
        // The last one is the one to begin with: nobody else needs it more.
        if begun && prefixes.covers(&order.prompt) == 0 {
            return Some((slot, tokens.len()));
        }
        machine.close(slot);
    }
    if begun {
        let (from, read) = prefixes.longest(&order.prompt)?;
        return Some((machine.fork(from)?, read));
    }
    Some((machine.open()?, 0))
}

fn keep<M: Machine>(
    prefixes: &mut Prefixes<M::Slot>,
    machine: &mut M,
    tokens: Vec<u32>,
    slot: M::Slot,
) {
    if let Some(slot) = prefixes.keep(tokens, slot) {
        machine.close(slot);
    }
}

#[cfg(test)]
mod tests;
