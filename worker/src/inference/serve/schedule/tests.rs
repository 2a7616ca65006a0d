//! A machine that remembers what each slot has read, and whose next token is a function of that: whatever the schedule does, every
//! completion has to be what it is alone.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const VOCABULARY: u32 = 12;
/// Ends texts.
const STOP: u32 = 3;

#[derive(Default)]
struct Memory {
    slots: usize,
    open: BTreeMap<usize, Vec<u32>>,
    next: usize,
    /// Tokens of the largest turn that were more than one token of a sequence.
    most_read: usize,
    forks: usize,
    /// Fail at this turn.
    breaks_at: Option<usize>,
    turns: usize,
    read: usize,
}

impl Memory {
    fn of(slots: usize) -> Memory {
        Memory {
            slots,
            ..Memory::default()
        }
    }
}

/// The likeliest token after a text.
fn next(tokens: &[u32]) -> u32 {
    let mix = |sum: u32, &token: &u32| sum.wrapping_mul(31).wrapping_add(token + 7);
    tokens.iter().fold(1, mix) % VOCABULARY
}

fn score(tokens: &[u32], token: u32) -> Score {
    Score {
        logprob: -f64::from(tokens.len() as u32 * 100 + token),
        greedy: next(tokens) == token,
        top: Vec::new(),
    }
}

impl Machine for Memory {
    type Slot = usize;
    type Error = String;

    fn free(&self) -> usize {
        self.slots - self.open.len()
    }

    fn open(&mut self) -> Option<usize> {
        (self.free() > 0).then(|| {
            self.next += 1;
            self.open.insert(self.next, Vec::new());
            self.next
        })
    }

    fn fork(&mut self, from: &usize) -> Option<usize> {
        let tokens = self.open[from].clone();
        let slot = self.open()?;
        self.open.insert(slot, tokens);
        self.forks += 1;
        Some(slot)
    }

    fn close(&mut self, slot: usize) {
        assert!(self.open.remove(&slot).is_some(), "closed twice");
    }

    fn advance(&mut self, turns: &[Turn<'_, usize>]) -> Result<Vec<Output>, String> {
        self.turns += 1;
        let slots: BTreeSet<usize> = turns.iter().map(|turn| *turn.slot).collect();
        assert_eq!(slots.len(), turns.len(), "a slot at most once");
        let long = turns.iter().map(|turn| turn.tokens.len() - 1).sum();
        self.most_read = self.most_read.max(long);
        self.read += turns.iter().map(|turn| turn.tokens.len()).sum::<usize>();
        if self.breaks_at == Some(self.turns) {
            return Err("broken".to_owned());
        }
        let answer = |turn: &Turn<'_, usize>| {
            let tokens = self.open.get_mut(turn.slot).unwrap();
            assert!(!turn.tokens.is_empty());
            let mut scores = Vec::new();
            for (at, &token) in turn.tokens.iter().enumerate() {
                tokens.push(token);
                if let Want::Scores { next, .. } = turn.want {
                    let first = turn.tokens.len() - next.len();
                    scores.extend((at >= first).then(|| score(tokens, next[at - first])));
                }
            }
            match turn.want {
                Want::Nothing => Output::Nothing,
                Want::Greedy => Output::Greedy(next(tokens)),
                Want::Logits => {
                    let mut logits = vec![0.0; VOCABULARY as usize];
                    logits[next(tokens) as usize] = 50.0;
                    Output::Logits(logits)
                }
                Want::Scores { .. } => Output::Scores(scores),
            }
        };
        Ok(turns.iter().map(answer).collect())
    }
}

fn order(prompt: &[u32], max_tokens: usize) -> Order {
    Order {
        prompt: prompt.into(),
        score_prompt: false,
        max_tokens,
        stop_tokens: [STOP].into(),
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        top: None,
    }
}

/// What a completion is, token by token.
fn alone(order: &Order) -> (Vec<f64>, Vec<u32>, Finish) {
    let mut text = order.prompt.to_vec();
    let scores = (1..text.len()).map(|at| score(&text[..at], text[at]).logprob);
    let scores = if order.score_prompt {
        scores.collect()
    } else {
        Vec::new()
    };
    let mut tokens = Vec::new();
    while tokens.len() < order.max_tokens {
        let token = next(&text);
        if token == STOP {
            return (scores, tokens, Finish::Stop);
        }
        tokens.push(token);
        text.push(token);
    }
    (scores, tokens, Finish::Length)
}

#[derive(Default)]
struct Heard {
    scores: Vec<f64>,
    tokens: Vec<u32>,
    ended: Option<Finish>,
    failed: bool,
}

#[derive(Default)]
struct Ears(BTreeMap<Key, Heard>);

impl Ears {
    fn hear(&mut self, told: Told) {
        for (key, event) in told.events {
            let heard = self.0.entry(key).or_default();
            assert!(heard.ended.is_none() && !heard.failed, "after the end");
            match event {
                Event::Scores(scores) => {
                    heard
                        .scores
                        .extend(scores.iter().map(|score| score.logprob));
                }
                Event::Token(drawn) => heard.tokens.push(drawn.token),
                Event::Finished(finish) => heard.ended = Some(finish),
                Event::Failed(_) => heard.failed = true,
            }
        }
    }
}

