//! Choosing the next token from logits.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the likeliest token every time.
    pub temperature: f64,
    /// Only this many likeliest tokens may be drawn; 0 = all.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability may be drawn; 1 = all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Draws tokens: the same ones for the same seed and logits.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the beginning of its seed.
    pub fn new(sampling: Sampling) -> Sampler {
        Sampler {
            sampling,
            random: ChaCha8Rng::seed_from_u64(sampling.seed),
        }
    }

    /// The next token, as an index into `logits`. Logits that are not numbers are never chosen; none if no other
    /// is left.
    pub fn pick(&mut self, logits: &[f32]) -> Option<u32> {
        let mut candidates: Vec<(u32, f64)> = (0..)
            .zip(logits)
            .filter(|(_, logit)| !logit.is_nan())
            .map(|(token, &logit)| (token, f64::from(logit)))
            .collect();
        // Ties go to the smaller token, so that the order is the same everywhere.
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let best = *candidates.first()?;
        if self.sampling.temperature <= 0.0 {
            return Some(best.0);
        }
        if self.sampling.top_k > 0 {
            candidates.truncate(self.sampling.top_k);
        }
        for (_, logit) in &mut candidates {
            *logit = ((*logit - best.1) / self.sampling.temperature).exp();
        }
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let kept = nucleus(&mut candidates, self.sampling.top_p * total);
        let mut point = self.random.random::<f64>() * kept;
        for &(token, weight) in &candidates {
            if point < weight {
                return Some(token);
            }
            point -= weight;
        }
        // Rounding can leave the point a hair behind the last weight.
        candidates.last().map(|(token, _)| *token)
    }
}

/// Drops what comes after the first candidates whose weights reach `enough`; returns the weight of those kept.
fn nucleus(candidates: &mut Vec<(u32, f64)>, enough: f64) -> f64 {
    let mut sum = 0.0;
    for at in 0..candidates.len() {
        sum += candidates[at].1;
        if sum >= enough {
            candidates.truncate(at + 1);
            break;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, f32::NAN];

    fn draws(sampling: Sampling, count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..count).map(|_| sampler.pick(&LOGITS).unwrap()).collect()
    }

    #[test]
    fn zero_temperature_and_top_1_are_greedy() {
        let sampling = Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 1,
        };
        assert_eq!(draws(sampling, 20), [1; 20]);
        assert_eq!(
            draws(
                Sampling {
                    temperature: 5.0,
                    top_k: 1,
                    ..sampling
                },
                20
            ),
            [1; 20]
        );
        assert_eq!(
            draws(
                Sampling {
                    temperature: 5.0,
                    top_p: 0.01,
                    ..sampling
                },
                20
            ),
            [1; 20]
        );
    }

    #[test]
    fn draws_follow_the_softmax_and_the_seed() {
        let sampling = Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: 7,
        };
        let tokens = draws(sampling, 20_000);
        assert_eq!(tokens, draws(sampling, 20_000));
        let share = |token| tokens.iter().filter(|&&t| t == token).count() as f64 / 20_000.0;
        let total = 1f64.exp() + 2f64.exp() + 3f64.exp();
        for (token, logit) in [(0, 1.0), (1, 3.0), (2, 2.0f64)] {
            assert!(
                (share(token) - logit.exp() / total).abs() < 0.02,
                "token {token}"
            );
        }
    }

    #[test]
    fn top_k_cuts_the_tail_and_nothing_but_nan_is_nothing() {
        let tokens = draws(
            Sampling {
                temperature: 9.0,
                top_k: 2,
                top_p: 1.0,
                seed: 3,
            },
            500,
        );
        assert!(tokens.iter().all(|token| [1, 2].contains(token)));
        let mut sampler = Sampler::new(Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: 3,
        });
        assert_eq!(sampler.pick(&[f32::NAN]), None);
    }
}
