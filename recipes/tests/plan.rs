//! Exactly once, to the token, in an order that a reader can serve.

use std::collections::HashSet;

use proptest::prelude::*;
use supra_recipes::schema::{CheckpointInterval, Eval, Tokens};
use supra_recipes::{Digest, Plan, PlanError, Recipe};

fn recipe(budget: u64, batch_samples: u64, length: u32, repeat: bool) -> Recipe {
    let text = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n";
    let mut recipe = Recipe::parse(text, "t.yaml").unwrap();
    recipe.budget.tokens = Some(Tokens(budget));
    recipe.batch.sequence_length = length;
    recipe.batch.tokens = Tokens(batch_samples * u64::from(length));
    recipe.data.repeat = repeat;
    recipe
}

fn plan(budget: u64, batch_samples: u64, length: u32, windows: u64) -> Plan {
    Plan::new(
        &recipe(budget, batch_samples, length, true),
        windows,
        [3; 32],
    )
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_sample_is_trained_once_whatever_the_world_sizes(
        budget in 1u64..40_000, batch in 1u64..40, length in 1u32..9, worlds in prop::collection::vec(1u32..12, 1..20),
    ) {
        prop_assume!(budget >= u64::from(length));
        let plan = plan(budget, batch, length, 777);
        let mut next = 0;
        for step in 1..=plan.steps {
            let world = worlds[step as usize % worlds.len()];
            let samples = plan.step_samples(step);
            prop_assert_eq!(samples.start, next);
            let shares: Vec<_> = (0..world).map(|rank| plan.rank_samples(step, rank, world)).collect();
            for share in &shares {
                prop_assert_eq!(share.start, next);
                next = share.end;
            }
            prop_assert_eq!(samples.end, next);
            let sizes = shares.iter().map(|share| share.end - share.start);
            prop_assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            prop_assert!(shares.is_sorted_by_key(|share| std::cmp::Reverse(share.end - share.start)));
        }
        prop_assert_eq!(next, plan.samples);
        prop_assert_eq!(next, budget / u64::from(length));
    }

    #[test]
    fn only_the_last_step_is_smaller(budget in 1u64..1_000_000, batch in 1u64..400) {
        let plan = plan(budget, batch, 1, 50);
        for step in 1..plan.steps {
            prop_assert_eq!(plan.step_samples(step).count() as u64, batch);
        }
        prop_assert!((1..=batch).contains(&(plan.step_samples(plan.steps).count() as u64)));
        prop_assert_eq!(plan.tokens_after(plan.steps), budget);
        for outside in [0, plan.steps + 1, u64::MAX] {
            prop_assert!(plan.step_samples(outside).is_empty());
        }
    }

    #[test]
    fn a_pass_shows_every_window_once_and_each_pass_in_its_own_order(windows in 1u64..9_000, pass in 0u64..3) {
        let plan = plan(100_000, 8, 1, windows);
        let order = |pass: u64| -> Vec<u64> { (pass * windows..(pass + 1) * windows).map(|i| plan.window(i)).collect() };
        let this = order(pass);
        let mut sorted = this.clone();
        sorted.sort_unstable();
        prop_assert!(sorted.into_iter().eq(0..windows));
        prop_assert!(windows < 20 || this != order(pass + 1));
    }

    #[test]
    fn a_pool_touches_only_its_blocks_and_each_once_per_pass(windows in 1u64..9_000, pass in 0u64..3) {
        let plan = plan(100_000, 8, 1, windows);
        let (mut sample, mut seen, mut last) = (pass * windows, HashSet::new(), None);
        while sample < (pass + 1) * windows {
            let pool = plan.pool_of(sample);
            prop_assert_eq!(pool.samples.start, sample);
            prop_assert!(last.is_none_or(|number| number + 1 == pool.number));
            let mut covered: Vec<u64> = pool.blocks.iter().cloned().flatten().collect();
            prop_assert!(covered.iter().all(|window| seen.insert(*window)));
            let mut drawn: Vec<u64> = pool.samples.clone().map(|i| plan.window(i)).collect();
            covered.sort_unstable();
            drawn.sort_unstable();
            prop_assert_eq!(covered, drawn);
            let middle = pool.samples.start + (pool.samples.end - pool.samples.start) / 2;
            prop_assert_eq!(&plan.pool_of(middle), &pool);
            prop_assert!(pool.blocks.len() <= 17);
            (sample, last) = (pool.samples.end, Some(pool.number));
        }
        prop_assert_eq!(seen.len() as u64, windows);
    }

    #[test]
    fn windows_stay_in_range_however_large_the_dataset(windows in 1u64..u64::MAX / 4, sample in any::<u64>()) {
        let plan = plan(100, 8, 1, windows);
        prop_assert!(plan.window(sample) < windows);
        prop_assert!(plan.pool_of(sample).blocks.iter().any(|block| block.contains(&plan.window(sample))));
    }

    #[test]
    fn the_learning_rate_rises_to_lr_falls_to_final_lr_and_never_jumps(
        budget in 2_000u64..100_000, batch in 1u64..50, warmup in 0u64..40,
    ) {
        prop_assume!(warmup * batch <= budget);
        let mut recipe = recipe(budget, batch, 1, true);
        recipe.optimizer.warmup = format!("{warmup} steps").parse().unwrap();
        let plan = Plan::new(&recipe, 100, [0; 32]).unwrap();
        let (lr, final_lr) = (recipe.optimizer.lr, recipe.optimizer.final_lr);
        for step in 1..=warmup.min(plan.steps) {
            prop_assert!((plan.learning_rate(step) - lr * step as f64 / warmup as f64).abs() < 1e-12 * lr);
        }
        if warmup > 0 {
            prop_assert_eq!(plan.learning_rate(warmup), lr);
        }
        if plan.steps > warmup {
            prop_assert_eq!(plan.learning_rate(plan.steps), final_lr);
        }
        let steepest = (lr / warmup.max(1) as f64).max(1.6 * lr / (plan.steps - warmup).max(1) as f64);
        for step in 1..plan.steps {
            let (this, next) = (plan.learning_rate(step), plan.learning_rate(step + 1));
            prop_assert!((next - this).abs() <= steepest * 1.001);
            let right = if step < warmup { next > this } else { next <= this * (1.0 + 1e-12) };
            prop_assert!(right);
        }
    }

    #[test]
    fn a_checkpoint_is_due_once_per_multiple_and_at_the_end(budget in 100u64..20_000, batch in 1u64..50, every in 1u64..5_000) {
        let mut recipe = recipe(budget, batch, 1, true);
        recipe.checkpoint.every_tokens = Tokens(every).into();
        let plan = Plan::new(&recipe, 100, [0; 32]).unwrap();
        for step in 1..=plan.steps {
            let (before, after) = (plan.tokens_after(step - 1), plan.tokens_after(step));
            let crossed = (before + 1..=after).any(|tokens| tokens.is_multiple_of(every));
            prop_assert_eq!(plan.checkpoint_due(step), crossed || step == plan.steps);
        }
        prop_assert!(!plan.checkpoint_due(0));
    }

    #[test]
    fn with_auto_only_the_last_step_has_a_checkpoint_that_nobody_asked_for(budget in 100u64..20_000, batch in 1u64..50) {
        let mut recipe = recipe(budget, batch, 1, true);
        recipe.checkpoint.every_tokens = CheckpointInterval::Auto;
        let plan = Plan::new(&recipe, 100, [0; 32]).unwrap();
        let due = (0..=plan.steps).filter(|step| plan.checkpoint_due(*step));
        prop_assert_eq!(due.collect::<Vec<_>>(), [plan.steps]);
    }

    #[test]
    fn digests_add_like_numbers_modulo_two_to_the_256(a: [u8; 32], b: [u8; 32], c: [u8; 32]) {
        let [a, b, c] = [a, b, c].map(Digest::from_bytes);
        prop_assert_eq!(a + b, b + a);
        prop_assert_eq!((a + b) + c, a + (b + c));
        prop_assert_eq!(a + Digest::ZERO, a);
        prop_assert_eq!([a, b, c].into_iter().sum::<Digest>(), c + a + b);
    }
}

