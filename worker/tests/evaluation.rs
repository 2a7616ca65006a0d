//! The held-out loss and the gates of a run, measured while it trains.

use supra_agent::{Evaluated, FaultKind, Outcome};
use supra_checkpoint::{Store, verify};
use supra_recipes::{
    Recipe,
    schema::{Attention, Eval, Precision, Sharding, Tokens},
};

use crate::{
    cli::worker,
    fixture::{Generation, Rank, World, fault},
};

/// Evaluated before the first of its four steps, after the second and after the last.
fn evaluating(world: &World) -> Recipe {
    let mut recipe = world.recipe("");
    recipe.data.heldout = Some(world.data().join("heldout.json"));
    recipe.eval = Some(Eval {
        every_tokens: Tokens(192),
        windows: 5,
        target_loss: None,
    });
    recipe
}

/// Without the time that they took.
fn results(rank: &Rank) -> Vec<Evaluated> {
    let timeless = |evaluated: &Evaluated| Evaluated {
        seconds: 0.0,
        ..*evaluated
    };
    rank.evaluated.iter().map(timeless).collect()
}

fn loss(evaluated: &Evaluated) -> f64 {
    evaluated.loss_sum / evaluated.targets as f64
}

fn final_hash(rank: &Rank) -> &[u8] {
    &rank.steps.last().unwrap().replica_hash
}

#[test]
fn a_run_that_is_evaluated_has_the_bits_of_one_that_is_not() {
    let world = World::new(120);
    for (sharding, precision) in [
        (Sharding::None, Precision::Fp32),
        (Sharding::Zero1, Precision::Bf16),
    ] {
        let mut recipe = evaluating(&world);
        recipe.optimizer.sharding = sharding;
        recipe.model.precision = precision;
        let name = |what: &str| world.checkpoints(&format!("{sharding:?}-{what}"));
        let evaluated = Generation::new(&recipe, &name("with")).run(2);
        recipe.eval = None;
        let plain = Generation::new(&recipe, &name("without")).run(2);
        for (with, without) in evaluated.iter().zip(&plain) {
            assert_eq!(with.outcome, Outcome::Finished);
            for (with, without) in with.steps.iter().zip(&without.steps) {
                assert_eq!(with.loss_sum, without.loss_sum, "step {}", with.step);
                assert_eq!(with.replica_hash, without.replica_hash);
            }
            assert!(without.evaluated.is_empty() && without.gates.is_empty());
        }
        let [first, second] = [&evaluated[0], &evaluated[1]];
        assert_eq!(results(first), results(second), "all ranks say the same");
        let steps: Vec<u64> = first.evaluated.iter().map(|it| it.step).collect();
        assert_eq!(steps, [0, 2, 4]);
        let gated: Vec<u64> = first.gates.iter().map(|it| it.step).collect();
        assert_eq!(gated, [2, 4], "at every checkpoint");
        assert!(second.gates.is_empty(), "rank 0 measures them");
        // That a disk is slow is no word about the model.
        let words = first.warnings.iter();
        let words: Vec<_> = words.filter(|word| !word.contains("waits for")).collect();
        assert!(words.is_empty(), "{words:?}");
        for gates in &first.gates {
            let bf16 = precision == Precision::Bf16;
            let limit = if bf16 { 0.2 } else { 1e-4 };
            assert!(gates.form_error < limit, "{gates:?}");
            assert_eq!((gates.rounded, gates.layers.len()), (bf16, 2));
            for layer in &gates.layers {
                let growth = layer.norm_input / layer.norm_input_at_start.unwrap();
                assert!(growth > 0.1 && growth < 10.0, "{layer:?}");
                assert!(layer.drift.is_none(), "random weights have no base");
            }
        }
    }
}

