//! Results that are not finite: whether samples or a device are at fault, without a coordinator.

use std::rc::Rc;

use supra_agent::Outcome;
use supra_recipes::schema::Sharding;
use supra_worker::kernels::Kernels;

use crate::broken::Spoilt;
use crate::fixture::{Generation, Rank, World, fault};

/// Two ranks of three samples in micro-batches of two: call 3 is the first of step 2.
const WRONG_LOSS_IN_STEP_2: Spoilt = Spoilt {
    loss: |call| call == 3,
    ..Spoilt::NONE
};

/// What a generation of two does whose ranks compute with these kernels.
fn run(
    world: &World,
    name: &str,
    sharding: Sharding,
    kernels: fn(u32, Rc<dyn Kernels>) -> Rc<dyn Kernels>,
) -> Vec<Rank> {
    let mut recipe = world.recipe("");
    recipe.optimizer.sharding = sharding;
    Generation {
        kernels,
        ..Generation::new(&recipe, &world.checkpoints(name))
    }
    .run(2)
}

/// Both ranks say the same of step 2, which none of them has applied.
fn blamed(ranks: &[Rank], who: Option<u32>) {
    for rank in ranks {
        let Outcome::Hardware { culprit, .. } = &rank.outcome else {
            panic!("{:?}", rank.outcome);
        };
        assert_eq!(*culprit, who, "{}", fault(rank));
        assert_eq!(fault(rank), fault(&ranks[0]));
        let steps: Vec<u64> = rank.steps.iter().map(|step| step.step).collect();
        assert_eq!(steps, [1]);
    }
}

#[test]
fn a_loss_that_is_wrong_once_on_one_rank_ends_the_generation_and_names_the_rank() {
    let world = World::new(120);
    for sharding in [Sharding::None, Sharding::Zero1] {
        let name = format!("{sharding:?}");
        let ranks = run(&world, &name, sharding, |rank, own| match rank {
            1 => WRONG_LOSS_IN_STEP_2.kernels(own),
            _ => own,
        });
        blamed(&ranks, Some(1));
        assert!(
            fault(&ranks[0]).starts_with("rank 1 computed"),
            "{}",
            fault(&ranks[0])
        );
    }
}

#[test]
fn a_rank_that_computes_nothing_finite_any_more_is_named_by_the_other() {
    let world = World::new(120);
    let ranks = run(&world, "a", Sharding::None, |rank, own| match rank {
        0 => {
            let gradient = |call| call >= 3;
            Spoilt {
                gradient,
                ..Spoilt::NONE
            }
            .kernels(own)
        }
        _ => own,
    });
    blamed(&ranks, Some(0));
}

#[test]
fn a_gradient_that_is_wrong_once_is_a_fault_of_nobody_knows_whom() {
    let world = World::new(120);
    let ranks = run(&world, "a", Sharding::Zero1, |rank, own| match rank {
        1 => {
            let gradient = |call| call == 3;
            Spoilt {
                gradient,
                ..Spoilt::NONE
            }
            .kernels(own)
        }
        _ => own,
    });
    blamed(&ranks, None);
    assert!(
        fault(&ranks[0]).contains("nobody knows which"),
        "{}",
        fault(&ranks[0])
    );
}

#[test]
fn the_next_generation_goes_on_from_what_the_others_hold_with_the_same_bits() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let whole = Generation::new(&recipe, &world.checkpoints("whole")).run(2);
    let mut ranks = run(&world, "a", Sharding::None, |rank, own| match rank {
        1 => WRONG_LOSS_IN_STEP_2.kernels(own),
        _ => own,
    });
    assert!(ranks[1].held.is_none() && ranks[1].kept.is_none());
    let held = ranks[0].held.clone().unwrap();
    assert_eq!(held.step, 1, "the step is not torn");
    let kept = ranks.iter_mut().map(|rank| rank.kept.take()).collect();
    let next = Generation::new(&recipe, &world.checkpoints("a"))
        .starting_from_memory(&held, &[0])
        .run_on(kept);
    for (rank, undisturbed) in next.iter().zip(&whole) {
        assert_eq!(rank.outcome, Outcome::Finished);
        let last = |rank: &Rank| rank.steps.last().unwrap().replica_hash.clone();
        assert_eq!(last(rank), last(undisturbed));
    }
}

#[test]
fn alone_a_rank_skips_the_step_and_says_that_nobody_could_be_asked() {
    let world = World::new(120);
    let recipe = world.recipe("");
    // Six samples, three micro-batches.
    let rank = &Generation {
        kernels: |_, own| {
            let loss = |call| call == 4;
            Spoilt {
                loss,
                ..Spoilt::NONE
            }
            .kernels(own)
        },
        ..Generation::new(&recipe, &world.checkpoints("a"))
    }
    .run(1)[0];
    assert_eq!(rank.outcome, Outcome::Finished);
    let skipped: Vec<bool> = rank.steps.iter().map(|step| step.skipped).collect();
    assert_eq!(skipped, [false, true, false, false]);
    assert!(
        rank.warnings[0].contains("step 2 is not finite, and there is no other rank"),
        "{:?}",
        rank.warnings
    );
}

#[test]
fn a_flipped_bit_of_one_rank_shows_in_the_hash_of_its_block() {
    let world = World::new(120);
    // Four buckets; the second update of the third one, which is block 1.
    let ranks = run(&world, "a", Sharding::None, |rank, own| match rank {
        1 => {
            let parameter = |call| call == 7;
            Spoilt {
                parameter,
                ..Spoilt::NONE
            }
            .kernels(own)
        }
        _ => own,
    });
    let [first, second] = [&ranks[0], &ranks[1]].map(|rank| &rank.steps);
    assert_eq!(first[0].bucket_hashes.len(), 4);
    assert_eq!(first[0].bucket_hashes, second[0].bucket_hashes);
    assert_ne!(first[1].replica_hash, second[1].replica_hash);
    let pairs = first[1].bucket_hashes.iter().zip(&second[1].bucket_hashes);
    let differ: Vec<bool> = pairs.map(|(left, right)| left != right).collect();
    assert_eq!(differ, [false, false, true, false]);
}
