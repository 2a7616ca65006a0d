//! Ranks that divide the state, and what the death of one of them costs.

use supra_agent::{FaultKind, Held, Outcome};
use supra_recipes::{
    Recipe,
    schema::{Budget, Precision, Sharding, Tokens},
};
use supra_worker::trainer::Kept;

use crate::fixture::{Generation, Rank, World, fault, losses};

/// 100 samples: 16 steps of 6, and one of 4; a snapshot every second step.
fn recipe(world: &World) -> Recipe {
    let mut recipe = world.recipe("");
    recipe.budget = Budget::exactly(Tokens(1600));
    recipe.optimizer.sharding = Sharding::Zero1;
    recipe.recovery.snapshot_every = 2;
    recipe
}

/// What the ranks keep, and what they say of it; nothing of the dead ones.
fn survivors(ranks: &mut [Rank], dead: &[usize]) -> (Vec<Option<Kept>>, Vec<Option<Held>>) {
    let each = ranks.iter_mut().enumerate();
    each.map(|(rank, it)| match dead.contains(&rank) {
        true => (None, None),
        false => (it.kept.take(), it.held.clone()),
    })
    .unzip()
}

/// Hash of the state after each step, from `first` on, as rank 0 reports it.
fn hashes(ranks: &[Rank], first: u64) -> Vec<(u64, Vec<u8>)> {
    let steps = ranks[0].steps.iter().filter(|step| step.step >= first);
    steps
        .map(|step| (step.step, step.replica_hash.clone()))
        .collect()
}

/// The last step that any rank reported.
fn last_step(ranks: &[Rank]) -> u64 {
    let steps = ranks.iter().filter_map(|rank| rank.steps.last());
    steps.map(|step| step.step).max().unwrap_or(0)
}

#[test]
fn wherever_in_a_step_a_rank_dies_the_others_go_back_to_a_snapshot_and_end_with_the_same_bits() {
    let world = World::new(120);
    for (precision, first) in [(Precision::Fp32, 56), (Precision::Bf16, 57)] {
        let mut recipe = recipe(&world);
        recipe.model.precision = precision;
        recipe.optimizer.moments = precision;
        let name = |what: &str| world.checkpoints(&format!("{precision:?}-{what}"));
        let whole = Generation::new(&recipe, &name("whole")).run(3);
        // Four buckets are added and four gathered in a step, around what the ranks tell each other.
        for operations in (first..70).step_by(2) {
            let root = name(&format!("dies-{operations}"));
            let mut ranks = Generation {
                dies: Some((1, operations)),
                ..Generation::new(&recipe, &root)
            }
            .run(3);
            let died_at = last_step(&ranks) + 1;
            let (kept, held) = survivors(&mut ranks, &[1]);
            let next = Generation::new(&recipe, &root).starting_from_parts(&held);
            let next = next.unwrap_or_else(|| panic!("{operations}: {held:?}"));
            let from = next.donation.as_ref().unwrap().state.step;
            assert!(
                from >= 2 && died_at - from <= 5,
                "{operations}: from step {from}, died in step {died_at}"
            );
            let next = next.run_on(kept);
            for rank in &next {
                assert_eq!(rank.outcome, Outcome::Finished, "{operations}");
                assert_eq!(rank.formed.as_ref().unwrap().step, from);
            }
            assert_eq!(hashes(&next, 0), hashes(&whole, from + 1), "{operations}");
        }
    }
}

#[test]
fn all_ranks_tell_of_a_snapshot_and_two_know_each_part() {
    let world = World::new(120);
    let ranks = Generation::new(&recipe(&world), &world.checkpoints("a")).run(3);
    let steps = |rank: &Rank| rank.snapshots.iter().map(|it| it.step).collect::<Vec<_>>();
    assert!(steps(&ranks[0]).len() >= 2, "{:?}", steps(&ranks[0]));
    for (number, rank) in ranks.iter().enumerate() {
        assert_eq!(rank.outcome, Outcome::Finished);
        assert!(
            rank.held.is_none() && rank.kept.is_none(),
            "the run is over"
        );
        assert_eq!(steps(rank), steps(&ranks[0]), "all of the same steps");
        let next = &ranks[(number + 1) % 3];
        for (mine, theirs) in rank.snapshots.iter().zip(&next.snapshots) {
            assert_eq!(mine.own.as_ref().unwrap().index, number as u32);
            assert_eq!(mine.own, theirs.kept);
        }
    }
}

