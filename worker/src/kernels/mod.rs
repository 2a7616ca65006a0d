//! The work of a training step, whose forward pass reads prompts, too: matrix products, everything between them, and the optimizer.
//!
//! One contract, [`Kernels`], whose implementations compute the same functions. [`Twin`] is plain libtorch: it serves the
//! processor, fp32 and fp64, and is what tests compare with. [`cuda`] launches kernels of our own on bf16 tensors of a GPU.
//! Matrix products are libtorch's in both. [`Timed`] lets either work and takes the time.
//!
//! Every output is a buffer of the caller's and is written completely, unless its name ends in `_sum`: then it is added
//! to. Tensors are contiguous unless said otherwise. Letters beside the model's own: n = B T tokens, x what is said
//! there. The *compute kind* is that of the weights; statistics, tables, sums and gradients of weights are fp32, beside
//! fp64 weights fp64. Whatever stands between inputs and outputs is not rounded to the compute kind unless said.

pub mod cuda;
pub mod mix;
mod products;
pub mod timed;
pub mod twin;

use std::{cell::OnceCell, rc::Rc};

use tch::{Device, Kind, Tensor};

use crate::model::{ModelConfig, attention::chunkwise::Chunkwise};
pub use cuda::{CudaKernels, KernelError};
pub use timed::Timed;
pub use twin::Twin;

/// Who computes, and what people should know about it.
pub struct Choice {
    /// Who computes.
    pub kernels: Rc<dyn Kernels>,
    /// What a GPU computes slower than it could, and why.
    pub note: Option<String>,
}

/// What computes a model of this shape in `kind` on `device`: CUDA kernels for bf16 on a GPU, which has been opened by
/// [`device::open`](crate::device::open), if they take the model, else libtorch.
pub fn on(device: Device, kind: Kind, config: &ModelConfig) -> Result<Choice, KernelError> {
    let twin = |note| Choice {
        kernels: Rc::new(Twin),
        note,
    };
    let slower = |what: String| format!("{what}; libtorch computes it instead, which is slower");
    let (Device::Cuda(index), Kind::BFloat16) = (device, kind) else {
        return Ok(twin(None));
    };
    if let Some(problem) = cuda::misfit(config) {
        return Ok(twin(Some(slower(problem))));
    }
    Ok(Choice {
        kernels: Rc::new(CudaKernels::new(index)?),
        note: cuda::left_to_libtorch(config).map(slower),
    })
}

/// What blocks, embedding and loss need, forward and backward, and what the optimizer needs.
pub trait Kernels {
    /// The matrix product of a linear layer: `y_no` = x W^T. Rows may be strided, here and in its gradients: slices of wider
    /// matrices go in and out without a copy.
    fn linear(&self, x_ni: &Tensor, weight_oi: &Tensor, y_no: &Tensor) {
        products::linear(x_ni, weight_oi, y_no);
    }

    /// Its gradient of the input: `dx_ni` = dy W.
    fn linear_input_gradient(&self, dy_no: &Tensor, weight_oi: &Tensor, dx_ni: &Tensor) {
        products::input_gradient(dy_no, weight_oi, dx_ni);
    }

    /// Its gradient of the weight: dW += dy^T x, summed in the kind of `dweight_oi_sum`.
    fn linear_weight_gradient(&self, dy_no: &Tensor, x_ni: &Tensor, dweight_oi_sum: &Tensor) {
        products::weight_gradient(dy_no, x_ni, dweight_oi_sum);
    }

    /// Residual and RMSNorm. The normed stream s is `x_nd`, or `x_nd + delta_nd` rounded to the compute kind:
    /// `rstd_n` = 1 / sqrt(mean(s^2) + eps), `normed_nd` = round(s * rstd) * gain.
    fn add_rms_norm(
        &self,
        x_nd: &Tensor,
        delta: Option<Delta<'_>>,
        gain_d: &Tensor,
        eps: f64,
        out: NormOut<'_>,
    );

