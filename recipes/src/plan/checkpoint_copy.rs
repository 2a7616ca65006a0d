//! What one rank holds in host memory of a checkpoint: the copy that is written while training goes on.

use serde::Serialize;

use super::ModelShape;
use super::flat::Flat;
use super::memory::Component;
use super::snapshots::{state, sum};
use crate::schema::Recipe;

/// The host memory of one rank that the copy takes, pinned beside a GPU, from the beginning of a generation to its end.
///
/// Ranks write equal parts, whether they divide the optimizer's state or not, so that all ranks together take what the
/// whole state does. Where checkpoints are kept in memory (`/dev/shm`, `tmpfs`), the files take as much again each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckpointCopy {
    /// Sum of the components.
    pub bytes: u64,
    /// What it is made of. Exact.
    pub components: Vec<Component>,
}

impl CheckpointCopy {
    /// For `recipe` on a model of `shape`, on each of `world` workers.
    pub fn new(recipe: &Recipe, shape: &ModelShape, world: u32) -> CheckpointCopy {
        let flat = Flat::new(recipe, shape, world);
        let components = state(recipe, flat.whole / u128::from(world.max(1)));
        CheckpointCopy {
            bytes: sum(&components),
            components,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_take_equal_parts_of_masters_and_moments_however_these_are_kept() {
        const PARAMETERS: u64 = 7_812_321_280;
        let head = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n";
        for (more, each) in [
            ("", 12),
            ("optimizer: { sharding: zero1 }", 12),
            ("optimizer: { moments: bf16 }", 8),
            ("model: { precision: fp32 }", 12),
        ] {
            let recipe = Recipe::parse(&format!("{head}{more}"), "t.yaml").unwrap();
            for world in [1, 2, 4, 8] {
                let copy = CheckpointCopy::new(&recipe, &ModelShape::MISTRAL_7B, world);
                let expected = each * PARAMETERS / u64::from(world);
                assert_eq!(copy.bytes, expected, "{more} {world}");
            }
        }
    }
}
