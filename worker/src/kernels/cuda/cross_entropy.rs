//! Launches of the loss and its gradient, in place of the logits.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::Grid,
    tensors::{length, matrix},
};

/// Its source.
pub const SOURCE: Source = Source {
    name: "cross_entropy.cu",
    text: include_str!("cross_entropy.cu"),
    kernels: &["cross_entropy"],
};

const THREADS: u32 = 512;

/// Two fp64 numbers per row.
const LOSS_BYTES: i64 = 16;

impl CudaKernels {
    pub(super) fn try_cross_entropy(
        &self,
        logits_cv: &mut Tensor,
        targets_c: &Tensor,
        mask_c: &Tensor,
        z_loss: f64,
        loss_2_sum: &mut Tensor,
    ) -> Result<(), KernelError> {
        let shape @ [c, v] = matrix("logits_cv", logits_cv)?;
        let (rows, columns) = (length("logits_cv", c)?, length("logits_cv", v)?);
        let t = self.tensors;
        let losses = self.scratch(c * LOSS_BYTES);
        let sum = t.vectors("loss_2_sum", loss_2_sum, Kind::Double, &[2])?;
        let arguments = [
            t.vectors("logits_cv", logits_cv, Kind::BFloat16, &shape)?,
            t.numbers("targets_c", targets_c, Kind::Int64, &[c])?,
            t.numbers("mask_c", mask_c, Kind::Bool, &[c])?,
            losses,
            columns.into(),
            (z_loss as f32).into(),
        ];
        let grid = Grid {
            blocks: (rows.cast_unsigned(), 1),
            threads: (THREADS, 1),
            shared_bytes: 0,
        };
        self.gpu.launch("cross_entropy", grid, &arguments)?;
        self.pair_sum(losses, sum, rows)
    }
}