    /// `normed_nd` once more, to the bit, from what [`add_rms_norm`](Self::add_rms_norm) normed and kept.
    fn rms_norm_again(
        &self,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        normed_nd: &mut Tensor,
    );

    /// Back through RMSNorm: adds to the gradient of the residual stream `dx_nd_sum` (compute kind) and of the gain.
    fn rms_norm_backward(
        &self,
        dnormed_nd: &Tensor,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        dx_nd_sum: &mut Tensor,
        dgain_d_sum: &mut Tensor,
    );

    /// From projections to what attention reads: q = rope(relu(pre_q + bias_q)), k = rope(relu(pre_k + bias_k)) *
    /// key_scale, v as it is, each head's tokens together. Without biases there is no relu either.
    /// Outputs [B, H, T, d], [B, K, T, d], [B, K, T, d].
    fn heads(
        &self,
        input: &HeadsIn<'_>,
        q_bhtd: &mut Tensor,
        k_bktd: &mut Tensor,
        v_bktd: &mut Tensor,
    );

    /// Back through [`heads`](Self::heads). `input.v_nx` is not read; without biases neither are the projections.
    fn heads_backward(
        &self,
        input: &HeadsIn<'_>,
        dq_bhtd: &Tensor,
        dk_bktd: &Tensor,
        dv_bktd: &Tensor,
        out: HeadsGrad<'_>,
    );

    /// o_t = sum over j <= t of gamma_h^(t-j) (q_t . k_j) v_j within documents; query head h reads head h / (H / K) of k
    /// and v.
    fn linear_attention(
        &self,
        decay: &DecayTables,
        q_bhtd: &Tensor,
        k_bktd: &Tensor,
        v_bktd: &Tensor,
        o_bhtd: &mut Tensor,
    );

    /// The same of rows that go on from the state S before them, as [`recurrent`](crate::model::attention::recurrent) keeps
    /// it: o_t + gamma_h^t S q_t, t counted from 0. `state_bhde`, fp32 (fp64), becomes the state behind the rows. There are no
    /// documents.
    fn linear_attention_from(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        state_bhde: &mut Tensor,
        o_bhtd: &mut Tensor,
    );

    /// The gradients of [`linear_attention`](Self::linear_attention), recomputing what it did not keep.
    fn linear_attention_backward(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        do_bhtd: &Tensor,
        dqkv: [&mut Tensor; 3],
    );

    /// Each head of each token to mean 0 and variance 1 (biased, eps
    /// [`HEAD_NORM_EPS`](crate::model::norm::HEAD_NORM_EPS)), and tokens first again: `out_nx` [n, H d].
    fn head_norm(&self, o_bhtd: &Tensor, out_nx: &mut Tensor);

    /// Its gradient from its input `o_bhtd` and `dout_nx`.
    fn head_norm_backward(&self, dout_nx: &Tensor, o_bhtd: &Tensor, do_bhtd: &mut Tensor);

    /// silu(gate) * up of the two halves of `gate_up_nx` = [gate | up], [n, 2F].
    fn swiglu(&self, gate_up_nx: &Tensor, out_nf: &mut Tensor);

