//! Launches of the second stage of sums, and the memory of the first.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
};

/// Its source.
pub const SOURCE: Source = Source {
    name: "reduce.cu",
    text: include_str!("reduce.cu"),
    kernels: &["column_sum", "pair_sum", "rank_sum"],
};

impl CudaKernels {
    /// Memory for what one call hands from its first kernel to its second. It grows when a call needs more than any before,
    /// so in the steady state nothing is allocated. Calls may share it, since they run one after the other.
    pub(super) fn scratch(&self, bytes: i64) -> Argument {
        let mut scratch = self.scratch.borrow_mut();
        if scratch.size()[0] < bytes {
            *scratch = Tensor::empty([bytes], (Kind::Uint8, self.tensors.device));
        }
        Argument::pointer(&scratch)
    }

    /// Adds the columns of fp32 `parts` [rows, stride], as far as `width`, to `sum`.
    pub(super) fn column_sum(
        &self,
        parts: Argument,
        sum: Argument,
        rows: u32,
        [width, stride]: [i32; 2],
    ) -> Result<(), KernelError> {
        let grid = Grid {
            blocks: (width.cast_unsigned().div_ceil(32), 1),
            threads: (32, 32),
            shared_bytes: 0,
        };
        let arguments = [
            parts,
            sum,
            rows.cast_signed().into(),
            width.into(),
            stride.into(),
        ];
        self.gpu.launch("column_sum", grid, &arguments)
    }

    /// Adds `count` pairs of fp64 to one.
    pub(super) fn pair_sum(
        &self,
        parts: Argument,
        sum: Argument,
        count: i32,
    ) -> Result<(), KernelError> {
        let grid = Grid {
            blocks: (1, 1),
            threads: (1024, 1),
            shared_bytes: 0,
        };
        self.gpu
            .launch("pair_sum", grid, &[parts, sum, count.into()])
    }
}
