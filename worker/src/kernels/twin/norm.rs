//! The two norms, with the residual sum before one and the change of layout after the other.

use tch::{Kind, Tensor};

use super::{heads_first, rounded, wide};
use crate::{
    kernels::{Delta, NormOut},
    model::norm::HEAD_NORM_EPS,
};

pub fn add_rms_norm(
    x_nd: &Tensor,
    delta: Option<Delta<'_>>,
    gain_d: &Tensor,
    eps: f64,
    out: NormOut<'_>,
) {
    let stream_nd = match delta {
        None => x_nd.shallow_clone(),
        Some(Delta { delta_nd, sum_nd }) => x_nd.add_out(sum_nd, delta_nd),
    };
    let dim = stream_nd.size()[1] as f64;
    let mut norm_n = wide(&stream_nd).norm_scalaropt_dim(2, [-1i64].as_slice(), false);
    let mut mean_square_n = norm_n.square_().g_div_scalar_(dim);
    out.rstd_n.copy_(&mean_square_n.g_add_scalar_(eps).rsqrt_());
    rms_norm_again(&stream_nd, out.rstd_n, gain_d, out.normed_nd);
}

pub fn rms_norm_again(x_nd: &Tensor, rstd_n: &Tensor, gain_d: &Tensor, normed_nd: &mut Tensor) {
    // The product is computed in the wider kind of the two and rounded on its way out.
    let _ = x_nd.mul_out(normed_nd, &rstd_n.unsqueeze(1));
    let _ = normed_nd.g_mul_(gain_d);
}

/// With g = dnormed * gain: dx += g rstd - x rstd^3 mean(g x), dgain += sum over tokens of dnormed x rstd.
pub fn rms_norm_backward(
    dnormed_nd: &Tensor,
    x_nd: &Tensor,
    rstd_n: &Tensor,
    gain_d: &Tensor,
    dx_nd_sum: &mut Tensor,
    dgain_d_sum: &mut Tensor,
) {
    let (dnormed_nd, x_nd, gain_d) = (wide(dnormed_nd), wide(x_nd), wide(gain_d));
    let product_nd = &dnormed_nd * &x_nd;
    let _ = dgain_d_sum.addmv_(&product_nd.tr(), rstd_n);
    let pull_n = product_nd.mv(&gain_d) * rstd_n.pow_tensor_scalar(3) / -(gain_d.numel() as f64);
    // The product has served: its memory takes the gradient.
    let mut through_nd = product_nd;
    let _ = dnormed_nd.mul_out(&through_nd, &gain_d);
    let _ = through_nd
        .g_mul_(&rstd_n.unsqueeze(1))
        .addcmul_(&x_nd, &pull_n.unsqueeze(1));
    let _ = dx_nd_sum.g_add_(&through_nd);
}

pub fn head_norm(o_bhtd: &Tensor, out_nx: &mut Tensor) {
    let (normed_bhtd, _) = standardised(o_bhtd);
    let size = o_bhtd.size();
    heads_first(out_nx, size[0], size[1]).copy_(&normed_bhtd);
}

/// With y the normed head and r its 1 / sqrt(variance + eps): do = r (dy - mean(dy) - y mean(dy y)).
pub fn head_norm_backward(dout_nx: &Tensor, o_bhtd: &Tensor, do_bhtd: &mut Tensor) {
    let (y_bhtd, rstd_bht1) = standardised(o_bhtd);
    let size = o_bhtd.size();
    let dout_bhtd = heads_first(dout_nx, size[0], size[1]);
    let mean = |x: &Tensor| x.mean_dim([-1i64].as_slice(), true, None::<Kind>);
    rounded(do_bhtd, |do_bhtd| {
        do_bhtd.copy_(&dout_bhtd);
        let pull_bht1 = mean(&(&*do_bhtd * &y_bhtd)).neg_();
        let mean_bht1 = mean(do_bhtd);
        let _ = do_bhtd
            .g_sub_(&mean_bht1)
            .addcmul_(&y_bhtd, &pull_bht1)
            .g_mul_(&rstd_bht1);
    });
}

/// Each head to mean 0 and variance 1, and the factor that its variance took: wide.
fn standardised(o_bhtd: &Tensor) -> (Tensor, Tensor) {
    let channels = o_bhtd.size()[3];
    let none = None::<&Tensor>;
    let (normed_bhtd, _, rstd_bht1) =
        wide(o_bhtd).native_layer_norm([channels].as_slice(), none, none, HEAD_NORM_EPS);
    (normed_bhtd, rstd_bht1)
}