    /// Its gradient, in place: `gate_up_nx` becomes [dgate | dup]. `out_nf`, where it is not kept, is written once more, to
    /// the bit, before the gate is gone.
    fn swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
        out_nf: Option<&mut Tensor>,
    );

    /// Cross-entropy of c rows, in place: `logits_cv` becomes the gradient of the sum over rows of -log
    /// softmax(logits)[target] + z_loss * logsumexp(logits)^2. Rows whose mask is false give no loss and zero gradient.
    /// `targets_c` i64, `mask_c` bool. To `loss_2_sum` (fp64) are added the cross-entropy alone and the whole sum.
    fn cross_entropy(
        &self,
        logits_cv: &mut Tensor,
        targets_c: &Tensor,
        mask_c: &Tensor,
        z_loss: f64,
        loss_2_sum: &mut Tensor,
    );

    /// Adds row i of `dx_nd` to row `ids_n[i]` (i64) of the embedding's gradient, in an order that is always the same.
    fn embedding_backward(&self, dx_nd: &Tensor, ids_n: &Tensor, dembedding_vd_sum: &mut Tensor);

    /// The sum of the squares of flat fp32 buffers, one after the other, in fp64: NaN where it could not be had. Waits for
    /// the device, once.
    ///
    /// Its last bits depend on the device and the thread count, so for each buffer ranks agree on one rank's value.
    fn squared_norm(&self, flats_m: &[Tensor]) -> f64;

    /// One update of [`AdamW`](crate::optim::AdamW). Elementwise, each operation rounded to fp32 by itself. Moments kept in
    /// bf16 are rounded at random, up as often as makes the mean right (see [`Update::rounding`]), after the update has
    /// used them.
    fn adamw(&self, shard: Shard<'_>, update: &Update);

    /// What tells two buffers apart (fp32, bf16 or i16): for each of four keys drawn from `key` the sum, modulo 2^64, over
    /// all numbers of a hash of the number's bits and index, `first` being that of the first one. Fingerprints of parts of
    /// a buffer therefore add up to that of the whole. Waits for the device.
    ///
    /// # Errors
    /// When it could not be had, for the kind of numbers or the device.
    fn fingerprint(&self, flat_m: &Tensor, first: i64, key: u64) -> Result<[u64; 4], KernelError>;

    /// The first failure of any method since the last call: outputs of what failed were not written. Does not wait for
    /// the device.
    fn check(&self) -> Result<(), KernelError>;
}

/// What is added to the residual stream before it is normed.
pub struct Delta<'a> {
    /// What a layer made of the stream: [n, D], compute kind.
    pub delta_nd: &'a Tensor,
    /// The stream from here on: [n, D], compute kind. Not the storage of the stream before.
    pub sum_nd: &'a mut Tensor,
}

/// What RMSNorm writes.
pub struct NormOut<'a> {
    /// One statistic per token: [n].
    pub rstd_n: &'a mut Tensor,
    /// [n, D], compute kind.
    pub normed_nd: &'a mut Tensor,
}

/// The numbers behind heads-first tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// B.
    pub batch: i64,
    /// T.
    pub tokens: i64,
    /// H: query heads.
    pub heads: i64,
    /// K: key/value heads.
    pub kv_heads: i64,
    /// d.
    pub head_dim: i64,
}

/// Projections on their way into attention. Rows may be strided (they may be slices of a wider matrix); the channels of
/// a row lie together.
pub struct HeadsIn<'a> {
    /// How to cut them.
    pub shape: HeadShape,
    /// [n, H d].
    pub pre_q_nx: &'a Tensor,
    /// [n, K d].
    pub pre_k_nx: &'a Tensor,
    /// [n, K d].
    pub v_nx: &'a Tensor,
    /// Biases of the feature maps, [H d] and [K d], compute kind. The same tensor twice where q and k share one map.
    pub biases: Option<[&'a Tensor; 2]>,
    /// Rotary cosines [x, T, d/2]: x is 1, or B where positions differ between rows. fp32 (fp64).
    pub cos_xtp: &'a Tensor,
    /// Rotary sines, likewise.
    pub sin_xtp: &'a Tensor,
    /// What keys are multiplied by.
    pub key_scale: f64,
}

/// What [`Kernels::heads_backward`] writes. Rows may be strided.
pub struct HeadsGrad<'a> {
    /// [n, H d], compute kind.
    pub dpre_q_nx: &'a mut Tensor,
    /// [n, K d], compute kind.
    pub dpre_k_nx: &'a mut Tensor,
    /// [n, K d], compute kind.
    pub dv_nx: &'a mut Tensor,
    /// Added to, where there are biases: fp32 (fp64). May be the same storage twice, and then gets both.
    pub dbiases_sum: Option<[&'a mut Tensor; 2]>,
}

