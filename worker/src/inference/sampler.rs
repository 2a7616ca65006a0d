//! Choosing the next token from logits.

use std::{borrow::Cow, collections::BTreeSet};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use wide::f32x8;

/// How tokens are drawn. The filters apply in this order, as in Hugging Face's library; each keeps at least the likeliest token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits of tokens that were there before are divided by it where positive and multiplied where negative; 1 = off.
    pub repetition_penalty: f64,
    /// Logits are divided by it; 0 takes the likeliest token every time.
    pub temperature: f64,
    /// Only this many likeliest tokens may be drawn; 0 = all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability may be drawn; 1 = all.
    pub top_p: f64,
    /// Only tokens that have at least this share of the likeliest one's probability may be drawn; 0 = all.
    pub min_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    /// Draws from the model's own distribution.
    fn default() -> Sampling {
        Sampling {
            repetition_penalty: 1.0,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Whether it takes the likeliest token every time.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 && self.repetition_penalty == 1.0
    }
}

/// A token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its number.
    pub token: u32,
    /// Natural logarithm of the probability that the model gave it, whatever the sampling made of that.
    pub logprob: f64,
}

/// Draws the tokens of one text: the same ones for the same seed and logits.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens of the text so far, while repetition costs anything.
    seen: BTreeSet<u32>,
}

/// A token and the weight of its draw; the likeliest weighs 1.
type Candidate = (u32, f64);

impl Sampler {
    /// A sampler at the beginning of its seed, for a text that begins with the tokens of a prompt.
    pub fn new(sampling: Sampling, prompt_tokens: &[u32]) -> Sampler {
        let mut sampler = Sampler {
            sampling,
            random: ChaCha8Rng::seed_from_u64(sampling.seed),
            seen: BTreeSet::new(),
        };
        sampler.read(prompt_tokens);
        sampler
    }

    /// The next token, an index into `logits`, which counts as part of the text from now on. Logits that are not finite are never
    /// chosen; none if no other is left.
    pub fn pick(&mut self, logits: &[f32]) -> Option<Choice> {
        let wanted = self.penalized(logits);
        let best = greatest(&wanted)?;
        let token = match self.sampling.temperature > 0.0 {
            true => self.draw(&wanted, best),
            false => wanted.iter().position(|&logit| logit == best)? as u32,
        };
        self.read(&[token]);
        let logprob = f64::from(logits[token as usize]) - normalizer(logits)?;
        Some(Choice { token, logprob })
    }

    fn penalized<'a>(&self, logits: &'a [f32]) -> Cow<'a, [f32]> {
        let mut wanted = Cow::Borrowed(logits);
        let penalty = self.sampling.repetition_penalty as f32;
        for &token in &self.seen {
            if let Some(logit) = wanted.to_mut().get_mut(token as usize) {
                *logit = match *logit > 0.0 {
                    true => *logit / penalty,
                    false => *logit * penalty,
                };
            }
        }
        wanted
    }

    fn draw(&mut self, logits: &[f32], best: f32) -> u32 {
        let candidates = self.candidates(logits, best);
        let mut point = self.random.random::<f64>() * total(&candidates);
        for &(token, weight) in &candidates {
            if point < weight {
                return token;
            }
            point -= weight;
        }
        // Rounding can leave the point a hair behind the last weight.
        let last = candidates.iter().rev().find(|(_, weight)| *weight > 0.0);
        last.expect("invariant: the likeliest token weighs 1").0
    }

    /// The tokens that may be drawn.
    fn candidates(&self, logits: &[f32], best: f32) -> Vec<Candidate> {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        // Finite, so that the likeliest token weighs 1 however small the temperature.
        let sharpness = (1.0 / temperature).min(f32::MAX.into()) as f32;
        if top_k == 0 && top_p >= 1.0 && min_p <= 0.0 {
            let all = logits.chunks(LANES);
            let all = all.flat_map(|some| weights(some, best, sharpness));
            return (0..).zip(all.map(f64::from)).take(logits.len()).collect();
        }
        let weight = |token: u32| {
            let [weight, ..] = weights(&[logits[token as usize]], best, sharpness);
            (token, f64::from(weight))
        };
        let mut ranked = Ranked::new(logits).map(weight);
        let (head, sum) = match top_k {
            0 => (Vec::new(), exp_sum(logits, best, sharpness)),
            _ => {
                let head: Vec<Candidate> = ranked.by_ref().take(top_k).collect();
                let sum = total(&head);
                (head, sum)
            }
        };
        let tail = ranked.take(if top_k == 0 { usize::MAX } else { 0 });
        let (mut kept, mut before) = (Vec::new(), 0.0);
        for (token, weight) in head.into_iter().chain(tail) {
            if top_p < 1.0 && before >= top_p * sum || weight < min_p.min(1.0) {
                break;
            }
            before += weight;
            kept.push((token, weight));
        }
        kept
    }

    fn read(&mut self, tokens: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }
}