#[test]
fn a_digest_wraps_and_carries() {
    let mut one = [0; 32];
    one[0] = 1;
    let most = Digest::from_bytes([0xff; 32]);
    assert_eq!(most + Digest::from_bytes(one), Digest::ZERO);
    let mut carried = [0; 32];
    carried[1] = 1;
    let mut low = [0; 32];
    low[0] = 0xff;
    assert_eq!(
        Digest::from_bytes(low) + Digest::from_bytes(one),
        Digest::from_bytes(carried)
    );
}

#[test]
fn a_digest_shows_a_sample_fed_twice_and_a_changed_token() {
    let sample = |id| Digest::of_sample(id, &[1, 2, 3]);
    assert_ne!(sample(1) + sample(1), sample(2) + sample(2));
    assert_ne!(sample(1), Digest::of_sample(1, &[1, 2, 4]));
    let bytes: Vec<u8> = 9u64
        .to_le_bytes()
        .into_iter()
        .chain([5u32, 6].iter().flat_map(|t| t.to_le_bytes()))
        .collect();
    assert_eq!(
        Digest::of_sample(9, &[5, 6]).as_bytes(),
        blake3::hash(&bytes).as_bytes()
    );
}

#[test]
fn the_order_depends_on_dataset_seed_and_length_only() {
    let first = |recipe: &Recipe, hash: [u8; 32]| -> Vec<u64> {
        let plan = Plan::new(recipe, 5_000, hash).unwrap();
        (0..50).map(|sample| plan.window(sample)).collect()
    };
    let mut base = recipe(4_000, 8, 4, false);
    let order = first(&base, [0; 32]);
    assert_ne!(order, first(&base, [1; 32]));
    base.batch.tokens = Tokens(64);
    base.seed = 99;
    assert_eq!(order, first(&base, [0; 32]));
    base.data.seed = 99;
    assert_ne!(order, first(&base, [0; 32]));
    assert_ne!(order, first(&recipe(4_000, 8, 8, false), [0; 32]));
}

