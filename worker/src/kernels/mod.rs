//! The elementwise and attention work of a training step: everything between the matrix products.
//!
//! One contract, [`Kernels`], whose implementations compute the same functions. [`Twin`] is plain libtorch: it serves the
//! processor, fp32 and fp64, and is what tests compare with. [`cuda`] launches kernels of our own on bf16 tensors of a GPU.
//!
//! Every output is a buffer of the caller's and is written completely, unless its name ends in `_sum`: then it is added
//! to. Tensors are contiguous unless said otherwise. Letters beside the model's own: n = B T tokens, x what is said
//! there. The *compute kind* is that of the weights; statistics, tables, sums and gradients of weights are fp32, beside
//! fp64 weights fp64. Whatever stands between inputs and outputs is not rounded to the compute kind unless said.

pub mod cuda;
pub mod twin;

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::model::attention::chunkwise::Chunkwise;
pub use cuda::{CudaKernels, KernelError};
pub use twin::Twin;

/// What computes in `kind` on `device`: CUDA kernels for bf16 on a GPU, which has been opened by
/// [`device::open`](crate::device::open), else libtorch.
pub fn on(device: Device, kind: Kind) -> Result<Box<dyn Kernels>, KernelError> {
    match (device, kind) {
        (Device::Cuda(index), Kind::BFloat16) => Ok(Box::new(CudaKernels::new(index)?)),
        _ => Ok(Box::new(Twin)),
    }
}

/// What blocks, embedding and loss need besides matrix products, forward and backward.
pub trait Kernels {
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

    /// Its gradients of q, k and v, recomputing what the forward pass did not keep.
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

    /// Its gradient, in place: `gate_up_nx` becomes [dgate | dup].
    fn swiglu_backward(&self, gate_up_nx: &mut Tensor, dout_nf: &Tensor);

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
