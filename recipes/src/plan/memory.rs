//! What a run needs: parameters, memory per rank, bytes on the wire, checkpoint size, arithmetic.
//!
//! Parameter counts are exact. Memory is exact for what training stores whatever the batch (parameters, masters,
//! gradients, moments) and an estimate for what depends on the library's kernels (activations, logits).

use std::fmt;

use serde::Serialize;

pub use super::shape::{ModelShape, ShapeError};
use super::{Plan, PlanError};
use crate::schema::{Attention, Precision, Recipe};

const FP32: u64 = 4;
const BF16: u64 = 2;

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
    /// Workers that share a step.
    pub world: u32,
    /// Forward and backward passes per step on the busiest rank.
    pub micro_batches_per_rank: u64,
    /// Memory of one rank, by component.
    pub memory_per_rank: Vec<Component>,
    /// Sum of `memory_per_rank`.
    pub memory_per_rank_bytes: u64,
    /// Bytes that one rank sends per step: a ring all-reduce of fp32 gradients.
    pub wire_bytes_per_rank_per_step: u64,
    /// Checkpoints written in the whole run.
    pub checkpoints: u64,
    /// Bytes of one checkpoint: fp32 masters and two fp32 moments.
    pub checkpoint_bytes: u64,
    /// Bytes of disk for the checkpoints kept, and the one being written.
    pub checkpoint_disk_bytes: u64,
    /// Floating-point operations per token, forward and backward, without recomputation.
    pub flops_per_token: f64,
}

/// One item of a rank's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Component {
    /// What it holds.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
    /// Whether the size is estimated; otherwise it is exact.
    pub estimate: bool,
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
        let micro_batch = u64::from(recipe.batch.micro_batch)
            .min(rank_samples.end)
            .max(1);
        let memory_per_rank = memory(recipe, shape, parameters, micro_batch);
        let checkpoints = checkpoints(&plan, recipe.checkpoint.every_tokens.0);
        let kept = checkpoints.min(u64::from(recipe.checkpoint.keep) + 1);
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
            world,
            micro_batches_per_rank: rank_samples.end.div_ceil(micro_batch),
            memory_per_rank_bytes: memory_per_rank
                .iter()
                .map(|component| component.bytes)
                .sum(),
            memory_per_rank,
            wire_bytes_per_rank_per_step: 2 * FP32 * parameters * u64::from(world - 1)
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

fn memory(
    recipe: &Recipe,
    shape: &ModelShape,
    parameters: u64,
    micro_batch: u64,
) -> Vec<Component> {
    let exact = |name, bytes| Component {
        name,
        bytes,
        estimate: false,
    };
    let estimate = |name, bytes| Component {
        name,
        bytes,
        estimate: true,
    };
    let tokens = micro_batch * u64::from(recipe.batch.sequence_length);
    let element = if recipe.model.precision == Precision::Bf16 {
        BF16
    } else {
        FP32
    };
    let mut components = Vec::new();
    if recipe.model.precision == Precision::Bf16 {
        components.push(exact("bf16 parameters", BF16 * parameters));
    }
    components.extend([
        exact("fp32 master parameters", FP32 * parameters),
        exact("fp32 gradients", FP32 * parameters),
        exact("fp32 first moments", FP32 * parameters),
        exact("fp32 second moments", FP32 * parameters),
        estimate(
            "activations",
            shape.layers * activations_per_layer(recipe, shape, tokens, element),
        ),
        // Logits in compute precision, then fp32 copy, its log-softmax and the gradient.
        estimate("logits", tokens * shape.vocab * (element + 2 * FP32)),
    ]);
    components
}

