//! The core of softmax attention: libtorch's fused one, which also knows its own backward pass.

use tch::{Kind, Tensor};

use crate::model::attention::{features::repeat_heads, softmax::Mask};

/// `o_bhtd` of q [B, H, T, d] and k, v [B, K, T, d].
pub fn attend(mask: &Mask, qkv: [&Tensor; 3], o_bhtd: &mut Tensor) {
    o_bhtd.copy_(&mixed(mask, qkv));
}

/// Its gradients, by libtorch's autograd over nothing but the core, which is computed again.
pub fn attend_backward(mask: &Mask, qkv: [&Tensor; 3], do_bhtd: &Tensor, dqkv: [&mut Tensor; 3]) {
    let leaves = qkv.map(|x| x.detach().set_requires_grad(true));
    let gradients = tch::with_grad(|| {
        let o_bhtd = mixed(mask, leaves.each_ref());
        // The gradient of this sum with respect to o is `do_bhtd`, exactly.
        let objective = (o_bhtd * do_bhtd).sum(None::<Kind>);
        Tensor::run_backward(&[objective], &leaves, false, false)
    });
    for (out, gradient) in dqkv.into_iter().zip(gradients) {
        out.copy_(&gradient);
    }
}

/// Rows [n, H d] as a view [B, H, T, d], shaped like `o_bhtd`.
pub fn by_heads(x_nx: &Tensor, o_bhtd: &Tensor) -> Tensor {
    let size = o_bhtd.size();
    x_nx.view([size[0], size[2], size[1], size[3]])
        .transpose(1, 2)
}

fn mixed(mask: &Mask, [q_bhtd, k_bktd, v_bktd]: [&Tensor; 3]) -> Tensor {
    let heads = q_bhtd.size()[1];
    mask.mix(
        q_bhtd,
        &repeat_heads(k_bktd, heads),
        &repeat_heads(v_bktd, heads),
    )
}
