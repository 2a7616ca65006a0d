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
