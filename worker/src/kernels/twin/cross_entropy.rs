//! The loss and its gradient, where the logits were.

use tch::{Kind, Tensor};

use super::wide;

/// With p = softmax(logits) and z the factor of the z-loss: dlogits = p (1 + 2 z logsumexp) - onehot(target).
pub fn cross_entropy(
    logits_cv: &mut Tensor,
    targets_c: &Tensor,
    mask_c: &Tensor,
    z_loss: f64,
    loss_2_sum: &mut Tensor,
) {
    let mut wide_cv = wide(logits_cv);
    let targets_c1 = targets_c.unsqueeze(1);
    let ignored_c = mask_c.logical_not();
    let counts_c = mask_c.to_kind(wide_cv.kind());

    let largest_c1 = wide_cv.amax([1i64].as_slice(), true);
    let chosen_c = wide_cv.gather(1, &targets_c1, false).squeeze_dim(1);
    let _ = wide_cv.g_sub_(&largest_c1).exp_();
    let total_c = wide_cv.sum_dim_intlist([1i64].as_slice(), false, None::<Kind>);
    let normalizer_c = total_c.log() + largest_c1.squeeze_dim(1);

    let sum = |x_c: Tensor| x_c.masked_fill(&ignored_c, 0.0).sum(Kind::Double);
    let entropy = sum(&normalizer_c - chosen_c);
    let squares = sum(normalizer_c.square());
    let _ = loss_2_sum.g_add_(&Tensor::stack(
        &[&entropy, &(&entropy + squares * z_loss)],
        0,
    ));

    let factor_c = (normalizer_c * (2.0 * z_loss) + 1.0) * &counts_c / total_c;
    let _ = wide_cv.g_mul_(&factor_c.unsqueeze(1)).scatter_add_(
        1,
        &targets_c1,
        &counts_c.neg().unsqueeze(1),
    );
    if wide_cv.kind() != logits_cv.kind() {
        logits_cv.copy_(&wide_cv);
    }
}
