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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, f32::NAN];

    fn draws(sampling: Sampling, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling, &[]);
        (0..count)
            .map(|_| sampler.pick(logits).unwrap().token)
            .collect()
    }

    /// Probabilities at a temperature, the likeliest first, by sorting everything.
    fn distribution(logits: &[f32], temperature: f64) -> Vec<Candidate> {
        let weight = |logit: f32| (f64::from(logit) / temperature).exp();
        let finite = (0..).zip(logits).filter(|(_, logit)| logit.is_finite());
        let mut all: Vec<Candidate> = finite
            .map(|(token, &logit)| (token, weight(logit)))
            .collect();
        let sum = total(&all);
        all.iter_mut().for_each(|(_, weight)| *weight /= sum);
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all
    }

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        let logit = prop_oneof![8 => -8f32..8.0, 1 => Just(f32::NAN), 1 => Just(2.5f32)];
        prop::collection::vec(logit, 2..400)
            .prop_filter("some number", |logits| logits.iter().any(|l| l.is_finite()))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn filters_keep_what_their_definitions_say(
            logits in logits(), temperature in 0.2..3.0, top_k in 0usize..80, top_p in 0.05..1.0, min_p in 0.0..0.5, seed: u64,
        ) {
            let sampling = Sampling { temperature, seed, ..Sampling::default() };
            let all = distribution(&logits, temperature);
            let allowed = |sampling: Sampling| {
                let mut kept = all.clone();
                if sampling.top_k > 0 {
                    kept.truncate(sampling.top_k);
                }
                let sum = total(&kept);
                let mut before = 0.0;
                // A hair more, for sums are rounded.
                kept.retain(|(_, p)| {
                    let inside = before < sampling.top_p * sum * (1.0 + 1e-5);
                    before += p;
                    inside
                });
                kept.retain(|(_, p)| *p >= sampling.min_p * all[0].1 * (1.0 - 1e-5));
                kept.into_iter().map(|(token, _)| token).collect::<Vec<_>>()
            };
            for sampling in [
                Sampling { top_k, ..sampling },
                Sampling { top_p, ..sampling },
                Sampling { min_p, ..sampling },
                Sampling { top_k, top_p, min_p, ..sampling },
            ] {
                let allowed = allowed(sampling);
                let tokens = draws(sampling, &logits, 200);
                prop_assert!(tokens.iter().all(|token| allowed.contains(token)), "{tokens:?} of {allowed:?}");
                prop_assert_eq!(&tokens, &draws(sampling, &logits, 200));
            }
        }

        #[test]
        fn the_likeliest_come_first_with_their_probabilities(logits in logits(), n in 0usize..100) {
            let all = distribution(&logits, 1.0);
            let found = likeliest(&logits, n);
            prop_assert_eq!(found.len(), n.min(all.len()));
            for ((token, logprob), (expected, p)) in found.iter().zip(&all) {
                prop_assert_eq!(token, expected);
                prop_assert!((logprob - p.ln()).abs() < 1e-5);
            }
            let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
            let choice = Sampler::new(greedy, &[]).pick(&logits).unwrap();
            prop_assert_eq!(choice.token, all[0].0);
            prop_assert!((choice.logprob - all[0].1.ln()).abs() < 1e-5);
        }
    }

    #[test]
    fn weights_are_exponentials() {
        for x in (0..87_000).map(|x| x as f32 * -1e-3) {
            let exact = f64::from(x).exp();
            let [.., weight] = weights(
                &[f32::NAN, -1.0, f32::INFINITY, 0.0, -1.0, -1.0, -1.0, x],
                0.0,
                1.0,
            );
            let error = (f64::from(weight) - exact).abs() / exact;
            assert!(error < 2e-7, "{x}: {error:e}");
        }
        let strange = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e30];
        assert_eq!(weights(&strange, 3.0, 2.0), [0.0; LANES]);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling {
            seed: 7,
            ..Sampling::default()
        };
        let tokens = draws(sampling, &LOGITS, 20_000);
        let share = |token| tokens.iter().filter(|&&t| t == token).count() as f64 / 20_000.0;
        let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
        for (token, logit) in [(0, 1.0), (1, 3.0), (2, 2.0f64)] {
            let expected = logit.exp() / total;
            assert!((share(token) - expected).abs() < 0.02, "token {token}");
        }
        let others = draws(
            Sampling {
                seed: 8,
                ..sampling
            },
            &LOGITS,
            100,
        );
        assert_ne!(tokens[..100], others);
    }

    #[test]
    fn a_filter_keeps_all_that_it_should() {
        // 60, 30, 9 and 1 per cent.
        let logits = [0.09f32, 0.6, 0.01, 0.3].map(f32::ln);
        let kept = |sampling| {
            let mut tokens = draws(sampling, &logits, 3000);
            tokens.sort_unstable();
            tokens.dedup();
            tokens
        };
        let all = Sampling::default();
        assert_eq!(kept(all), [0, 1, 2, 3]);
        assert_eq!(kept(Sampling { top_k: 3, ..all }), [0, 1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.7, ..all }), [1, 3]);
        assert_eq!(kept(Sampling { min_p: 0.1, ..all }), [0, 1, 3]);
        let cold = Sampling {
            temperature: 1e-300,
            ..all
        };
        assert_eq!(kept(cold), [1]);
    }

    #[test]
    fn repetition_costs_what_it_costs_elsewhere() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            temperature: 0.0,
            ..Sampling::default()
        };
        // Token 1 halves to 1.5 when drawn, token 2 to 1 thereafter; the prompt's token 3 doubles to -4.
        let mut sampler = Sampler::new(sampling, &[3]);
        let tokens: Vec<u32> = (0..4)
            .map(|_| sampler.pick(&[-3.0, 3.0, 2.0, -2.0]).unwrap().token)
            .collect();
        assert_eq!(tokens, [1, 2, 1, 1]);
        assert_eq!(
            sampler
                .pick(&[-3.0, f32::NAN, f32::NAN, -2.0])
                .unwrap()
                .token,
            0
        );
    }

    #[test]
    fn what_is_no_number_is_never_drawn() {
        for temperature in [0.0, 1.0] {
            let sampling = Sampling {
                temperature,
                ..Sampling::default()
            };
            let mut sampler = Sampler::new(sampling, &[]);
            assert_eq!(sampler.pick(&[f32::NAN, f32::INFINITY]), None);
            assert_eq!(sampler.pick(&[]), None);
            let only = sampler.pick(&[f32::NAN, -7.0, f32::NEG_INFINITY]).unwrap();
            assert_eq!((only.token, only.logprob), (1, 0.0));
        }
    }
}
