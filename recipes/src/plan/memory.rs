//! What one rank holds in the memory of its device, item by item, known before anything is allocated.
//!
//! Sizes follow the tensors that the worker's step allocates; a test of `worker/src/step/buffers.rs` compares them to the
//! byte. Two items are estimates: what libtorch allocates where it works in place of the worker's own kernels, and what
//! CUDA takes for itself.

use std::fmt;

use serde::Serialize;

use super::sizes::{BF16, FP32, Sizes};
use super::{ModelShape, Policy};
use crate::schema::{Precision, Recipe, Reduction};

/// Logits that exist at a time: the loss is made for so many tokens at once that there are no more.
pub const LOGITS: u64 = 1 << 28;

/// CUDA's context, the workspaces of its libraries, loaded kernels, their partial sums, the optimizer's temporaries and
/// what the allocator rounds up. Measured on an H200: what the process held beyond the tensors counted here was 0.7 to
/// 0.8 GB, whatever the policy and the number of layers. What NCCL takes between several GPUs is not in it: unmeasured.
const CONTEXT: u128 = 800_000_000;

/// GPUs by the memory they are sold with.
pub const CARDS: [Card; 2] = [
    Card {
        name: "80 GB",
        bytes: 85_000_000_000,
    },
    Card {
        name: "141 GB",
        bytes: 150_700_000_000,
    },
];

/// A GPU as far as memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Card {
    /// What it is sold as.
    pub name: &'static str,
    /// What its driver states as total memory, rounded down: of the H100 and the H200.
    pub bytes: u64,
}

/// One item of a rank's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Component {
    /// What it holds.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Whether the size is estimated; otherwise it is exact.
    pub estimate: bool,
}

/// The memory of one rank on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// What the forward pass keeps.
    pub policy: Policy,
    /// Sum of the components.
    pub bytes: u64,
    /// What it is made of: the same items in the same order for every policy.
    pub components: Vec<Component>,
}

impl Memory {
    /// For `recipe` on a model of `shape`, on each of `world` workers.
    pub fn new(recipe: &Recipe, shape: &ModelShape, world: u32, policy: Policy) -> Memory {
        let parameters = u128::from(shape.parameters(recipe.attention, recipe.model.qk_norm));
        let sizes = Sizes::new(recipe, shape, world);
        let components = [
            (
                "bf16 parameters",
                match recipe.model.precision {
                    Precision::Bf16 => BF16 * parameters,
                    Precision::Fp32 => 0,
                },
            ),
            ("fp32 master parameters", FP32 * parameters),
            ("fp32 gradients", FP32 * parameters),
            ("fp32 first moments", FP32 * parameters),
            ("fp32 second moments", FP32 * parameters),
            // All other ranks' gradients of this rank's part, and their sum: as much as all gradients of one.
            (
                "gradients of other ranks",
                match recipe.reduction {
                    Reduction::Ordered if world > 1 => FP32 * parameters,
                    Reduction::Ordered | Reduction::Nccl => 0,
                },
            ),
            ("activations, per block", sizes.per_block(policy)),
            ("activations, shared", sizes.shared(policy)),
            ("their gradients", sizes.gradients()),
            ("last norm and logits", sizes.head()),
            ("batch and its tables", sizes.batch()),
            ("states of attention", sizes.states()),
            ("libtorch's temporaries", sizes.temporaries()),
            ("CUDA and its libraries", CONTEXT),
        ];
        let components: Vec<Component> = components
            .into_iter()
            .map(|(name, bytes)| Component {
                name,
                bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
                estimate: ["libtorch's temporaries", "CUDA and its libraries"].contains(&name),
            })
            .collect();
        Memory {
            policy,
            bytes: components
                .iter()
                .fold(0, |sum, component| sum.saturating_add(component.bytes)),
            components,
        }
    }

    /// For every policy, the one that computes least twice first.
    pub fn of_all(recipe: &Recipe, shape: &ModelShape, world: u32) -> [Memory; 3] {
        Policy::ALL.map(|policy| Memory::new(recipe, shape, world, policy))
    }
}

/// Of `plans`, the first that `recipe` allows and `available` bytes hold.
pub fn fitting<'a>(plans: &'a [Memory], recipe: &Recipe, available: u64) -> Option<&'a Memory> {
    plans
        .iter()
        .find(|plan| plan.policy.allowed_by(recipe.batch.activations) && plan.bytes <= available)
}

/// Samples of the largest micro-batch that a rank sees.
pub fn rows(recipe: &Recipe, world: u32) -> u64 {
    let batch = &recipe.batch;
    let samples = recipe.budget.tokens() / u64::from(batch.sequence_length.max(1));
    let share = batch.samples().min(samples).div_ceil(world.max(1).into());
    u64::from(batch.micro_batch).min(share).max(1)
}

impl fmt::Display for Memory {
    /// The sum and its parts in one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", gib(self.bytes))?;
        let parts = self.components.iter().filter(|part| part.bytes > 0);
        for (index, part) in parts.enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{} {}", part.name, gib(part.bytes))?;
        }
        Ok(())
    }
}

