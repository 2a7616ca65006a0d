//! The contract in plain libtorch, for any device and any kind of numbers.
//!
//! Written for few passes over memory: results go into the caller's buffers and temporaries are reused in place.

mod attention;
mod cross_entropy;
mod heads;
mod norm;
mod optimizer;
mod state;
mod swiglu;
#[cfg(test)]
mod tests;

pub use state::{join, split};
use tch::Tensor;

use super::{DecayTables, Delta, HeadsGrad, HeadsIn, KernelError, Kernels, NormOut, Shard, Update};
use crate::model::accumulate_kind;

/// libtorch's way of doing it.
pub struct Twin;

impl Kernels for Twin {
    fn add_rms_norm(
        &self,
        x_nd: &Tensor,
        delta: Option<Delta<'_>>,
        gain_d: &Tensor,
        eps: f64,
        out: NormOut<'_>,
    ) {
        norm::add_rms_norm(x_nd, delta, gain_d, eps, out);
    }

    fn rms_norm_again(
        &self,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        normed_nd: &mut Tensor,
    ) {
        norm::rms_norm_again(x_nd, rstd_n, gain_d, normed_nd);
    }

    fn rms_norm_backward(
        &self,
        dnormed_nd: &Tensor,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        dx_nd_sum: &mut Tensor,
        dgain_d_sum: &mut Tensor,
    ) {
        norm::rms_norm_backward(dnormed_nd, x_nd, rstd_n, gain_d, dx_nd_sum, dgain_d_sum);
    }

    fn heads(
        &self,
        input: &HeadsIn<'_>,
        q_bhtd: &mut Tensor,
        k_bktd: &mut Tensor,
        v_bktd: &mut Tensor,
    ) {
        heads::heads(input, q_bhtd, k_bktd, v_bktd);
    }

    fn heads_backward(
        &self,
        input: &HeadsIn<'_>,
        dq_bhtd: &Tensor,
        dk_bktd: &Tensor,
        dv_bktd: &Tensor,
        out: HeadsGrad<'_>,
    ) {
        heads::heads_backward(input, dq_bhtd, dk_bktd, dv_bktd, out);
    }

    fn linear_attention(
        &self,
        decay: &DecayTables,
        q_bhtd: &Tensor,
        k_bktd: &Tensor,
        v_bktd: &Tensor,
        o_bhtd: &mut Tensor,
    ) {
        attention::linear_attention(decay, q_bhtd, k_bktd, v_bktd, o_bhtd);
    }

    fn linear_attention_from(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        state_bhde: &mut Tensor,
        o_bhtd: &mut Tensor,
    ) {
        attention::linear_attention_from(decay, qkv, state_bhde, o_bhtd);
    }

    fn linear_attention_backward(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        do_bhtd: &Tensor,
        dqkv: [&mut Tensor; 3],
    ) {
        attention::linear_attention_backward(decay, qkv, do_bhtd, dqkv);
    }

    fn head_norm(&self, o_bhtd: &Tensor, out_nx: &mut Tensor) {
        norm::head_norm(o_bhtd, out_nx);
    }

    fn head_norm_backward(&self, dout_nx: &Tensor, o_bhtd: &Tensor, do_bhtd: &mut Tensor) {
        norm::head_norm_backward(dout_nx, o_bhtd, do_bhtd);
    }

    fn swiglu(&self, gate_up_nx: &Tensor, out_nf: &mut Tensor) {
        swiglu::swiglu(gate_up_nx, out_nf);
    }

    fn swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
        out_nf: Option<&mut Tensor>,
    ) {
        swiglu::swiglu_backward(gate_up_nx, dout_nf, out_nf);
    }

    fn cross_entropy(
        &self,
        logits_cv: &mut Tensor,
        targets_c: &Tensor,
        mask_c: &Tensor,
        z_loss: f64,
        loss_2_sum: &mut Tensor,
    ) {
        cross_entropy::cross_entropy(logits_cv, targets_c, mask_c, z_loss, loss_2_sum);
    }

    fn embedding_backward(&self, dx_nd: &Tensor, ids_n: &Tensor, dembedding_vd_sum: &mut Tensor) {
        // Unlike index_add_ it has the same bits every time on a GPU, too.
        let vocabulary = dembedding_vd_sum.size()[0];
        let dembedding_vd =
            Tensor::embedding_dense_backward(&wide(dx_nd), ids_n, vocabulary, -1, false);
        let _ = dembedding_vd_sum.g_add_(&dembedding_vd);
    }

    fn squared_norm(&self, flats_m: &[Tensor]) -> f64 {
        optimizer::squared_norm(flats_m)
    }

    fn adamw(&self, shard: Shard<'_>, update: &Update) {
        optimizer::adamw(shard, update);
    }

    fn fingerprint(&self, flat_m: &Tensor, first: i64, key: u64) -> Result<[u64; 4], KernelError> {
        state::fingerprint(flat_m, first, key)
    }

    fn check(&self) -> Result<(), KernelError> {
        Ok(())
    }
}

/// The tensor in the kind in which sums are made.
fn wide(x: &Tensor) -> Tensor {
    x.to_kind(accumulate_kind(x.kind()))
}

/// Lets `write` fill `out`, or, where `out` is of a narrower kind, a wide one of its shape that is then rounded once.
fn rounded(out: &mut Tensor, write: impl FnOnce(&mut Tensor)) {
    let kind = accumulate_kind(out.kind());
    if out.kind() == kind {
        return write(out);
    }
    let mut wide = Tensor::empty(out.size(), (kind, out.device()));
    write(&mut wide);
    out.copy_(&wide);
}

/// Rows [B T, heads d], strided or not, as a view [B, heads, T, d].
fn heads_first(x_nx: &Tensor, batch: i64, heads: i64) -> Tensor {
    let (n, row) = (x_nx.size()[0], x_nx.size()[1]);
    x_nx.view([batch, n / batch, heads, row / heads])
        .transpose(1, 2)
}
