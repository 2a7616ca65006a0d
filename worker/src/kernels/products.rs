//! The three matrix products of a linear layer, y = x W^T with W [out, in], into buffers that are there.
//!
//! Rows may be strided: slices of wider matrices go in and out without a copy.

use tch::{Kind, Tensor};

/// `y_no` = x W^T.
pub fn linear(x_ni: &Tensor, weight_oi: &Tensor, y_no: &Tensor) {
    let _ = x_ni.mm_out(y_no, &weight_oi.tr());
}

/// `dx_ni` = dy W.
pub fn input_gradient(dy_no: &Tensor, weight_oi: &Tensor, dx_ni: &Tensor) {
    let _ = dy_no.mm_out(dx_ni, weight_oi);
}

/// dW += dy^T x, summed in the kind of `dweight_oi_sum`.
pub fn weight_gradient(dy_no: &Tensor, x_ni: &Tensor, dweight_oi_sum: &Tensor) {
    let (dy_on, mut sum) = (dy_no.tr(), dweight_oi_sum.shallow_clone());
    if x_ni.kind() == sum.kind() {
        let _ = sum.addmm_(&dy_on, x_ni);
    } else if x_ni.device().is_cuda() {
        // bf16 operands straight into the fp32 sum. Were it another tensor on the same storage, libtorch would copy it.
        let _ = sum.addmm_dtype_out(&sum, &dy_on, x_ni, Kind::Float);
    } else {
        let _ = sum.g_add_(&dy_on.mm(x_ni));
    }
}