fn orders() -> impl Strategy<Value = Vec<(Order, bool)>> {
    // Few tokens and a shared beginning: many prompts begin alike.
    let shared = prop::collection::vec(0..2u32, 40).prop_map(|mut tokens| {
        tokens.extend(0..20);
        tokens
    });
    let one = (
        shared,
        1..60usize,
        prop::collection::vec(0..VOCABULARY, 0..4),
        0..12usize,
    );
    let one =
        (one, any::<[bool; 3]>()).prop_map(|((shared, take, tail, max), [score, top, cancel])| {
            let mut prompt: Vec<u32> = vec![1; 20];
            prompt.extend(shared.iter().map(|token| token % VOCABULARY));
            prompt.truncate(take);
            prompt.extend(tail);
            let mut order = order(&prompt, max);
            order.score_prompt = score;
            order.top = top.then_some(0);
            (order, cancel)
        });
    prop::collection::vec(one, 1..14)
}

proptest! {
    #[test]
    fn every_completion_is_what_it_is_alone_and_no_slot_leaks(
        orders in orders(),
        slots in 1..5usize,
        share: bool,
        arrivals in prop::collection::vec(0..3usize, 14),
        breaks_at in prop::option::of(1..30usize),
    ) {
        let mut machine = Memory { breaks_at, ..Memory::of(slots) };
        let mut schedule = Schedule::<Memory>::new(share);
        let mut ears = Ears::default();
        let mut cancelled = BTreeSet::new();
        let key = |at: usize| Key { request: at as u64, choice: 0 };
        for (at, (order, cancel)) in orders.iter().enumerate() {
            schedule.submit(key(at), order.clone());
            for _ in 0..arrivals[at] {
                ears.hear(schedule.turn(&mut machine));
            }
            // Somebody who came earlier leaves.
            if *cancel && at > 0 {
                cancelled.insert(key(at / 2));
                schedule.cancel(&mut machine, |key| cancelled.contains(&key));
            }
            prop_assert!(schedule.running() + schedule.kept() == machine.open.len());
        }
        let mut turns = 0;
        while !schedule.is_idle() {
            ears.hear(schedule.turn(&mut machine));
            turns += 1;
            prop_assert!(turns < 2_000, "nobody starves");
        }
        for (at, (order, _)) in orders.iter().enumerate() {
            let empty = Heard::default();
            let heard = ears.0.get(&key(at)).unwrap_or(&empty);
            let (scores, tokens, finish) = alone(order);
            if heard.failed {
                prop_assert!(breaks_at.is_some());
            } else if cancelled.contains(&key(at)) && heard.ended.is_none() {
                prop_assert!(tokens.starts_with(&heard.tokens));
            } else {
                prop_assert_eq!((&heard.scores, &heard.tokens, heard.ended), (&scores, &tokens, Some(finish)));
            }
        }
        prop_assert_eq!(schedule.kept(), machine.open.len());
        schedule.forget_prefixes(&mut machine);
        prop_assert_eq!(machine.free(), slots);
    }
}

/// Turns until nothing is to be done.
fn finish(schedule: &mut Schedule<Memory>, machine: &mut Memory) -> Ears {
    let mut ears = Ears::default();
    while !schedule.is_idle() {
        ears.hear(schedule.turn(machine));
    }
    ears
}

fn key(request: u64, choice: usize) -> Key {
    Key { request, choice }
}

#[test]
fn a_prompt_of_several_completions_is_read_once() {
    let (mut machine, mut schedule) = (Memory::of(8), Schedule::<Memory>::new(true));
    let order = order(&[5; 1000], 1);
    for choice in 0..4 {
        schedule.submit(key(1, choice), order.clone());
    }
    let ears = finish(&mut schedule, &mut machine);
    assert_eq!(ears.0.len(), 4);
    assert!(
        machine.read < 1000 + 10,
        "{} tokens were read",
        machine.read
    );
}

#[test]
fn a_text_that_goes_on_is_not_read_again() {
    let (mut machine, mut schedule) = (Memory::of(1), Schedule::<Memory>::new(true));
    let mut text = vec![5; 500];
    schedule.submit(key(1, 0), order(&text, 4));
    let ears = finish(&mut schedule, &mut machine);
    text.extend(&ears.0[&key(1, 0)].tokens);
    text.extend([1, 2]);
    let before = machine.read;
    schedule.submit(key(2, 0), order(&text, 1));
    finish(&mut schedule, &mut machine);
    assert!(
        machine.read - before < 10,
        "{} tokens were read",
        machine.read - before
    );
    assert_eq!(machine.forks, 0, "the only slot is taken over");
}

#[test]
fn a_long_prompt_does_not_stop_those_that_draw() {
    let (mut machine, mut schedule) = (Memory::of(2), Schedule::<Memory>::new(true));
    let mut talker = order(&[9], 40);
    talker.stop_tokens = [].into();
    schedule.submit(key(1, 0), talker);
    schedule.turn(&mut machine);
    schedule.submit(key(2, 0), order(&vec![4; PROMPT_BESIDE * 20], 1));
    let mut before = 1;
    for _ in 0..20 {
        let drawn = schedule.turn(&mut machine).events.len();
        assert!(drawn >= 1, "one token of the first in every turn");
        before += drawn;
    }
    assert!(before >= 21);
    assert!(machine.most_read <= PROMPT_BESIDE);
}
