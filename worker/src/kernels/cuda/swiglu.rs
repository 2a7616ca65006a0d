//! Launches of SwiGLU and of its gradient.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::{VECTOR, length, matrix, width},
};

/// Its source.
pub const SOURCE: Source = Source {
    name: "swiglu.cu",
    text: include_str!("swiglu.cu"),
    kernels: &["swiglu", "swiglu_backward"],
};

const THREADS: u32 = 256;

/// The most blocks that a grid has along y.
const MAX_BLOCKS_Y: u32 = 65535;

impl CudaKernels {
    /// `kernel` on [gate | up] and a tensor of half its width.
    fn launch_swiglu(
        &self,
        kernel: &'static str,
        gate_up_nx: &Tensor,
        (name, half_nf): (&'static str, &Tensor),
    ) -> Result<(), KernelError> {
        let [n, f] = matrix(name, half_nf)?;
        let (rows, columns) = (length(name, n)?, width(name, f, VECTOR)?);
        let bf16 =
            |name, tensor, shape: &[i64]| self.tensors.vectors(name, tensor, Kind::BFloat16, shape);
        let arguments: [Argument; 4] = [
            bf16("gate_up_nx", gate_up_nx, &[n, 2 * f])?,
            bf16(name, half_nf, &[n, f])?,
            rows.into(),
            columns.into(),
        ];
        let grid = Grid {
            blocks: (
                columns.cast_unsigned().div_ceil(THREADS * VECTOR as u32),
                rows.cast_unsigned().min(MAX_BLOCKS_Y),
            ),
            threads: (THREADS, 1),
            shared_bytes: 0,
        };
        self.gpu.launch(kernel, grid, &arguments)
    }

    pub(super) fn try_swiglu(
        &self,
        gate_up_nx: &Tensor,
        out_nf: &mut Tensor,
    ) -> Result<(), KernelError> {
        self.launch_swiglu("swiglu", gate_up_nx, ("out_nf", out_nf))
    }

    pub(super) fn try_swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
    ) -> Result<(), KernelError> {
        self.launch_swiglu("swiglu_backward", gate_up_nx, ("dout_nf", dout_nf))
    }
}