#[test]
fn neighbours_in_the_order_come_from_all_over_the_pool() {
    let plan = plan(100_000, 8, 1, 64 * 16 * 8);
    let samples = 0..4_096;
    let same_block = samples
        .clone()
        .filter(|i| plan.window(*i) / 64 == plan.window(i + 1) / 64)
        .count();
    // One in sixteen by chance.
    assert!((160..=352).contains(&same_block), "{same_block}");
    let ascending = samples
        .filter(|i| plan.window(i + 1) > plan.window(*i))
        .count();
    assert!((1_848..=2_248).contains(&ascending), "{ascending}");
}

#[test]
fn a_dataset_smaller_than_the_budget_is_an_error_unless_repeated() {
    let short = Plan::new(&recipe(1_000, 8, 1, false), 999, [0; 32]).unwrap_err();
    assert_eq!(
        short,
        PlanError::Short {
            samples: 1_000,
            windows: 999,
            sequence_length: 1
        }
    );
    assert!(short.to_string().contains("data.repeat: true"));
    assert!(Plan::new(&recipe(1_000, 8, 1, false), 1_000, [0; 32]).is_ok());
    assert!(Plan::new(&recipe(1_000, 8, 1, true), 1, [0; 32]).is_ok());
    assert_eq!(
        Plan::new(&recipe(1_000, 8, 1, true), 0, [0; 32]).unwrap_err(),
        PlanError::Empty { sequence_length: 1 }
    );
}

#[test]
fn replicas_compare_every_so_many_steps_and_at_the_end() {
    let mut recipe = recipe(1_000, 10, 1, true);
    recipe.replica_check.every_steps = 30;
    let plan = Plan::new(&recipe, 10, [0; 32]).unwrap();
    let due: Vec<u64> = (0..=plan.steps)
        .filter(|step| plan.replica_check_due(*step))
        .collect();
    assert_eq!(due, [30, 60, 90, 100]);
}

#[test]
fn evaluations_come_before_the_first_step_at_multiples_and_after_the_last() {
    let due = |every: Option<u64>| -> Vec<u64> {
        // 26 samples: steps of 8, 16, 24 and 26 tokens.
        let mut recipe = recipe(26, 8, 1, true);
        recipe.eval = every.map(|every| Eval {
            every_tokens: Tokens(every),
            ..Eval::default()
        });
        let plan = Plan::new(&recipe, 100, [0; 32]).unwrap();
        let steps = 0..=plan.steps + 3;
        steps.filter(|step| plan.evaluation_due(*step)).collect()
    };
    assert!(due(None).is_empty());
    assert_eq!(due(Some(16)), [0, 2, 4]);
    assert_eq!(due(Some(17)), [0, 3, 4]);
    assert_eq!(due(Some(1)), [0, 1, 2, 3, 4]);
    assert_eq!(due(Some(u64::MAX)), [0, 4]);
}
