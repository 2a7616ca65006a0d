//! The two norms: one over the residual stream, one over each head's output.

use tch::{Kind, Tensor};

use super::accumulate_kind;

/// Epsilon of the head norm, whatever the model's own.
pub const HEAD_NORM_EPS: f64 = 1e-5;

/// x / sqrt(mean(x^2) + eps) * gain over the last dimension, rounded to x's kind before the gain is applied (as the
/// base models do).
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: f64) -> Tensor {
    let kind = x.kind();
    let wide = x.to_kind(accumulate_kind(kind));
    let mean_square = wide
        .square()
        .mean_dim([-1i64].as_slice(), true, None::<Kind>);
    (wide * (mean_square + eps).rsqrt()).to_kind(kind) * gain
}

/// (o - mean) / sqrt(biased variance + 1e-5) over the channels of each head, without gain or bias. A head that is all
/// zero stays so.
pub fn head_norm(o_bhte: &Tensor) -> Tensor {
    let channels = o_bhte.size()[3];
    o_bhte.layer_norm(
        [channels].as_slice(),
        None::<&Tensor>,
        None::<&Tensor>,
        HEAD_NORM_EPS,
        false,
    )
}
