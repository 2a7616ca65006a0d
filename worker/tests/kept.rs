//! What a generation leaves in memory, and the next one that starts from it.

use supra_agent::{FaultKind, Held, Outcome};
use supra_recipes::{
    Recipe,
    schema::{Budget, Precision, Sharding, Tokens},
};
use supra_worker::trainer::Kept;

use crate::fixture::{Generation, Rank, World, fault, losses, restore};

/// 100 samples: 16 steps of 6, and one of 4; a checkpoint is due after every second.
fn recipe(world: &World) -> Recipe {
    let mut recipe = world.recipe("");
    recipe.budget = Budget::exactly(Tokens(1600));
    recipe
}

/// What the ranks keep.
fn kept(ranks: &mut [Rank]) -> Vec<Option<Kept>> {
    ranks.iter_mut().map(|rank| rank.kept.take()).collect()
}

/// Hash of the replica after each step, from `first` on, as rank 0 reports it.
fn hashes(ranks: &[Rank], first: u64) -> Vec<(u64, Vec<u8>)> {
    let steps = ranks[0].steps.iter().filter(|step| step.step >= first);
    steps
        .map(|step| (step.step, step.replica_hash.clone()))
        .collect()
}

/// A generation of two that regroups after step 3 or soon after, and what it holds then.
fn regrouped(world: &World, recipe: &Recipe, name: &str) -> (Vec<Rank>, Held) {
    let root = world.checkpoints(name);
    let ranks = Generation {
        regroup_after: Some(3),
        ..Generation::new(recipe, &root)
    }
    .run(2);
    let held = ranks[0].held.clone().unwrap();
    (ranks, held)
}

#[test]
fn a_void_generation_leaves_states_from_which_the_next_goes_on_with_the_same_bits() {
    let world = World::new(120);
    for precision in [Precision::Fp32, Precision::Bf16] {
        let mut recipe = recipe(&world);
        recipe.model.precision = precision;
        recipe.optimizer.moments = precision;
        let name = |what: &str| world.checkpoints(&format!("{precision:?}-{what}"));
        let whole = Generation::new(&recipe, &name("whole")).run(2);
        let root = name("void");
        let mut ranks = Generation {
            void_after: Some(2),
            ..Generation::new(&recipe, &root)
        }
        .run(2);
        for rank in &ranks {
            let held = rank.held.as_ref().unwrap();
            let last = rank.steps.last().unwrap();
            assert_eq!((held.run.as_str(), held.generation), ("run-1", 1));
            assert_eq!(held.step, last.step, "what is held is reported");
            assert_eq!(held.replica_hash, last.replica_hash);
        }
        // One rank may have ended a step that the other one was told to leave.
        let newest = ranks
            .iter()
            .filter_map(|rank| rank.held.clone())
            .max_by_key(|held| held.step)
            .unwrap();
        let holders: Vec<u32> = (0..)
            .zip(&ranks)
            .filter(|(_, rank)| rank.held.as_ref() == Some(&newest))
            .map(|(rank, _)| rank)
            .collect();
        let next = Generation::new(&recipe, &root)
            .starting_from_memory(&newest, &holders)
            .run_on(kept(&mut ranks));
        for rank in &next {
            assert_eq!(rank.outcome, Outcome::Finished);
            let formed = rank.formed.as_ref().unwrap();
            assert_eq!(
                (formed.step, &formed.replica_hash),
                (newest.step, &newest.replica_hash)
            );
            assert!(
                rank.held.is_none() && rank.kept.is_none(),
                "the run is over"
            );
        }
        assert_eq!(hashes(&next, 0), hashes(&whole, newest.step + 1));
    }
}

#[test]
fn a_newcomer_gets_the_state_from_a_rank_that_holds_it() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let whole = Generation::new(&recipe, &world.checkpoints("whole")).run(2);
    for holder in 0..2 {
        let name = format!("holder-{holder}");
        let (mut ranks, held) = regrouped(&world, &recipe, &name);
        let mut kept = kept(&mut ranks);
        kept[1 - holder] = None;
        let next = Generation::new(&recipe, &world.checkpoints(&name))
            .starting_from_memory(&held, &[holder as u32])
            .run_on(kept);
        for rank in &next {
            assert_eq!(rank.outcome, Outcome::Finished);
            assert_eq!(
                rank.formed.as_ref().unwrap().replica_hash,
                held.replica_hash
            );
        }
        assert_eq!(hashes(&next, 0), hashes(&whole, held.step + 1));
    }
}

#[test]
fn ranks_regroup_after_a_step_that_they_agree_on_and_go_on_as_fewer_or_more() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let whole = Generation::new(&recipe, &world.checkpoints("whole")).run(2);
    for (size, holders) in [(1, &[0][..]), (3, &[0, 1])] {
        let name = format!("to-{size}");
        let (mut ranks, held) = regrouped(&world, &recipe, &name);
        for rank in &ranks {
            assert_eq!(rank.outcome, Outcome::Regrouped);
            assert_eq!(rank.held.as_ref(), Some(&held));
        }
        assert!(
            held.step > 3,
            "only the last rank was asked, when it had reported step 3"
        );
        let mut kept = kept(&mut ranks);
        kept.resize_with(size, || None);
        let next = Generation::new(&recipe, &world.checkpoints(&name))
            .starting_from_memory(&held, holders)
            .run_on(kept);
        for rank in &next {
            assert_eq!(rank.outcome, Outcome::Finished);
            assert_eq!(
                rank.formed.as_ref().unwrap().replica_hash,
                held.replica_hash
            );
        }
        let before = &losses(&whole[0].steps)[held.step as usize..];
        for (mine, whole) in losses(&next[0].steps).iter().zip(before) {
            assert!((mine - whole).abs() < 1e-4, "{mine} against {whole}");
        }
    }
}

