//! What one rank holds in the memory of its device, item by item, known before anything is allocated.
//!
//! Sizes follow the tensors that the worker's step allocates; a test of `worker/src/step/buffers.rs` compares them to the
//! byte. Three items are estimates: what libtorch allocates where it works in place of the worker's own kernels, what
//! linearisation gates take, and what CUDA takes for itself.

use std::fmt;

use serde::Serialize;

use super::flat::Flat;
use super::sizes::{BF16, FP32, Sizes, element};
use super::{ModelShape, Policy};
use crate::schema::{Attention, Precision, Recipe, Reduction};

/// Logits that exist at a time: the loss is made for so many tokens at once that there are no more.
pub const LOGITS: u64 = 1 << 28;

/// CUDA's context, the workspaces of its libraries, loaded kernels, their partial sums, the optimizer's temporaries and
/// what the allocator rounds up. Measured on an H200: what the process held beyond the tensors counted here was 0.7 to
/// 0.8 GB, whatever the policy and the number of layers. What NCCL takes between several GPUs is not in it: unmeasured.
const CONTEXT: u128 = 800_000_000;

/// Items whose sizes are estimated.
const ESTIMATES: [&str; 3] = [
    "libtorch's temporaries",
    "linearisation gates",
    "CUDA and its libraries",
];