/// A size in GiB with one decimal.
pub fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(more: &str) -> Recipe {
        let head = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 20B }\n";
        Recipe::parse(&format!("{head}{more}"), "t.yaml").unwrap()
    }

    fn mistral(policy: Policy) -> Memory {
        Memory::new(&recipe(""), &ModelShape::MISTRAL_7B, 1, policy)
    }

    fn part(memory: &Memory, name: &str) -> u64 {
        let parts = &memory.components;
        parts.iter().find(|part| part.name == name).unwrap().bytes
    }

    /// What `supra-worker bench step` measured on an H200: all that its process held after 13 passes over 4 x 2048 tokens
    /// of Mistral-7B-SUPRA. It has bf16 weights and fp32 gradients, and neither masters nor moments.
    #[test]
    fn forward_and_backward_take_what_was_measured() {
        for (policy, layers, measured) in [
            (Policy::Lean, 32, 77.0e9),
            (Policy::Save, 32, 93.7e9),
            (Policy::Lean, 2, 8.9e9),
        ] {
            let shape = ModelShape {
                layers,
                ..ModelShape::MISTRAL_7B
            };
            let memory = Memory::new(&recipe(""), &shape, 1, policy);
            let optimizer = [
                "fp32 master parameters",
                "fp32 first moments",
                "fp32 second moments",
            ];
            let without = optimizer
                .map(|name| part(&memory, name))
                .iter()
                .sum::<u64>();
            let planned = (memory.bytes - without) as f64;
            assert!(
                (planned / measured - 1.0).abs() < 0.01,
                "{policy}, {layers} layers: {planned:.4e} planned, {measured:.4e} measured"
            );
        }
    }

    #[test]
    fn parameters_and_optimizer_take_eighteen_bytes_each_in_bf16_and_sixteen_in_fp32() {
        let replicated = |more: &str| -> u64 {
            let shape = &ModelShape::MISTRAL_7B;
            let memory = Memory::new(&recipe(more), shape, 1, Policy::Lean);
            memory.components[..5].iter().map(|part| part.bytes).sum()
        };
        let parameters = 7_812_321_280;
        assert_eq!(replicated(""), 18 * parameters);
        assert_eq!(replicated("model: { precision: fp32 }"), 16 * parameters);
    }

    #[test]
    fn what_is_not_kept_is_there_once() {
        let [save, lean, recompute] = Memory::of_all(&recipe(""), &ModelShape::MISTRAL_7B, 1);
        assert_eq!(part(&save, "activations, shared"), 0);
        let difference = |more: &Memory, less: &Memory| {
            let own = "activations, per block";
            let shared = "activations, shared";
            let moved = part(less, shared) - part(more, shared);
            (part(more, own) - part(less, own), moved)
        };
        for (more, less) in [(&save, &lean), (&lean, &recompute)] {
            let (own, moved) = difference(more, less);
            assert_eq!(own, 32 * moved);
        }
    }

    #[test]
    fn auto_takes_the_policy_that_fits_and_computes_least_twice() {
        let plans = Memory::of_all(&recipe(""), &ModelShape::MISTRAL_7B, 1);
        let auto = |available| fitting(&plans, &recipe(""), available).map(|plan| plan.policy);
        let [save, lean, recompute] = plans.each_ref().map(|plan| plan.bytes);
        assert_eq!(auto(save), Some(Policy::Save));
        assert_eq!(auto(save - 1), Some(Policy::Lean));
        assert_eq!(auto(lean - 1), Some(Policy::Recompute));
        assert_eq!(auto(recompute - 1), None);
        let lean_only = recipe("batch: { activations: lean }");
        let chosen = |available| fitting(&plans, &lean_only, available).map(|plan| plan.policy);
        assert_eq!(chosen(save), Some(Policy::Lean));
        assert_eq!(chosen(lean - 1), None);
    }

    #[test]
    fn mistral_trains_on_one_card_of_141_gb_with_recomputation() {
        let [small, large] = CARDS.map(|card| card.bytes);
        assert!(mistral(Policy::Recompute).bytes < large);
        assert!(mistral(Policy::Lean).bytes > large);
        assert!(mistral(Policy::Recompute).bytes > small);
    }

    #[test]
    fn a_rank_needs_no_room_for_samples_that_it_never_sees() {
        let recipe = recipe("batch: { tokens: 16Ki, sequence_length: 2048, micro_batch: 4 }");
        assert_eq!([1, 2, 4, 8].map(|world| rows(&recipe, world)), [4, 4, 2, 1]);
    }

    #[test]
    fn adding_in_rank_order_takes_as_much_as_the_gradients() {
        let ordered = recipe("reduction: ordered");
        let more = |world| {
            let shape = &ModelShape::MISTRAL_7B;
            let memory = Memory::new(&ordered, shape, world, Policy::Lean);
            part(&memory, "gradients of other ranks")
        };
        assert_eq!([more(1), more(2)], [0, 4 * 7_812_321_280]);
    }

    #[test]
    fn the_largest_recipe_has_a_size() {
        let most = u32::MAX;
        let recipe = recipe(&format!(
            "batch: {{ tokens: {}, micro_batch: {most}, sequence_length: {most} }}\noptimizer: {{ warmup: 1 tokens }}",
            u64::from(most)
        ));
        let memory = Memory::new(&recipe, &ModelShape::MISTRAL_7B, 1, Policy::Save);
        assert!(memory.bytes > 1 << 40);
    }

    #[test]
    fn a_plan_reads_as_one_line() {
        let line = mistral(Policy::Recompute).to_string();
        assert!(line.starts_with("136."), "{line}");
        assert!(line.contains("fp32 gradients 29.1 GiB, "), "{line}");
        assert!(!line.contains("temporaries"), "{line}");
    }
}