#[test]
fn a_run_that_ends_with_the_step_does_not_regroup() {
    let world = World::new(120);
    let mut recipe = world.recipe("");
    recipe.budget = Budget::exactly(Tokens(96));
    let root = world.checkpoints("a");
    let ranks = Generation {
        regroup_after: Some(0),
        ..Generation::new(&recipe, &root)
    }
    .run(2);
    for rank in &ranks {
        assert_eq!(rank.outcome, Outcome::Finished);
        assert!(rank.held.is_none() && rank.kept.is_none());
    }
}

#[test]
fn without_snapshots_no_part_is_kept_and_a_whole_becomes_parts() {
    let world = World::new(120);
    let mut recipe = recipe(&world);
    recipe.optimizer.sharding = Sharding::Zero1;
    recipe.recovery.snapshot_every = 0;
    let root = world.checkpoints("a");
    let regroup = || Generation {
        regroup_after: Some(0),
        ..Generation::new(&recipe, &root)
    };
    for rank in regroup().run(2) {
        assert_eq!(rank.outcome, Outcome::Regrouped);
        assert!(rank.held.is_none() && rank.kept.is_none());
    }
    let mut alone = regroup().run(1);
    let held = alone[0].held.clone().unwrap();
    assert_eq!(held.step, 1);
    let next = Generation::new(&recipe, &root)
        .starting_from_memory(&held, &[0])
        .run_on(vec![alone[0].kept.take(), None]);
    for rank in &next {
        assert_eq!(rank.outcome, Outcome::Finished);
        assert_eq!(
            rank.formed.as_ref().unwrap().replica_hash,
            held.replica_hash
        );
    }
}

#[test]
fn a_rank_that_does_not_hold_what_it_should_says_what_it_holds() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let (mut ranks, held) = regrouped(&world, &recipe, "a");
    let other = Held {
        step: held.step + 1,
        generation: 7,
        ..held.clone()
    };
    let mut kept = kept(&mut ranks);
    kept[1] = None;
    let next = Generation::new(&recipe, &world.checkpoints("a"))
        .starting_from_memory(&other, &[0, 1])
        .run_on(kept);
    for (rank, holds) in next.iter().zip([
        format!("but holds step {} of generation 1 of run run-1", held.step),
        "but holds nothing".to_owned(),
    ]) {
        let Outcome::Fault { kind, .. } = &rank.outcome else {
            panic!("{:?}", rank.outcome)
        };
        assert_eq!(*kind, FaultKind::Transient);
        let message = fault(rank);
        let asked = format!("was to keep step {} of generation 7", other.step);
        assert!(
            message.contains(&asked) && message.contains(&holds),
            "{message}"
        );
    }
    assert_eq!(next[0].held, Some(held), "it is still there");
}

#[test]
fn a_generation_that_comes_to_nothing_leaves_the_state_that_it_was_to_start_from() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let (mut ranks, held) = regrouped(&world, &recipe, "a");
    let mut kept = kept(&mut ranks);
    // Rank 1 keeps nothing, and so ends the generation before its first step.
    kept[1] = None;
    let next = Generation::new(&recipe, &world.checkpoints("a"))
        .starting_from_memory(&held, &[0, 1])
        .run_on(kept);
    let again = next[0].held.clone().unwrap();
    assert_eq!((again.generation, again.step), (2, held.step));
    assert_eq!(again.replica_hash, held.replica_hash);
}

#[test]
fn another_start_drops_what_was_kept() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let (mut ranks, _) = regrouped(&world, &recipe, "a");
    let mut broken = recipe.clone();
    broken.budget = Budget::exactly(Tokens(1 << 20));
    let root = world.checkpoints("a");
    let rank = &Generation::new(&broken, &root).run_on(vec![ranks[0].kept.take()])[0];
    assert!(fault(rank).contains("data.repeat"), "{}", fault(rank));
    assert!(
        rank.held.is_none() && rank.kept.is_none(),
        "no generation follows"
    );
    let rank = &Generation {
        void_after: Some(1),
        number: 2,
        ..Generation::new(&recipe, &root)
    }
    .run_on(vec![ranks[1].kept.take()])[0];
    assert_eq!(rank.formed.as_ref().unwrap().step, 0);
    assert_eq!(rank.held.as_ref().unwrap().generation, 2);
}

#[test]
fn a_checkpoint_that_is_due_where_a_generation_starts_is_written_unless_it_is_there() {
    let world = World::new(120);
    let mut recipe = recipe(&world);
    recipe.checkpoint.every_tokens = Tokens(1).into();
    for there in [true, false] {
        let name = format!("there-{there}");
        let root = world.checkpoints(&name);
        let (mut ranks, held) = regrouped(&world, &recipe, &name);
        let written = ranks[0].checkpoints.last().unwrap();
        assert_eq!(written.step, held.step);
        let mut next = Generation::new(&recipe, &root).starting_from_memory(&held, &[0, 1]);
        next.restore = there.then(|| restore(&root, written));
        let next = next.run_on(kept(&mut ranks));
        assert_eq!(next[0].outcome, Outcome::Finished);
        let first = next[0].checkpoints[0].step;
        assert_eq!(first, held.step + u64::from(there));
    }
}
