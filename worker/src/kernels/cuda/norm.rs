//! Launches of the residual's RMSNorm and of its gradient.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::{VECTOR, length, matrix, width, wrong},
};
use crate::kernels::{Delta, NormOut};

/// Its source.
pub const SOURCE: Source = Source {
    name: "norm.cu",
    text: include_str!("norm.cu"),
    kernels: &[
        "add_rms_norm_1",
        "add_rms_norm_2",
        "add_rms_norm_4",
        "rms_norm_backward_1",
        "rms_norm_backward_2",
        "rms_norm_backward_4",
        "rms_norm_again",
    ],
};

/// How a row is spread over a block.
struct Spread {
    forward: &'static str,
    backward: &'static str,
    threads: u32,
}

/// As few vectors per thread as leave enough threads for other blocks of a multiprocessor.
fn spread(width: i32) -> Result<Spread, KernelError> {
    let (forward, backward, vectors) = match width {
        ..=2048 => ("add_rms_norm_1", "rms_norm_backward_1", 1),
        2049..=8192 => ("add_rms_norm_2", "rms_norm_backward_2", 2),
        8193..=16384 => ("add_rms_norm_4", "rms_norm_backward_4", 4),
        _ => {
            let problem = format!("{width} is wider than the 16384 that a block holds");
            return Err(wrong("x_nd", problem));
        }
    };
    let per_thread = width.cast_unsigned().div_ceil(vectors * VECTOR as u32);
    Ok(Spread {
        forward,
        backward,
        threads: per_thread.next_multiple_of(32),
    })
}

fn one_row_each(rows: i32, threads: u32) -> Grid {
    Grid {
        blocks: (rows.cast_unsigned(), 1),
        threads: (threads, 1),
        shared_bytes: 0,
    }
}

impl CudaKernels {
    pub(super) fn try_add_rms_norm(
        &self,
        x_nd: &Tensor,
        delta: Option<Delta<'_>>,
        gain_d: &Tensor,
        eps: f64,
        out: NormOut<'_>,
    ) -> Result<(), KernelError> {
        let shape @ [n, d] = matrix("x_nd", x_nd)?;
        let (rows, columns) = (length("x_nd", n)?, width("x_nd", d, VECTOR)?);
        let spread = spread(columns)?;
        let bf16 =
            |name, tensor, shape: &[i64]| self.tensors.vectors(name, tensor, Kind::BFloat16, shape);
        let (delta, sum) = match delta {
            None => (Argument::NULL, Argument::NULL),
            Some(delta) => (
                bf16("delta_nd", delta.delta_nd, &shape)?,
                bf16("sum_nd", delta.sum_nd, &shape)?,
            ),
        };
        let arguments = [
            bf16("x_nd", x_nd, &shape)?,
            delta,
            bf16("gain_d", gain_d, &[d])?,
            sum,
            self.tensors
                .numbers("rstd_n", out.rstd_n, Kind::Float, &[n])?,
            bf16("normed_nd", out.normed_nd, &shape)?,
            columns.into(),
            (eps as f32).into(),
        ];
        let grid = one_row_each(rows, spread.threads);
        self.gpu.launch(spread.forward, grid, &arguments)
    }

    pub(super) fn try_rms_norm_again(
        &self,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        normed_nd: &mut Tensor,
    ) -> Result<(), KernelError> {
        let shape @ [n, d] = matrix("x_nd", x_nd)?;
        let (rows, columns) = (length("x_nd", n)?, width("x_nd", d, VECTOR)?);
        let spread = spread(columns)?;
        let bf16 =
            |name, tensor, shape: &[i64]| self.tensors.vectors(name, tensor, Kind::BFloat16, shape);
        let arguments = [
            bf16("x_nd", x_nd, &shape)?,
            self.tensors.numbers("rstd_n", rstd_n, Kind::Float, &[n])?,
            bf16("gain_d", gain_d, &[d])?,
            bf16("normed_nd", normed_nd, &shape)?,
            columns.into(),
        ];
        let grid = one_row_each(rows, spread.threads);
        self.gpu.launch("rms_norm_again", grid, &arguments)
    }

    pub(super) fn try_rms_norm_backward(
        &self,
        dnormed_nd: &Tensor,
        x_nd: &Tensor,
        rstd_n: &Tensor,
        gain_d: &Tensor,
        dx_nd_sum: &mut Tensor,
        dgain_d_sum: &mut Tensor,
    ) -> Result<(), KernelError> {
        let shape @ [n, d] = matrix("x_nd", x_nd)?;
        let (rows, columns) = (length("x_nd", n)?, width("x_nd", d, VECTOR)?);
        let spread = spread(columns)?;
        let bf16 =
            |name, tensor, shape: &[i64]| self.tensors.vectors(name, tensor, Kind::BFloat16, shape);
        // As many blocks as run at once: more would only make more parts of the gain's gradient.
        let blocks = (self.gpu.processors() * (1024 / spread.threads)).min(rows.cast_unsigned());
        let parts = self.scratch(i64::from(blocks) * d * 4);
        let dgain = self
            .tensors
            .numbers("dgain_d_sum", dgain_d_sum, Kind::Float, &[d])?;
        let arguments = [
            bf16("dnormed_nd", dnormed_nd, &shape)?,
            bf16("x_nd", x_nd, &shape)?,
            self.tensors.numbers("rstd_n", rstd_n, Kind::Float, &[n])?,
            bf16("gain_d", gain_d, &[d])?,
            bf16("dx_nd_sum", dx_nd_sum, &shape)?,
            parts,
            rows.into(),
            columns.into(),
        ];
        let grid = one_row_each(blocks.cast_signed(), spread.threads);
        self.gpu.launch(spread.backward, grid, &arguments)?;
        self.column_sum(parts, dgain, blocks, [columns, columns])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_covers_every_width_up_to_its_limit() {
        for width in (8..=16384).step_by(8) {
            let spread = spread(width).unwrap();
            let vectors: u32 = spread.forward[spread.forward.len() - 1..].parse().unwrap();
            assert!(
                spread.threads <= 512 && spread.threads.is_multiple_of(32),
                "{width}"
            );
            assert!(spread.threads * vectors * 8 >= width as u32, "{width}");
            assert!(spread.backward.ends_with(&vectors.to_string()));
        }
        assert!(spread(16392).is_err());
    }
}