/// A part of the flat buffers that one update changes: m numbers each, contiguous, possibly views of larger buffers.
pub struct Shard<'a> {
    /// What the model computes on, [m]: the masters themselves (fp32), or their upper halves (bf16).
    pub param_m: &'a mut Tensor,
    /// What [`twin::split`] leaves beside bf16 parameters: i16 [m].
    pub remainder_m: Option<&'a mut Tensor>,
    /// Gradient sum: fp32 [m].
    pub gradient_m: &'a Tensor,
    /// First moment: fp32 or bf16 [m].
    pub exp_avg_m: &'a mut Tensor,
    /// Second moment: likewise, of the same kind.
    pub exp_avg_sq_m: &'a mut Tensor,
    /// How many numbers, from the first one on, weight decay shrinks.
    pub decayed: i64,
    /// Index of the first number among all parameters. Only random rounding looks at it.
    pub first: i64,
}

/// What is the same for every number of one update; t is the number of the update, from 1.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// What makes the clipped gradient of the mean loss of the gradient sum.
    pub gradient_scale: f64,
    /// beta_1 and beta_2.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate / (1 - beta_1^t).
    pub step_size: f64,
    /// sqrt(1 - beta_2^t).
    pub root_correction: f64,
    /// 1 - learning rate * weight decay.
    pub decay: f64,
    /// Key of the random rounding of bf16 moments: from [`mix::number`] of this and the number's index come 16 bits for
    /// the first moment (the highest) and 16 for the second (the next), which are added below the last place that is kept.
    pub rounding: u64,
}

/// The decay of the heads over the rows of a batch, shared by all blocks.
#[derive(Debug)]
pub struct DecayTables {
    /// s_h = -ln(gamma_h) of each query head.
    pub slopes_h: Vec<f64>,
    /// Number of document starts up to and including each token, i64 [B, T] on the device (see
    /// [`Documents`](crate::model::Documents)); none: rows are whole. Tokens of different numbers do not see each other.
    pub segments_bt: Option<Tensor>,
    chunk: i64,
    tokens: i64,
    options: (Kind, Device),
    chunkwise: OnceCell<Chunkwise>,
}

impl DecayTables {
    /// For rows of `tokens` tokens in chunks of `chunk`, on the device, and in the kind, that `options` name.
    pub fn new(
        slopes_h: Vec<f64>,
        chunk: i64,
        tokens: i64,
        segments_bt: Option<Tensor>,
        options: (Kind, Device),
    ) -> DecayTables {
        DecayTables {
            slopes_h,
            segments_bt,
            chunk,
            tokens,
            options,
            chunkwise: OnceCell::new(),
        }
    }

    /// The powers of the decay as libtorch's products need them, made when first asked for: a kernel that computes its
    /// own powers never asks.
    pub fn chunkwise(&self) -> &Chunkwise {
        self.chunkwise.get_or_init(|| {
            Chunkwise::new(
                &self.slopes_h,
                self.chunk,
                self.tokens,
                self.segments_bt.as_ref(),
                self.options,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AttentionKind, config::tests::small};

    #[test]
    fn a_model_that_the_kernels_do_not_take_goes_to_libtorch_and_is_told() {
        let odd = ModelConfig {
            ffn: 100,
            ..small(AttentionKind::Softmax)
        };
        let note = |device, kind| on(device, kind, &odd).unwrap().note;
        let told = note(Device::Cuda(0), Kind::BFloat16).unwrap();
        assert!(
            told.contains("width is 100") && told.contains("libtorch"),
            "{told}"
        );
        for (device, kind) in [
            (Device::Cpu, Kind::BFloat16),
            (Device::Cuda(0), Kind::Float),
        ] {
            assert_eq!(note(device, kind), None, "nobody expects kernels there");
        }
    }
}
