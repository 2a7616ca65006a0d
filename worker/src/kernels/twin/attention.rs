//! Linear attention by chunks, as batched matrix products (see [`Chunkwise`](crate::model::attention::chunkwise)).

use tch::{Kind, Tensor};

use crate::{
    kernels::DecayTables,
    model::attention::{features::repeat_heads, ragged::Piece},
};

pub fn linear_attention(
    decay: &DecayTables,
    q_bhtd: &Tensor,
    k_bktd: &Tensor,
    v_bktd: &Tensor,
    o_bhtd: &mut Tensor,
) {
    let heads = q_bhtd.size()[1];
    let [k_bhtd, v_bhtd] = [k_bktd, v_bktd].map(|x| repeat_heads(x, heads));
    o_bhtd.copy_(&decay.chunkwise().mix(q_bhtd, &k_bhtd, &v_bhtd));
}

pub fn linear_attention_from(
    decay: &DecayTables,
    qkv: [&Tensor; 3],
    state: &mut Tensor,
    o: &mut Tensor,
) {
    decay.chunkwise().go_on(Piece { qkv, state, o });
}

pub fn linear_attention_backward(
    decay: &DecayTables,
    [q_bhtd, k_bktd, v_bktd]: [&Tensor; 3],
    do_bhtd: &Tensor,
    [dq_bhtd, dk_bktd, dv_bktd]: [&mut Tensor; 3],
) {
    let heads = q_bhtd.size()[1];
    let [k_bhtd, v_bhtd] = [k_bktd, v_bktd].map(|x| repeat_heads(x, heads));
    let [dq, dk, dv] = decay
        .chunkwise()
        .mix_backward([q_bhtd, &k_bhtd, &v_bhtd], do_bhtd);
    dq_bhtd.copy_(&dq);
    sum_heads(&dk, dk_bktd);
    sum_heads(&dv, dv_bktd);
}

/// The way back from [`repeat_heads`]: [B, H, T, d] summed into [B, K, T, d].
fn sum_heads(x_bhtd: &Tensor, out_bktd: &mut Tensor) {
    if out_bktd.size() == x_bhtd.size() {
        out_bktd.copy_(x_bhtd);
    } else {
        let groups = x_bhtd.unflatten(1, [out_bktd.size()[1], -1].as_slice());
        out_bktd.copy_(&groups.sum_dim_intlist([2i64].as_slice(), false, None::<Kind>));
    }
}
