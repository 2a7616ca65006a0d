//! A device that computes wrong: kernels that write a NaN now and then.

use std::{cell::Cell, rc::Rc};

use supra_worker::kernels::{
    DecayTables, Delta, HeadsGrad, HeadsIn, KernelError, Kernels, NormOut, Shard, Update,
};
use tch::{Kind, Tensor};

/// Which calls of other kernels are spoilt. They are counted from 1, each kind by itself.
#[derive(Clone, Copy)]
pub struct Spoilt {
    /// The loss is not a number; there is one call per micro-batch.
    pub loss: fn(u64) -> bool,
    /// The gradient of the embedding is not a number; as often.
    pub gradient: fn(u64) -> bool,
    /// A bit of a parameter is flipped; one call per bucket in every update.
    pub parameter: fn(u64) -> bool,
}

impl Spoilt {
    /// None.
    pub const NONE: Spoilt = Spoilt {
        loss: |_| false,
        gradient: |_| false,
        parameter: |_| false,
    };

    /// Kernels that let `inner` work and spoil these calls.
    pub fn kernels(self, inner: Rc<dyn Kernels>) -> Rc<dyn Kernels> {
        Rc::new(Broken {
            inner,
            spoilt: self,
            losses: Cell::new(0),
            gradients: Cell::new(0),
            parameters: Cell::new(0),
        })
    }
}

struct Broken {
    inner: Rc<dyn Kernels>,
    spoilt: Spoilt,
    losses: Cell<u64>,
    gradients: Cell<u64>,
    parameters: Cell<u64>,
}

fn next(counter: &Cell<u64>) -> u64 {
    counter.set(counter.get() + 1);
    counter.get()
}

impl Kernels for Broken {
    fn cross_entropy(
        &self,
        logits_cv: &mut Tensor,
        targets_c: &Tensor,
        mask_c: &Tensor,
        z_loss: f64,
        loss_2_sum: &mut Tensor,
    ) {
        self.inner
            .cross_entropy(logits_cv, targets_c, mask_c, z_loss, loss_2_sum);
        if (self.spoilt.loss)(next(&self.losses)) {
            let _ = loss_2_sum.fill_(f64::NAN);
        }
    }

    fn embedding_backward(&self, dx_nd: &Tensor, ids_n: &Tensor, dembedding_vd_sum: &mut Tensor) {
        self.inner
            .embedding_backward(dx_nd, ids_n, dembedding_vd_sum);
        if (self.spoilt.gradient)(next(&self.gradients)) {
            let _ = dembedding_vd_sum.get(0).fill_(f64::NAN);
        }
    }

    fn linear(&self, x_ni: &Tensor, weight_oi: &Tensor, y_no: &Tensor) {
        self.inner.linear(x_ni, weight_oi, y_no);
    }

    fn linear_input_gradient(&self, dy_no: &Tensor, weight_oi: &Tensor, dx_ni: &Tensor) {
        self.inner.linear_input_gradient(dy_no, weight_oi, dx_ni);
    }

    fn linear_weight_gradient(&self, dy_no: &Tensor, x_ni: &Tensor, dweight_oi_sum: &Tensor) {
        self.inner
            .linear_weight_gradient(dy_no, x_ni, dweight_oi_sum);
    }

    fn add_rms_norm(
        &self,
        x_nd: &Tensor,
        delta: Option<Delta<'_>>,
        gain_d: &Tensor,
        eps: f64,
        out: NormOut<'_>,
    ) {
        self.inner.add_rms_norm(x_nd, delta, gain_d, eps, out);
    }

    fn rms_norm_again(
        &self,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        normed_nd: &mut Tensor,
    ) {
        self.inner.rms_norm_again(x_nd, rstd_n, gain_d, normed_nd);
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
        self.inner
            .rms_norm_backward(dnormed_nd, x_nd, rstd_n, gain_d, dx_nd_sum, dgain_d_sum);
    }

    fn heads(
        &self,
        input: &HeadsIn<'_>,
        q_bhtd: &mut Tensor,
        k_bktd: &mut Tensor,
        v_bktd: &mut Tensor,
    ) {
        self.inner.heads(input, q_bhtd, k_bktd, v_bktd);
    }

    fn heads_backward(
        &self,
        input: &HeadsIn<'_>,
        dq_bhtd: &Tensor,
        dk_bktd: &Tensor,
        dv_bktd: &Tensor,
        out: HeadsGrad<'_>,
    ) {
        self.inner
            .heads_backward(input, dq_bhtd, dk_bktd, dv_bktd, out);
    }

    fn linear_attention(
        &self,
        decay: &DecayTables,
        q_bhtd: &Tensor,
        k_bktd: &Tensor,
        v_bktd: &Tensor,
        o_bhtd: &mut Tensor,
    ) {
        self.inner
            .linear_attention(decay, q_bhtd, k_bktd, v_bktd, o_bhtd);
    }

    fn linear_attention_from(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        state_bhde: &mut Tensor,
        o_bhtd: &mut Tensor,
    ) {
        self.inner
            .linear_attention_from(decay, qkv, state_bhde, o_bhtd);
    }

    fn linear_attention_backward(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        do_bhtd: &Tensor,
        dqkv: [&mut Tensor; 3],
    ) {
        self.inner
            .linear_attention_backward(decay, qkv, do_bhtd, dqkv);
    }

    fn head_norm(&self, o_bhtd: &Tensor, out_nx: &mut Tensor) {
        self.inner.head_norm(o_bhtd, out_nx);
    }

    fn head_norm_backward(&self, dout_nx: &Tensor, o_bhtd: &Tensor, do_bhtd: &mut Tensor) {
        self.inner.head_norm_backward(dout_nx, o_bhtd, do_bhtd);
    }

    fn swiglu(&self, gate_up_nx: &Tensor, out_nf: &mut Tensor) {
        self.inner.swiglu(gate_up_nx, out_nf);
    }

    fn swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
        out_nf: Option<&mut Tensor>,
    ) {
        self.inner.swiglu_backward(gate_up_nx, dout_nf, out_nf);
    }

    fn squared_norm(&self, flats_m: &[Tensor]) -> f64 {
        self.inner.squared_norm(flats_m)
    }

    fn adamw(&self, shard: Shard<'_>, update: &Update) {
        let parameters = shard.param_m.shallow_clone();
        self.inner.adamw(shard, update);
        if (self.spoilt.parameter)(next(&self.parameters)) {
            let mut bits = parameters.narrow(0, 0, 1).view_dtype(Kind::Int);
            let _ = bits.bitwise_xor_tensor_(&Tensor::from(1i32));
        }
    }

    fn fingerprint(&self, flat_m: &Tensor, first: i64, key: u64) -> Result<[u64; 4], KernelError> {
        self.inner.fingerprint(flat_m, first, key)
    }

    fn check(&self) -> Result<(), KernelError> {
        self.inner.check()
    }
}
