//! What one rank holds in host memory of snapshots: copies of the parts into which ranks have divided the state.

use serde::Serialize;

use super::ModelShape;
use super::flat::Flat;
use super::memory::Component;
use super::sizes::{FP32, element};
use crate::schema::{Recipe, Sharding};

/// Of every part there are two copies on a rank: the last whole one, and the one that is being made.
const BUFFERS: u128 = 2;

/// A rank keeps its own part, and that of a neighbour.
const PARTS: u128 = 2;

/// The host memory of one rank that snapshots take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshots {
    /// Steps from one to the next; 0 = there are none.
    pub every: u32,
    /// Sum of the components.
    pub bytes: u64,
    /// What it is made of. Exact.
    pub components: Vec<Component>,
}

impl Snapshots {
    /// For `recipe` on a model of `shape`, on each of `world` workers.
    pub fn new(recipe: &Recipe, shape: &ModelShape, world: u32) -> Snapshots {
        let every = every(recipe, world);
        let copies = match every {
            0 => 0,
            _ => BUFFERS * PARTS * Flat::new(recipe, shape, world).own,
        };
        let components = state(recipe, copies);
        Snapshots {
            every,
            bytes: sum(&components),
            components,
        }
    }
}

/// Masters and moments of so many parameters. Of bf16 parameters a master is the parameter and its remainder, which have
/// 4 bytes together.
pub(super) fn state(recipe: &Recipe, parameters: u128) -> Vec<Component> {
    let moment = element(recipe.optimizer.moments);
    let components = [
        ("fp32 masters", FP32),
        ("first moments", moment),
        ("second moments", moment),
    ];
    let sized = components.into_iter().map(|(name, size)| Component {
        name,
        bytes: u64::try_from(parameters * size).unwrap_or(u64::MAX),
        estimate: false,
    });
    sized.collect()
}

/// Bytes of all components.
pub(super) fn sum(components: &[Component]) -> u64 {
    let bytes = components.iter().map(|part| part.bytes);
    bytes.fold(0, u64::saturating_add)
}

/// Steps from one snapshot to the next where `world` workers train by `recipe`; 0 = none are taken, because the recipe
/// wants none, or because every worker has all of the state.
pub fn every(recipe: &Recipe, world: u32) -> u32 {
    match recipe.optimizer.sharding {
        Sharding::Zero1 if world > 1 => recipe.recovery.snapshot_every,
        Sharding::Zero1 | Sharding::None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAMETERS: u64 = 7_812_321_280;

    fn taken(more: &str, world: u32) -> Snapshots {
        let head = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n";
        let recipe = Recipe::parse(&format!("{head}{more}"), "t.yaml").unwrap();
        Snapshots::new(&recipe, &ModelShape::MISTRAL_7B, world)
    }

    #[test]
    fn two_buffers_hold_the_own_part_and_a_neighbours_with_masters_and_moments() {
        for (more, each) in [
            ("optimizer: { sharding: zero1 }", 12),
            ("optimizer: { sharding: zero1, moments: bf16 }", 8),
            (
                "model: { precision: fp32 }\noptimizer: { sharding: zero1 }",
                12,
            ),
        ] {
            for world in [2, 4, 8] {
                let snapshots = taken(more, world);
                let expected = 4 * each * PARAMETERS / u64::from(world);
                assert_eq!((snapshots.every, snapshots.bytes), (8, expected), "{more}");
            }
        }
    }

    #[test]
    fn whoever_has_all_of_the_state_or_wants_none_takes_none() {
        for (more, world) in [
            ("", 4),
            ("optimizer: { sharding: zero1 }", 1),
            (
                "optimizer: { sharding: zero1 }\nrecovery: { snapshot_every: 0 }",
                4,
            ),
        ] {
            let snapshots = taken(more, world);
            assert_eq!((snapshots.every, snapshots.bytes), (0, 0), "{more}");
        }
    }
}
