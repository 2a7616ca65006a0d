//! What a run needs: parameters, memory per rank, bytes on the wire, checkpoint size, arithmetic.

use serde::Serialize;

use super::memory::{self, CARDS, Card, Memory};
use super::sizes::element;
use super::{CheckpointCopy, ModelShape, Plan, PlanError, Policy, Snapshots};
use crate::schema::{Attention, Recipe, Sharding, Tokens};

const FP32: u64 = 4;

/// What a recipe needs on a model of a given shape, with a given number of workers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Needs {
    /// Parameters of the trained model.
    pub parameters: u64,
    /// Those that the softmax base does not have.
    pub new_parameters: u64,
    /// Tokens that are trained: the budget cut to whole samples.
    pub tokens: u64,
    /// Tokens of the budget that no whole sample takes.
    pub tokens_left_over: u64,
    /// Samples of `sequence_length` tokens.
    pub samples: u64,
    /// Tokens per sample.
    pub sequence_length: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens per full step.
    pub tokens_per_step: u64,
    /// Tokens of the last step.
    pub tokens_in_last_step: u64,
    /// Tokens of warm-up.
    pub warmup_tokens: u64,
    /// Forward and backward passes per step on the busiest rank.
    pub micro_batches_per_rank: u64,
    /// What a rank holds.
    #[serde(flatten)]
    pub rank: Rank,
    /// The same with other numbers of workers: 1, 2, 4 and 8, as far as a step has samples for them.
    pub by_workers: Vec<Rank>,
    /// Bytes that one rank sends per step: the fp32 gradients, scattered and gathered around a ring; with
    /// `sharding: zero1` parameters are gathered instead.
    pub wire_bytes_per_rank_per_step: u64,
    /// Checkpoints written in the whole run; none when the coordinator decides how many.
    pub checkpoints: Option<u64>,
    /// Bytes of one checkpoint: fp32 masters and two fp32 moments.
    pub checkpoint_bytes: u64,
    /// Bytes of disk for the checkpoints kept, the one being written, and one that goes when the newest is verified.
    pub checkpoint_disk_bytes: u64,
    /// Floating-point operations per token, forward and backward, without recomputation.
    pub flops_per_token: f64,
}

/// Whether a rank fits a GPU, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// The GPU.
    #[serde(flatten)]
    pub card: Card,
    /// The policy that is taken on it; none: nothing that the recipe allows fits.
    pub policy: Option<Policy>,
}

/// What one of so many ranks holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rank {
    /// Workers that share a step.
    pub world: u32,
    /// Memory of one rank, for every policy.
    pub memory_per_rank: [Memory; 3],
    /// Host memory of one rank that the copy takes from which a checkpoint is written.
    pub checkpoint_copy_per_rank: CheckpointCopy,
    /// Host memory of one rank that snapshots take.
    pub snapshots_per_rank: Snapshots,
    /// What the recipe's choice of activations comes to on GPUs of usual sizes.
    pub cards: [Fit; 2],
}

impl Rank {
    fn new(recipe: &Recipe, shape: &ModelShape, world: u32) -> Rank {
        let memory_per_rank = Memory::of_all(recipe, shape, world);
        let cards = CARDS.map(|card| Fit {
            card,
            policy: memory::fitting(&memory_per_rank, recipe, card.bytes).map(|plan| plan.policy),
        });
        Rank {
            world,
            memory_per_rank,
            checkpoint_copy_per_rank: CheckpointCopy::new(recipe, shape, world),
            snapshots_per_rank: Snapshots::new(recipe, shape, world),
            cards,
        }
    }
}

impl Needs {
    /// Evaluates `recipe` on `shape` for `world` workers.
    ///
    /// # Errors
    /// When the budget is smaller than one sample.
    pub fn new(recipe: &Recipe, shape: &ModelShape, world: u32) -> Result<Needs, PlanError> {
        // How much there is to train does not depend on the data, so any dataset that is large enough serves.
        let plan = Plan::new(recipe, u64::MAX, [0; 32])?;
        let world = world.max(1);
        let parameters = shape.parameters(recipe.attention, recipe.model.qk_norm);
        let checkpoint_bytes = 3 * FP32 * parameters;
        let rank_samples = plan.rank_samples(1, 0, world);
        let micro_batch = memory::rows(recipe, world);
        let shared = |world: &u32| u64::from(*world) <= plan.batch_samples;
        let by_workers = [1, 2, 4, 8].into_iter().filter(shared);
        let gathered = match recipe.optimizer.sharding {
            Sharding::None => FP32,
            Sharding::Zero1 => element(recipe.model.precision) as u64,
        };
        let every = recipe.checkpoint.every_tokens.tokens();
        let checkpoints = every.map(|every| checkpoints(&plan, every));
        let most = checkpoints.unwrap_or(plan.steps);
        // One more is being written, and one may wait until the newest is verified.
        let newest = u64::from(recipe.checkpoint.keep) + 2;
        let every = recipe.checkpoint.keep_every.map_or(0, Tokens::get);
        let for_ever = plan.tokens_after(plan.steps).checked_div(every);
        let kept = most.min(newest.saturating_add(for_ever.unwrap_or(0)));
        Ok(Needs {
            parameters,
            new_parameters: parameters - shape.parameters(Attention::Softmax, false),
            tokens: plan.tokens_after(plan.steps),
            tokens_left_over: recipe.budget.tokens() % plan.sequence_length,
            samples: plan.samples,
            sequence_length: plan.sequence_length,
            steps: plan.steps,
            tokens_per_step: plan.batch_samples * plan.sequence_length,
            tokens_in_last_step: plan.tokens_after(plan.steps) - plan.tokens_after(plan.steps - 1),
            warmup_tokens: plan.warmup_tokens,
            micro_batches_per_rank: rank_samples.end.div_ceil(micro_batch),
            rank: Rank::new(recipe, shape, world),
            by_workers: by_workers
                .map(|world| Rank::new(recipe, shape, world))
                .collect(),
            wire_bytes_per_rank_per_step: (FP32 + gathered) * parameters * u64::from(world - 1)
                / u64::from(world),
            checkpoints,
            checkpoint_bytes,
            checkpoint_disk_bytes: checkpoint_bytes * kept,
            flops_per_token: shape.flops_per_token(
                recipe.attention,
                u64::from(recipe.batch.sequence_length),
                u64::from(recipe.model.chunk),
            ),
        })
    }
}

