//! The fixed evaluation by which two builds prove that they plan alike.

use super::order::Order;
use super::{Digest, Plan, VERSION};

/// BLAKE3 of a fixed evaluation of everything in this module; builds with different digests must not train together.
pub fn probe() -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&VERSION.to_le_bytes());
    // Sizes around every boundary of blocks and pools, each over two passes and a bit.
    for windows in [1, 63, 64, 65, 1024, 1025, 2047, 5000, 100_003] {
        let plan = fixed(windows);
        let stride = (windows / 97).max(1);
        for sample in (0..2 * windows + windows / 2).step_by(stride as usize) {
            hasher.update(&plan.window(sample).to_le_bytes());
            hasher.update(&plan.pool_of(sample).number.to_le_bytes());
        }
        for step in 1..=plan.steps {
            hasher.update(&plan.tokens_after(step).to_le_bytes());
            hasher.update(&plan.learning_rate(step).to_bits().to_le_bytes());
            hasher.update(&[
                u8::from(plan.checkpoint_due(step)),
                u8::from(plan.replica_check_due(step)),
            ]);
            hasher.update(&plan.rank_samples(step, 1, 3).start.to_le_bytes());
        }
    }
    let digest = Digest::of_sample(u64::MAX, &[1, 2, 3]) + Digest::of_sample(7, &[]);
    hasher.update(digest.as_bytes());
    *hasher.finalize().as_bytes()
}

/// A plan that no recipe can change.
fn fixed(windows: u64) -> Plan {
    let (sequence_length, batch_samples, samples) = (128, 24, 1000);
    Plan {
        sequence_length,
        batch_samples,
        samples,
        steps: 42,
        windows,
        order: Order::new(windows, [7; 32], sequence_length, 17),
        lr: 3e-5,
        final_lr: 1e-5,
        warmup_tokens: 10 * batch_samples * sequence_length,
        checkpoint_tokens: 10_000,
        replica_check_steps: 5,
        evaluation_tokens: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Change this digest only together with [`VERSION`].
    #[test]
    fn the_plan_has_not_changed() {
        let digest: String = probe().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            (VERSION, digest.as_str()),
            (
                1,
                "8fd3b0b690e598c051f9c17d81b8e37470dcfe4277ecbe51a3df052cee70a97e"
            )
        );
    }

    #[test]
    fn the_fixed_plan_is_consistent() {
        let plan = fixed(1000);
        assert_eq!(plan.steps, plan.samples.div_ceil(plan.batch_samples));
    }
}