#[test]
fn ranks_regroup_with_a_snapshot_of_that_step_and_go_on_as_fewer_or_more() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let whole = Generation::new(&recipe, &world.checkpoints("whole")).run(3);
    // The one that is gone has left its part with its neighbour.
    for (size, dead) in [
        (1, None),
        (2, Some(2)),
        (3, Some(1)),
        (4, Some(0)),
        (3, None),
    ] {
        let root = world.checkpoints(&format!("to-{size}-{dead:?}"));
        let mut ranks = Generation {
            regroup_after: Some(3),
            ..Generation::new(&recipe, &root)
        }
        .run(3);
        let step = last_step(&ranks);
        for rank in &ranks {
            assert_eq!(rank.outcome, Outcome::Regrouped);
            assert_eq!(
                rank.held.as_ref().unwrap().snapshots.last().unwrap().step,
                step
            );
        }
        // Alone a rank has two of three parts: the third is with another one.
        let dead = Vec::from_iter(dead);
        let (mut kept, mut held) = survivors(&mut ranks, &dead);
        if size < 3 {
            kept.truncate(2);
            held.truncate(2);
        }
        kept.resize_with(size.max(kept.len()), || None);
        held.resize(kept.len(), None);
        let next = Generation::new(&recipe, &root)
            .starting_from_parts(&held)
            .unwrap();
        assert_eq!(
            next.donation.as_ref().unwrap().state.step,
            step,
            "nothing is lost"
        );
        let next = next.run_on(kept);
        for rank in &next {
            assert_eq!(rank.outcome, Outcome::Finished);
            assert_eq!(
                rank.formed.as_ref().unwrap().replica_hash,
                whole[0].steps[step as usize - 1].replica_hash,
                "the same state, whoever has it"
            );
        }
        if next.len() == 3 {
            assert_eq!(hashes(&next, 0), hashes(&whole, step + 1));
        }
        let before = &losses(&whole[0].steps)[step as usize..];
        for (mine, whole) in losses(&next[0].steps).iter().zip(before) {
            assert!((mine - whole).abs() < 1e-4, "{mine} against {whole}");
        }
    }
}

#[test]
fn a_rank_that_became_alone_has_the_whole_state_and_gives_it_to_others() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let root = world.checkpoints("a");
    let mut ranks = Generation {
        regroup_after: Some(3),
        ..Generation::new(&recipe, &root)
    }
    .run(2);
    let step = last_step(&ranks);
    let (mut kept, held) = survivors(&mut ranks, &[1]);
    kept.truncate(1);
    let alone = Generation::new(&recipe, &root)
        .starting_from_parts(&held)
        .unwrap();
    let mut alone = Generation {
        void_after: Some(step + 2),
        ..alone
    }
    .run_on(kept);
    let held = alone[0].held.clone().unwrap();
    assert_eq!((held.step >= step + 2, held.snapshots.len()), (true, 0));
    let next = Generation::new(&recipe, &root).starting_from_memory(&held, &[0]);
    let next = Generation { number: 3, ..next }.run_on(vec![alone[0].kept.take(), None]);
    for rank in &next {
        assert_eq!(rank.outcome, Outcome::Finished);
        assert_eq!(rank.snapshots[0].step, held.step, "at once");
    }
}

#[test]
fn two_deaths_in_a_row_cost_no_more_than_one() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let root = world.checkpoints("a");
    let whole = Generation::new(&recipe, &world.checkpoints("whole")).run(3);
    let mut ranks = Generation {
        dies: Some((1, 60)),
        ..Generation::new(&recipe, &root)
    }
    .run(3);
    let (kept, held) = survivors(&mut ranks, &[1]);
    let next = Generation::new(&recipe, &root)
        .starting_from_parts(&held)
        .unwrap();
    let from = next.donation.as_ref().unwrap().state.step;
    // The first snapshot of the second generation is of where it started from.
    let mut again = Generation {
        void_after: Some(from + 1),
        ..next
    }
    .run_on(kept);
    let (kept, held) = survivors(&mut again, &[2]);
    let next = Generation::new(&recipe, &root)
        .starting_from_parts(&held)
        .unwrap();
    let state = next.donation.as_ref().unwrap().state.clone();
    assert!(state.step >= from, "{state:?}");
    let next = Generation { number: 3, ..next }.run_on(kept);
    assert_eq!(next[0].outcome, Outcome::Finished);
    assert_eq!(hashes(&next, 0), hashes(&whole, state.step + 1));
}

#[test]
fn a_rank_that_does_not_hold_the_part_that_it_should_says_what_it_holds() {
    let world = World::new(120);
    let recipe = recipe(&world);
    let root = world.checkpoints("a");
    let mut ranks = Generation {
        regroup_after: Some(3),
        ..Generation::new(&recipe, &root)
    }
    .run(2);
    let (kept, held) = survivors(&mut ranks, &[]);
    let mut next = Generation::new(&recipe, &root)
        .starting_from_parts(&held)
        .unwrap();
    let donation = next.donation.as_mut().unwrap();
    let step = donation.state.step;
    donation.parts[1].hash[7] ^= 1;
    let next = next.run_on(kept);
    let broken = donation_rank(&next);
    let Outcome::Fault { kind, .. } = &next[broken].outcome else {
        panic!("{:?}", next[broken].outcome)
    };
    assert_eq!(*kind, FaultKind::Transient);
    let message = fault(&next[broken]);
    assert!(
        message.contains(&format!("of 2 of step {step} of generation 1")),
        "{message}"
    );
    assert!(next[broken].held.is_some(), "it is still there");
}

/// The rank that says that it does not keep what it should.
fn donation_rank(ranks: &[Rank]) -> usize {
    let says = |rank: &Rank| fault(rank).contains("was to keep");
    ranks.iter().position(says).unwrap()
}