/// Bytes that one block keeps for its backward pass, nothing recomputed.
fn activations_per_layer(recipe: &Recipe, shape: &ModelShape, tokens: u64, element: u64) -> u64 {
    let keys = shape.kv_heads * shape.head_dim();
    // Two norms' inputs and outputs, projections to q, k, v, the attention's output, the gated feed-forward part.
    let common = 4 * shape.dim + (shape.dim + 2 * keys) + shape.dim + 4 * shape.ffn;
    let length = u64::from(recipe.batch.sequence_length);
    let attention = match recipe.attention {
        // Feature maps, repeated and rotated q, k, v, and the normalised output.
        Attention::Supra => (shape.dim + keys) + 3 * shape.dim + shape.dim,
        // Rotated q, k, v, and the attention weights of every head.
        Attention::Softmax => 3 * shape.dim + shape.heads * length,
    };
    let states = match recipe.attention {
        // One fp32 state per head at every chunk's entry.
        Attention::Supra => {
            tokens.div_ceil(u64::from(recipe.model.chunk))
                * shape.heads
                * shape.head_dim().pow(2)
                * FP32
        }
        Attention::Softmax => 0,
    };
    tokens * (common + attention) * element + states
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "{name:<26}{value}");
        row(
            "parameters",
            format!(
                "{} ({} new)",
                grouped(self.parameters),
                grouped(self.new_parameters)
            ),
        )?;
        let samples = format!(
            "{} samples of {}",
            grouped(self.samples),
            self.sequence_length
        );
        row("tokens", format!("{} in {samples}", grouped(self.tokens)))?;
        let last = grouped(self.tokens_in_last_step);
        row(
            "steps",
            format!(
                "{} of {} tokens, the last {last}",
                grouped(self.steps),
                grouped(self.tokens_per_step)
            ),
        )?;
        row("warm-up", format!("{} tokens", grouped(self.warmup_tokens)))?;
        row(
            "workers",
            format!(
                "{}, {} micro-batches per step each",
                self.world, self.micro_batches_per_rank
            ),
        )?;
        row("memory per worker", bytes(self.memory_per_rank_bytes))?;
        for component in &self.memory_per_rank {
            let about = if component.estimate {
                " (estimate)"
            } else {
                ""
            };
            row(
                &format!("  {}", component.name),
                format!("{}{about}", bytes(component.bytes)),
            )?;
        }
        row(
            "sent per worker and step",
            bytes(self.wire_bytes_per_rank_per_step),
        )?;
        let disk = bytes(self.checkpoint_disk_bytes);
        row(
            "checkpoints",
            format!(
                "{} of {}, {disk} of disk at most",
                self.checkpoints,
                bytes(self.checkpoint_bytes)
            ),
        )?;
        let total = self.flops_per_token * self.tokens as f64;
        write!(
            f,
            "{:<26}{:.3e} per token, {total:.3e} in all",
            "operations", self.flops_per_token
        )
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size with three significant digits and a power-of-1000 unit.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if count < 1000 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1000.0;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let places = if value < 9.995 {
        2
    } else {
        usize::from(value < 99.95)
    };
    format!("{value:.places$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(text: &str) -> Recipe {
        let head = "name: t\nbase: { path: b }\ndata: { train: d }\n";
        Recipe::parse(&format!("{head}{text}"), "t.yaml").unwrap()
    }

    #[test]
    fn a_billion_parameters_take_eighteen_bytes_each_in_bf16_and_sixteen_in_fp32() {
        let exact = |text: &str| -> u64 {
            let needs = Needs::new(&recipe(text), &ModelShape::MISTRAL_7B, 1).unwrap();
            needs
                .memory_per_rank
                .iter()
                .filter(|component| !component.estimate)
                .map(|component| component.bytes)
                .sum()
        };
        let parameters = 7_812_321_280;
        assert_eq!(exact("budget: { tokens: 20B }"), 18 * parameters);
        assert_eq!(
            exact("budget: { tokens: 20B }\nmodel: { precision: fp32 }"),
            16 * parameters
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
                due,
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
    fn a_ring_of_one_sends_nothing_and_a_long_ring_twice_the_gradients() {
        let recipe = recipe("budget: { tokens: 20B }");
        let sent = |world| {
            Needs::new(&recipe, &ModelShape::MISTRAL_7B, world)
                .unwrap()
                .wire_bytes_per_rank_per_step
        };
        assert_eq!((sent(1), sent(2)), (0, 4 * 7_812_321_280));
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(7_812_321_280), "7,812,321,280");
        assert_eq!(
            (bytes(999).as_str(), bytes(1_000).as_str()),
            ("999 B", "1.00 kB")
        );
        assert_eq!(
            (bytes(31_249_285_120).as_str(), bytes(999_600).as_str()),
            ("31.2 GB", "1.00 MB")
        );
    }
}