/// Steps at which [`Plan::checkpoint_due`] holds: one per multiple of `every`, at most one per step, and the last.
fn checkpoints(plan: &Plan, every: u64) -> u64 {
    let step_tokens = plan.batch_samples * plan.sequence_length;
    if every <= step_tokens {
        return plan.steps;
    }
    plan.tokens_after(plan.steps - 1) / every + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Recipe {
        let head = "name: t\nbase: { path: b }\ndata: { train: d }\n";
        Recipe::parse(&format!("{head}{text}"), "t.yaml").unwrap()
    }

    #[test]
    fn each_card_is_told_what_it_holds() {
        let taken = |text: &str| {
            let needs = Needs::new(&recipe(text), &ModelShape::MISTRAL_7B, 1).unwrap();
            needs.rank.cards.map(|fit| fit.policy)
        };
        let budget = "budget: { tokens: 20B }\n";
        assert_eq!(taken(budget), [None, Some(Policy::Recompute)]);
        assert_eq!(
            taken(&format!("{budget}batch: {{ activations: save }}")),
            [None; 2]
        );
    }

    #[test]
    fn steps_and_tokens_are_the_plans() {
        let needs = Needs::new(
            &recipe("budget: { pretraining_tokens: 2T }"),
            &ModelShape::MISTRAL_7B,
            128,
        )
        .unwrap();
        assert_eq!(needs.tokens + needs.tokens_left_over, 100_000_000_000);
        assert_eq!((needs.steps, needs.samples), (47_684, 48_828_125));
        assert_eq!(needs.tokens_in_last_step, needs.tokens - 47_683 * (2 << 20));
        assert_eq!(
            (needs.micro_batches_per_rank, needs.new_parameters),
            (2, 570_589_184)
        );
    }

    #[test]
    fn the_checkpoints_counted_are_those_that_are_due() {
        for every in ["1k", "8Ki", "10k", "100k", "1B"] {
            let text = format!(
                "budget: {{ tokens: 300k }}\nbatch: {{ tokens: 8Ki }}\noptimizer: {{ warmup: 1 step }}\ncheckpoint: {{ every_tokens: {every} }}"
            );
            let recipe = recipe(&text);
            let plan = Plan::new(&recipe, u64::MAX, [0; 32]).unwrap();
            let due = (1..=plan.steps)
                .filter(|step| plan.checkpoint_due(*step))
                .count() as u64;
            assert_eq!(
                Needs::new(&recipe, &ModelShape::MISTRAL_7B, 1)
                    .unwrap()
                    .checkpoints,
                Some(due),
                "every {every}"
            );
        }
    }

    #[test]
    fn supra_on_mistral_takes_46_gflop_per_token() {
        let needs = Needs::new(
            &recipe("budget: { tokens: 20B }"),
            &ModelShape::MISTRAL_7B,
            1,
        )
        .unwrap();
        assert!(
            (needs.flops_per_token - 46.4e9).abs() < 0.05e9,
            "{}",
            needs.flops_per_token
        );
    }

    #[test]
    fn a_ring_of_one_sends_nothing_and_a_long_ring_gradients_and_what_is_gathered() {
        let sent = |optimizer: &str, world| {
            let recipe = recipe(&format!("budget: {{ tokens: 20B }}\n{optimizer}"));
            let needs = Needs::new(&recipe, &ModelShape::MISTRAL_7B, world).unwrap();
            needs.wire_bytes_per_rank_per_step
        };
        let parameters = 7_812_321_280;
        assert_eq!([1, 2].map(|world| sent("", world)), [0, 4 * parameters]);
        let zero1 = "optimizer: { sharding: zero1 }";
        assert_eq!([1, 2].map(|world| sent(zero1, world)), [0, 3 * parameters]);
    }

    #[test]
    fn more_ranks_hold_less_each_where_the_optimizer_is_sharded() {
        let text = "budget: { tokens: 20B }\noptimizer: { sharding: zero1 }";
        let needs = Needs::new(&recipe(text), &ModelShape::MISTRAL_7B, 3).unwrap();
        assert_eq!(needs.rank.world, 3);
        let ranks = needs.by_workers.iter();
        let taken: Vec<_> = ranks
            .map(|rank| (rank.world, rank.cards.map(|fit| fit.policy)))
            .collect();
        let [recompute, save] = [Policy::Recompute, Policy::Save].map(Some);
        let expected = [
            (1, [None, recompute]),
            (2, [None, save]),
            (4, [recompute, save]),
            (8, [recompute, save]),
        ];
        assert_eq!(taken, expected);
        let few = format!("{text}\nbatch: {{ tokens: 4Ki }}");
        let needs = Needs::new(&recipe(&few), &ModelShape::MISTRAL_7B, 1).unwrap();
        assert_eq!(needs.by_workers.len(), 2, "a step has two samples");
    }
}
