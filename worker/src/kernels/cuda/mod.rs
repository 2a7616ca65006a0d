//! The contract on NVIDIA GPUs, in bf16: CUDA C++ compiled at run time, launched on libtorch's tensors and stream.
//!
//! Sources lie beside the Rust files that launch them. [`compile`] makes machine code of them, [`launch`] runs it, and in
//! between every tensor is checked; so the kernels themselves check nothing. Sums over tokens come in two stages of fixed
//! order, and no two blocks write to one place, unless it is a sum of integers: the same inputs give the same bits.

mod attention;
mod compile;
mod cross_entropy;
pub mod decode;
mod embedding;
mod error;
mod event;
mod fingerprint;
mod fit;
mod head_norm;
mod heads;
mod launch;
mod norm;
mod nvrtc;
mod optimizer;
mod rank_sum;
mod reduce;
mod stream;
mod swiglu;
mod tensors;
#[cfg(test)]
mod tests;

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use tch::{Device, Kind, Tensor};

use self::{attention::Decays, compile::Source, nvrtc::Nvrtc, tensors::Tensors};
pub use self::{
    error::KernelError, fit::misfit, launch::Queue, rank_sum::RankSum, stream::SideStream,
};
pub(super) use self::{event::Event, fit::left_to_libtorch, launch::Gpu};
use super::{DecayTables, Delta, HeadsGrad, HeadsIn, Kernels, NormOut, Shard, Twin, Update};
use crate::device;

/// Everything that is compiled.
const SOURCES: [Source; 10] = [
    norm::SOURCE,
    heads::SOURCE,
    head_norm::SOURCE,
    swiglu::SOURCE,
    attention::SOURCE,
    cross_entropy::SOURCE,
    embedding::SOURCE,
    optimizer::SOURCE,
    fingerprint::SOURCE,
    reduce::SOURCE,
];

/// The kernels, loaded on one GPU.
///
/// The methods of [`Kernels`] have no result of their own, as nothing of theirs fails once shapes are right; what does fail
/// is kept, and [`check`](Kernels::check) tells it.
pub struct CudaKernels {
    gpu: Gpu,
    /// Whether attention is compiled for products of warpgroups.
    warpgroups: bool,
    tensors: Tensors,
    scratch: RefCell<Tensor>,
    decays: RefCell<Option<Decays>>,
    failure: RefCell<Option<KernelError>>,
}

impl CudaKernels {
    /// Compiles all kernels for the GPU with this index, or takes them from the cache, and loads them. The device has been
    /// opened by [`device::open`].
    pub fn new(index: usize) -> Result<CudaKernels, KernelError> {
        let gpu = Gpu::open(index)?;
        let architecture = gpu.architecture()?;
        CudaKernels::compiled(gpu, &architecture)
    }

    /// The same, compiled for `architecture`, which this GPU runs, too: `sm_90` does without what only `sm_90a` has.
    pub fn compiled_for(index: usize, architecture: &str) -> Result<CudaKernels, KernelError> {
        CudaKernels::compiled(Gpu::open(index)?, architecture)
    }

    fn compiled(mut gpu: Gpu, architecture: &str) -> Result<CudaKernels, KernelError> {
        load(&mut gpu, architecture, &SOURCES)?;
        let device = Device::Cuda(gpu.index());
        Ok(CudaKernels {
            gpu,
            warpgroups: architecture == attention::WARPGROUPS,
            tensors: Tensors { device },
            scratch: RefCell::new(Tensor::empty([0], (Kind::Uint8, device))),
            decays: RefCell::new(None),
            failure: RefCell::new(None),
        })
    }

    fn note(&self, result: Result<(), KernelError>) {
        if let Err(error) = result {
            self.failure.borrow_mut().get_or_insert(error);
        }
    }
}

/// Loads the kernels of `sources` on a GPU, compiled for `architecture` or from the cache.
fn load(gpu: &mut Gpu, architecture: &str, sources: &[Source]) -> Result<(), KernelError> {
    let nvrtc = Nvrtc::open(&cuda_libraries())?;
    let cache = compile::cache_folder();
    for source in sources {
        let cubin = compile::cubin(&nvrtc, source, architecture, cache.as_deref())?;
        gpu.load(&cubin, source.kernels)?;
    }
    Ok(())
}

/// Where the CUDA wheels put their libraries: beside the libtorch in use.
fn cuda_libraries() -> PathBuf {
    device::loaded_libtorch()
        .and_then(|library| Some(library.parent()?.join("../../nvidia/cu13/lib")))
        .unwrap_or_else(|| Path::new("nvidia/cu13/lib").to_owned())
}

