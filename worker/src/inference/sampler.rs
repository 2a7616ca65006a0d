//! Choosing the next token from logits.

use std::collections::BTreeSet;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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

/// A token and its logit, or the weight of its draw.
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
        let mut candidates: Vec<Candidate> = (0..)
            .zip(logits)
            .map(|(token, &logit)| (token, f64::from(logit)))
            .collect();
        let penalty = self.sampling.repetition_penalty;
        for &token in &self.seen {
            if let Some((_, logit)) = candidates.get_mut(token as usize) {
                *logit = match *logit > 0.0 {
                    true => *logit / penalty,
                    false => *logit * penalty,
                };
            }
        }
        candidates.retain(|(_, logit)| logit.is_finite());
        let best = *candidates.iter().min_by(likelier)?;
        let token = match self.sampling.temperature > 0.0 {
            true => self.draw(candidates, best.1),
            false => best.0,
        };
        self.read(&[token]);
        let logprob = f64::from(logits[token as usize]) - normalizer(logits);
        Some(Choice { token, logprob })
    }

    fn draw(&mut self, mut candidates: Vec<Candidate>, best: f64) -> u32 {
        let Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            ..
        } = self.sampling;
        if top_k > 0 {
            keep_likeliest(&mut candidates, |count, _| count < top_k);
        }
        for (_, logit) in &mut candidates {
            *logit = ((*logit - best) / temperature).exp();
        }
        if top_p < 1.0 {
            let enough = top_p * total(&candidates);
            let mut sum = 0.0;
            keep_likeliest(&mut candidates, |_, weight| {
                sum += weight;
                sum < enough
            });
        }
        if min_p > 0.0 {
            // The likeliest token weighs 1.
            candidates.retain(|&(_, weight)| weight >= min_p.min(1.0));
        }
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

    fn read(&mut self, tokens: &[u32]) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }
}

/// The likeliest tokens, at most `n`, with the natural logarithms of their probabilities; the likeliest first.
pub fn likeliest(logits: &[f32], n: usize) -> Vec<(u32, f64)> {
    let normalizer = normalizer(logits);
    let mut candidates: Vec<Candidate> = (0..)
        .zip(logits)
        .filter(|(_, logit)| logit.is_finite())
        .map(|(token, &logit)| (token, f64::from(logit) - normalizer))
        .collect();
    if n == 0 {
        candidates.clear();
    } else {
        keep_likeliest(&mut candidates, |count, _| count < n);
    }
    candidates
}

/// Ties go to the smaller token, so that the order is the same everywhere.
fn likelier(a: &&Candidate, b: &&Candidate) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Keeps the likeliest candidates, in order, up to the first after which `more` says no. `more` hears how many there are and
/// what the last of them weighs. Only as many are sorted as are looked at, more or less.
fn keep_likeliest(candidates: &mut Vec<Candidate>, mut more: impl FnMut(usize, f64) -> bool) {
    let (mut sorted, mut block) = (0, 64);
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        if block < rest.len() {
            rest.select_nth_unstable_by(block, |a, b| likelier(&a, &b));
        }
        let end = block.min(rest.len());
        rest[..end].sort_unstable_by(|a, b| likelier(&a, &b));
        for at in sorted..sorted + end {
            if !more(at + 1, candidates[at].1) {
                candidates.truncate(at + 1);
                return;
            }
        }
        sorted += end;
        block *= 4;
    }
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|(_, weight)| weight).sum()
}

/// Logarithm of the sum of the exponentials of the finite logits.
fn normalizer(logits: &[f32]) -> f64 {
    let finite = || logits.iter().copied().filter(|logit| logit.is_finite());
    let largest = finite().fold(f32::MIN, f32::max);
    let sum: f64 = finite()
        .map(|logit| f64::from((logit - largest).exp()))
        .sum();
    f64::from(largest) + sum.ln()
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
        all.sort_by(|a, b| likelier(&a, &b));
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
                    let inside = before < sampling.top_p * sum * (1.0 + 1e-12);
                    before += p;
                    inside
                });
                kept.retain(|(_, p)| *p >= sampling.min_p * all[0].1 * (1.0 - 1e-12));
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