#[test]
fn the_held_out_loss_is_that_of_the_eval_command_whatever_the_number_of_ranks() {
    let world = World::new(120);
    let recipe = evaluating(&world);
    let mut before: Option<Vec<f64>> = None;
    let mut folder = String::new();
    for size in [1, 2, 7] {
        let root = world.checkpoints(&size.to_string());
        let ranks = Generation::new(&recipe, &root).run(size);
        if size == 1 {
            folder.clone_from(&ranks[0].checkpoints.last().unwrap().path);
        }
        let losses: Vec<f64> = ranks[0].evaluated.iter().map(loss).collect();
        for evaluated in ranks.iter().flat_map(|rank| &rank.evaluated) {
            assert_eq!(evaluated.windows, 5);
        }
        for (one, other) in losses.iter().zip(before.iter().flatten()) {
            assert!((one - other).abs() < 1e-5, "{one} against {other}");
        }
        before = Some(losses);
    }
    let root = world.checkpoints("1");
    let store = Store::open(root.to_str().unwrap()).unwrap();
    let model = root.join(&folder);
    let (code, out, err) = worker(&[
        "eval",
        "--model",
        model.to_str().unwrap(),
        "--data",
        recipe.data.heldout.as_ref().unwrap().to_str().unwrap(),
        "--sequence-length",
        "16",
        "--windows",
        "5",
        "--json",
    ]);
    assert_eq!(code, 0, "{err}");
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap();
    let (theirs, ours) = (answer["loss"].as_f64().unwrap(), before.unwrap()[2]);
    assert!((theirs - ours).abs() < 1e-5, "{theirs} against {ours}");
    let manifest = verify::manifest(&store, &folder, None).unwrap();
    let measured = manifest.measured.unwrap();
    let kept = measured.heldout.unwrap().loss.unwrap();
    assert!((kept - ours).abs() < 1e-5, "the checkpoint remembers it");
    assert!(measured.gates.unwrap().form_error.unwrap() < 1e-4);
}

#[test]
fn a_generation_that_starts_where_the_loss_is_due_measures_it_again() {
    let world = World::new(120);
    let recipe = evaluating(&world);
    let whole = Generation::new(&recipe, &world.checkpoints("whole")).run(2);
    let root = world.checkpoints("void");
    let mut ranks = Generation {
        void_after: Some(2),
        ..Generation::new(&recipe, &root)
    }
    .run(2);
    let held: Vec<_> = ranks.iter().filter_map(|rank| rank.held.clone()).collect();
    let newest = held.iter().max_by_key(|held| held.step).unwrap().clone();
    let holds = |rank: &Rank| rank.held.as_ref() == Some(&newest);
    let ranked = (0..).zip(&ranks);
    let holders: Vec<u32> = ranked
        .filter(|(_, rank)| holds(rank))
        .map(|(rank, _)| rank)
        .collect();
    let kept = ranks.iter_mut().map(|rank| rank.kept.take()).collect();
    let next = Generation::new(&recipe, &root)
        .starting_from_memory(&newest, &holders)
        .run_on(kept);
    assert_eq!(next[0].outcome, Outcome::Finished);
    assert_eq!(final_hash(&next[0]), final_hash(&whole[0]));
    let missing = |evaluated: &Evaluated| evaluated.step >= newest.step;
    let expected: Vec<_> = results(&whole[0]).into_iter().filter(missing).collect();
    assert_eq!(results(&next[0]), expected);
}

#[test]
fn a_softmax_model_has_no_gates_and_held_out_text_that_is_not_there_is_bad_input() {
    let world = World::new(120);
    let mut recipe = evaluating(&world);
    recipe.attention = Attention::Softmax;
    let rank = &Generation::new(&recipe, &world.checkpoints("softmax")).run(1)[0];
    assert_eq!((rank.evaluated.len(), rank.gates.len()), (3, 0));
    recipe.data.heldout = Some(world.data().join("nowhere.json"));
    let rank = &Generation::new(&recipe, &world.checkpoints("nowhere")).run(1)[0];
    assert!(fault(rank).contains("nowhere.json"), "{}", fault(rank));
    assert!(matches!(
        rank.outcome,
        Outcome::Fault {
            kind: FaultKind::Input,
            ..
        }
    ));
}