impl Kernels for CudaKernels {
    fn add_rms_norm(
        &self,
        x_nd: &Tensor,
        delta: Option<Delta<'_>>,
        gain_d: &Tensor,
        eps: f64,
        out: NormOut<'_>,
    ) {
        self.note(self.try_add_rms_norm(x_nd, delta, gain_d, eps, out));
    }

    fn rms_norm_again(
        &self,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        normed_nd: &mut Tensor,
    ) {
        self.note(self.try_rms_norm_again(x_nd, rstd_n, gain_d, normed_nd));
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
        self.note(self.try_rms_norm_backward(
            dnormed_nd,
            x_nd,
            rstd_n,
            gain_d,
            dx_nd_sum,
            dgain_d_sum,
        ));
    }

    fn heads(
        &self,
        input: &HeadsIn<'_>,
        q_bhtd: &mut Tensor,
        k_bktd: &mut Tensor,
        v_bktd: &mut Tensor,
    ) {
        self.note(self.try_heads(input, q_bhtd, k_bktd, v_bktd));
    }

    fn heads_backward(
        &self,
        input: &HeadsIn<'_>,
        dq_bhtd: &Tensor,
        dk_bktd: &Tensor,
        dv_bktd: &Tensor,
        out: HeadsGrad<'_>,
    ) {
        self.note(self.try_heads_backward(input, dq_bhtd, dk_bktd, dv_bktd, out));
    }

    fn linear_attention(
        &self,
        decay: &DecayTables,
        q_bhtd: &Tensor,
        k_bktd: &Tensor,
        v_bktd: &Tensor,
        o_bhtd: &mut Tensor,
    ) {
        if attention::takes(q_bhtd) {
            self.note(self.try_linear_attention(decay, q_bhtd, k_bktd, v_bktd, o_bhtd));
        } else {
            Twin.linear_attention(decay, q_bhtd, k_bktd, v_bktd, o_bhtd);
        }
    }

    fn linear_attention_from(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        state_bhde: &mut Tensor,
        o_bhtd: &mut Tensor,
    ) {
        if attention::takes(o_bhtd) {
            self.note(self.try_linear_attention_from(decay, qkv, state_bhde, o_bhtd));
        } else {
            Twin.linear_attention_from(decay, qkv, state_bhde, o_bhtd);
        }
    }

    fn linear_attention_backward(
        &self,
        decay: &DecayTables,
        qkv: [&Tensor; 3],
        do_bhtd: &Tensor,
        dqkv: [&mut Tensor; 3],
    ) {
        if attention::takes(do_bhtd) {
            self.note(self.try_linear_attention_backward(decay, qkv, do_bhtd, dqkv));
        } else {
            Twin.linear_attention_backward(decay, qkv, do_bhtd, dqkv);
        }
    }

    fn head_norm(&self, o_bhtd: &Tensor, out_nx: &mut Tensor) {
        self.note(self.try_head_norm(o_bhtd, out_nx));
    }

    fn head_norm_backward(&self, dout_nx: &Tensor, o_bhtd: &Tensor, do_bhtd: &mut Tensor) {
        self.note(self.try_head_norm_backward(dout_nx, o_bhtd, do_bhtd));
    }

    fn swiglu(&self, gate_up_nx: &Tensor, out_nf: &mut Tensor) {
        self.note(self.try_swiglu(gate_up_nx, out_nf));
    }

    fn swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
        out_nf: Option<&mut Tensor>,
    ) {
        self.note(self.try_swiglu_backward(gate_up_nx, dout_nf, out_nf));
    }

    fn cross_entropy(
        &self,
        logits_cv: &mut Tensor,
        targets_c: &Tensor,
        mask_c: &Tensor,
        z_loss: f64,
        loss_2_sum: &mut Tensor,
    ) {
        self.note(self.try_cross_entropy(logits_cv, targets_c, mask_c, z_loss, loss_2_sum));
    }

    fn embedding_backward(&self, dx_nd: &Tensor, ids_n: &Tensor, dembedding_vd_sum: &mut Tensor) {
        self.note(self.try_embedding_backward(dx_nd, ids_n, dembedding_vd_sum));
    }

    fn squared_norm(&self, flats_m: &[Tensor]) -> f64 {
        self.try_squared_norm(flats_m).unwrap_or_else(|error| {
            self.note(Err(error));
            f64::NAN
        })
    }

    fn adamw(&self, shard: Shard<'_>, update: &Update) {
        self.note(self.try_adamw(shard, update));
    }

    fn fingerprint(&self, flat_m: &Tensor, first: i64, key: u64) -> Result<[u64; 4], KernelError> {
        self.try_fingerprint(flat_m, first, key)
    }

    fn check(&self) -> Result<(), KernelError> {
        self.failure.take().map_or(Ok(()), Err)
    }
}