/// The likeliest tokens, at most `n`, with the natural logarithms of their probabilities; the likeliest first.
pub fn likeliest(logits: &[f32], n: usize) -> Vec<(u32, f64)> {
    let Some(normalizer) = normalizer(logits).filter(|_| n > 0) else {
        return Vec::new();
    };
    let logprob = |token| (token, f64::from(logits[token as usize]) - normalizer);
    Ranked::new(logits).take(n).map(logprob).collect()
}

/// Tokens with finite logits, the likeliest first; ties go to the smaller token, so that the order is the same everywhere. No more
/// of them are sorted than are looked at, more or less.
struct Ranked {
    /// Logit and token as numbers that sort like this.
    keys: Vec<u64>,
    next: usize,
    sorted: usize,
}

impl Ranked {
    fn new(logits: &[f32]) -> Ranked {
        let finite = (0..).zip(logits).filter(|(_, logit)| logit.is_finite());
        let key = |(token, logit): (u32, &f32)| {
            // The bits of floats sort like sizes: upwards where they are positive, else downwards.
            let bits = logit.to_bits();
            let upwards = match bits >> 31 {
                0 => bits | 1 << 31,
                _ => !bits,
            };
            u64::from(!upwards) << 32 | u64::from(token)
        };
        Ranked {
            keys: finite.map(key).collect(),
            next: 0,
            sorted: 0,
        }
    }

    fn sort_more(&mut self) {
        let rest = &mut self.keys[self.sorted..];
        let more = (self.sorted * 3).max(64);
        if more < rest.len() {
            rest.select_nth_unstable(more);
        }
        let more = more.min(rest.len());
        rest[..more].sort_unstable();
        self.sorted += more;
    }
}

impl Iterator for Ranked {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.next == self.sorted {
            self.sort_more();
        }
        let key = *self.keys.get(self.next)?;
        self.next += 1;
        Some(key as u32)
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|(_, weight)| weight).sum()
}

/// The greatest finite logit.
fn greatest(logits: &[f32]) -> Option<f32> {
    let finite = logits.iter().copied().filter(|logit| logit.is_finite());
    finite.reduce(f32::max)
}

/// Logarithm of the sum of the exponentials of the finite logits.
fn normalizer(logits: &[f32]) -> Option<f64> {
    let greatest = greatest(logits)?;
    Some(f64::from(greatest) + exp_sum(logits, greatest, 1.0).ln())
}

/// Sum of exp((logit - greatest) * sharpness) over the finite logits, of which none is greater.
fn exp_sum(logits: &[f32], greatest: f32, sharpness: f32) -> f64 {
    // None so long that fp32 loses anything.
    let block = |block: &[f32]| {
        let terms = block.chunks(LANES);
        let terms = terms.map(|some| f32x8::new(weights(some, greatest, sharpness)));
        f64::from(terms.sum::<f32x8>().reduce_add())
    };
    logits.chunks(256 * LANES).map(block).sum()
}

/// Numbers that the processor works on at once: every sampled token costs as many exponentials as the vocabulary has.
const LANES: usize = 8;

/// exp((logit - greatest) * sharpness) of up to [`LANES`] logits, of which none is greater; 0 where a logit is not finite or missing.
fn weights(logits: &[f32], greatest: f32, sharpness: f32) -> [f32; LANES] {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    lanes[..logits.len()].copy_from_slice(logits);
    let logits = f32x8::new(lanes);
    let weights = ((logits - f32x8::splat(greatest)) * f32x8::splat(sharpness)).exp();
    logits.is_finite().select(weights, f32x8::ZERO).to_array()
}

#[cfg(test)]
mod tests;
