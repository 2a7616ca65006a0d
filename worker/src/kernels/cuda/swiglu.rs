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

/// The lengths of a call, checked, and how they are spread over threads.
struct Lengths {
    /// [n, F].
    half: [i64; 2],
    /// Rows and columns, as the kernels take them.
    counts: [Argument; 2],
    grid: Grid,
}

impl Lengths {
    fn new(name: &'static str, half_nf: &Tensor) -> Result<Lengths, KernelError> {
        let half @ [n, f] = matrix(name, half_nf)?;
        let (rows, columns) = (length(name, n)?, width(name, f, VECTOR)?);
        Ok(Lengths {
            half,
            counts: [rows.into(), columns.into()],
            grid: Grid {
                blocks: (
                    columns.cast_unsigned().div_ceil(THREADS * VECTOR as u32),
                    rows.cast_unsigned().min(MAX_BLOCKS_Y),
                ),
                threads: (THREADS, 1),
                shared_bytes: 0,
            },
        })
    }
}

impl CudaKernels {
    fn gate_up(&self, gate_up_nx: &Tensor, l: &Lengths) -> Result<Argument, KernelError> {
        let [n, f] = l.half;
        self.tensors
            .vectors("gate_up_nx", gate_up_nx, Kind::BFloat16, &[n, 2 * f])
    }

    fn half(
        &self,
        name: &'static str,
        half_nf: &Tensor,
        l: &Lengths,
    ) -> Result<Argument, KernelError> {
        self.tensors.vectors(name, half_nf, Kind::BFloat16, &l.half)
    }

    pub(super) fn try_swiglu(
        &self,
        gate_up_nx: &Tensor,
        out_nf: &mut Tensor,
    ) -> Result<(), KernelError> {
        let l = Lengths::new("out_nf", out_nf)?;
        let [rows, columns] = l.counts;
        let arguments = [
            self.gate_up(gate_up_nx, &l)?,
            self.half("out_nf", out_nf, &l)?,
            rows,
            columns,
        ];
        self.gpu.launch("swiglu", l.grid, &arguments)
    }

    pub(super) fn try_swiglu_backward(
        &self,
        gate_up_nx: &mut Tensor,
        dout_nf: &Tensor,
        out_nf: Option<&mut Tensor>,
    ) -> Result<(), KernelError> {
        let l = Lengths::new("dout_nf", dout_nf)?;
        let [rows, columns] = l.counts;
        let out = out_nf.map_or(Ok(Argument::NULL), |out_nf| self.half("out_nf", out_nf, &l));
        let arguments = [
            self.gate_up(gate_up_nx, &l)?,
            self.half("dout_nf", dout_nf, &l)?,
            out?,
            rows,
            columns,
        ];
        self.gpu.launch("swiglu_backward", l.grid, &arguments)
    }
}
