//! The training loss: summed, never a mean of means.

use tch::{Kind, Tensor};

use super::{Documents, accumulate_kind};

/// One micro-batch.
#[derive(Debug)]
pub struct LossInput {
    /// i64 [B, T].
    pub inputs_bt: Tensor,
    /// The token after each input: i64 [B, T].
    pub targets_bt: Tensor,
    /// bool [B, T]: whether the target counts.
    pub mask_bt: Tensor,
    /// Packed documents, if attention is to stop at their borders.
    pub documents: Option<Documents>,
}

/// Sums over the targets that count: 0-dimensional, fp32 (fp64 for an fp64 model).
#[derive(Debug)]
pub struct LossSum {
    /// Cross-entropy plus z-loss: what to differentiate.
    pub objective: Tensor,
    /// Cross-entropy alone, in nats: what to report. Without gradient.
    pub cross_entropy: Tensor,
    /// How many targets count: i64. Divide by the sum of it over all micro-batches and ranks.
    pub targets: Tensor,
}

/// Sum of -log softmax(logits)[target], plus `z_loss` times the sum of logsumexp(logits)^2.
pub fn loss_sum(
    logits_btv: &Tensor,
    targets_bt: &Tensor,
    mask_bt: &Tensor,
    z_loss: f64,
) -> LossSum {
    let logits_btv = logits_btv.to_kind(accumulate_kind(logits_btv.kind()));
    let normalizer_bt = logits_btv.logsumexp([-1i64].as_slice(), false);
    let chosen_bt = logits_btv
        .gather(-1, &targets_bt.unsqueeze(-1), false)
        .squeeze_dim(-1);
    let ignored_bt = mask_bt.logical_not();
    let sum = |x_bt: &Tensor| x_bt.masked_fill(&ignored_bt, 0.0).sum(None::<Kind>);
    let cross_entropy = sum(&(&normalizer_bt - chosen_bt));
    let objective = if z_loss == 0.0 {
        cross_entropy.shallow_clone()
    } else {
        &cross_entropy + sum(&normalizer_bt.square()) * z_loss
    };
    LossSum {
        objective,
        cross_entropy: cross_entropy.detach(),
        targets: mask_bt.sum(Kind::Int64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_targets_and_z_loss() {
        let logits = Tensor::from_slice(&[0.0f64, 0.0, 1.0, 3.0])
            .view([1, 2, 2])
            .set_requires_grad(true);
        let targets = Tensor::from_slice(&[1i64, 0]).view([1, 2]);
        let mask = Tensor::from_slice(&[true, false]).view([1, 2]);
        let loss = loss_sum(&logits, &targets, &mask, 0.5);
        let ln2 = 2f64.ln();
        assert!((loss.cross_entropy.double_value(&[]) - ln2).abs() < 1e-15);
        assert!((loss.objective.double_value(&[]) - (ln2 + 0.5 * ln2 * ln2)).abs() < 1e-15);
        assert_eq!(loss.targets.int64_value(&[]), 1);
        loss.objective.backward();
        let gradient = logits.grad();
        assert_eq!(gradient.double_value(&[0, 1, 0]), 0.0);
        assert!((gradient.double_value(&[0, 0, 1]) - (-0.5 + 0.5 * ln2)).abs() < 1e-15);
    }
}