/// Tokens of the sample that linearisation gates read (`worker/src/inference/gates.rs`).
const GATE_TOKENS: u128 = 512;

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
        let sizes = Sizes::new(recipe, shape, world);
        let flat = Flat::new(recipe, shape, world);
        let (parameters, masters) = match recipe.model.precision {
            // A master is its parameter and 16 bits more.
            Precision::Bf16 => ("bf16 parameters", BF16 * flat.own),
            Precision::Fp32 => ("fp32 parameters", 0),
        };
        let (first, second) = match recipe.optimizer.moments {
            Precision::Bf16 => ("bf16 first moments", "bf16 second moments"),
            Precision::Fp32 => ("fp32 first moments", "fp32 second moments"),
        };
        let moment = element(recipe.optimizer.moments) * flat.own;
        let components = [
            (parameters, element(recipe.model.precision) * flat.whole),
            ("remainders of fp32 masters", masters),
            ("fp32 gradients", FP32 * flat.whole),
            (first, moment),
            (second, moment),
            (
                "gradients of other ranks",
                match recipe.reduction {
                    Reduction::Ordered => FP32 * flat.others,
                    Reduction::Nccl => 0,
                },
            ),
            ("activations, per block", sizes.per_block(policy)),
            ("activations, shared", sizes.shared(policy)),
            ("their gradients", sizes.gradients()),
            ("last norm and logits", sizes.head()),
            ("batch and its tables", sizes.batch()),
            ("states of attention", sizes.states()),
            ("libtorch's temporaries", sizes.temporaries()),
            ("linearisation gates", gates(recipe, shape)),
            ("CUDA and its libraries", CONTEXT),
        ];
        let components: Vec<Component> = components
            .into_iter()
            .map(|(name, bytes)| Component {
                name,
                bytes: u64::try_from(bytes).unwrap_or(u64::MAX),
                estimate: ESTIMATES.contains(&name),
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

/// What measuring linearisation gates takes for a moment: embedding and a block of the base, and logits in two kinds.
fn gates(recipe: &Recipe, shape: &ModelShape) -> u128 {
    if recipe.eval.is_none() || recipe.attention == Attention::Softmax {
        return 0;
    }
    let [embedding, block, _] = shape.buckets(recipe.attention, recipe.model.qk_norm);
    let element = element(recipe.model.precision);
    let logits = GATE_TOKENS * u128::from(shape.vocab);
    element * (u128::from(embedding) + u128::from(block)) + (element + 2 * FP32) * logits
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
                "remainders of fp32 masters",
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

    const PARAMETERS: u64 = 7_812_321_280;

    /// What parameters, gradients and the optimizer's state take on each of `world` ranks.
    fn state(more: &str, world: u32) -> u64 {
        let shape = &ModelShape::MISTRAL_7B;
        let memory = Memory::new(&recipe(more), shape, world, Policy::Lean);
        memory.components[..5].iter().map(|part| part.bytes).sum()
    }

    #[test]
    fn parameters_and_optimizer_take_sixteen_bytes_each_and_twelve_with_bf16_moments() {
        assert_eq!(state("", 1), 16 * PARAMETERS);
        assert_eq!(state("", 1), 124_997_140_480, "125 GB of an H200's 150.7");
        assert_eq!(state("model: { precision: fp32 }", 1), 16 * PARAMETERS);
        assert_eq!(state("optimizer: { moments: bf16 }", 1), 12 * PARAMETERS);
        let smallest = "model: { precision: fp32 }\noptimizer: { moments: bf16 }";
        assert_eq!(state(smallest, 1), 12 * PARAMETERS);
    }

    #[test]
    fn zero1_divides_moments_and_remainders_and_nothing_else() {
        for (more, whole, divided) in [
            ("optimizer: { sharding: zero1 }", 6, 10),
            ("optimizer: { sharding: zero1, moments: bf16 }", 6, 6),
            (
                "model: { precision: fp32 }\noptimizer: { sharding: zero1 }",
                8,
                8,
            ),
        ] {
            for world in [1, 2, 4, 8] {
                let expected = whole * PARAMETERS + divided * PARAMETERS / u64::from(world);
                assert_eq!(state(more, world), expected, "{more} {world}");
            }
        }
        assert_eq!(
            state("", 8),
            state("", 1),
            "nothing is divided unless asked"
        );
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

    /// On H200s, which have 150.7 GB, of which 149.9 GB are free for a worker.
    #[test]
    fn mistral_trains_on_one_h200_with_fp32_masters_and_moments() {
        const FREE: u64 = 149_900_000_000;
        let taken = |more: &str, world| {
            let recipe = recipe(more);
            let plans = Memory::of_all(&recipe, &ModelShape::MISTRAL_7B, world);
            let plan = fitting(&plans, &recipe, FREE)?;
            Some((plan.policy, (plan.bytes as f64 / 1e8).round() / 10.0))
        };
        let bf16_moments = "optimizer: { moments: bf16 }";
        let zero1 = "optimizer: { sharding: zero1 }";
        let found = [
            taken("", 1),
            taken("batch: { micro_batch: 2 }", 1),
            taken(bf16_moments, 1),
            taken(zero1, 2),
        ];
        let expected = [
            (Policy::Recompute, 130.7),
            (Policy::Save, 148.8),
            (Policy::Save, 140.6),
            (Policy::Save, 132.7),
        ];
        assert_eq!(found, expected.map(Some), "in GB");
    }

    #[test]
    fn a_rank_needs_no_room_for_samples_that_it_never_sees() {
        let recipe = recipe("batch: { tokens: 16Ki, sequence_length: 2048, micro_batch: 4 }");
        assert_eq!([1, 2, 4, 8].map(|world| rows(&recipe, world)), [4, 4, 2, 1]);
    }

    #[test]
    fn adding_in_rank_order_takes_what_others_send_of_the_largest_bucket() {
        let ordered = recipe("reduction: ordered");
        let more = |world| {
            let shape = &ModelShape::MISTRAL_7B;
            let memory = Memory::new(&ordered, shape, world, Policy::Lean);
            part(&memory, "gradients of other ranks")
        };
        // That of a block, 235,942,912 numbers.
        let block = 4 * 235_942_912;
        assert_eq!([1, 2, 4].map(more), [0, block / 2, block / 4 * 3]);
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
        assert!(line.starts_with("121.7 GiB"), "{line}");
        assert!(line.contains("fp32 gradients 29.1 GiB, "), "{line}");
        assert!(!line.contains("temporaries"), "{line}");
    }
}
