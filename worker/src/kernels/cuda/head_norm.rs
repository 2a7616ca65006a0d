//! Launches of the norm of the heads and of its gradient.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::{VECTOR, heads_first, length, width, wrong},
};
use crate::model::norm::HEAD_NORM_EPS;

/// Its source.
pub const SOURCE: Source = Source {
    name: "head_norm.cu",
    text: include_str!("head_norm.cu"),
    kernels: &["head_norm", "head_norm_backward"],
};

const THREADS: u32 = 256;

/// Channels that the lanes of one warp hold.
const MAX_WIDTH: i64 = 32 * VECTOR;

/// What both kernels need.
struct Heads {
    grid: Grid,
    arguments: [Argument; 6],
    /// [B, H, T, d].
    o_bhtd: [i64; 4],
    /// [n, H d].
    out_nx: [i64; 2],
}

fn heads(o_bhtd: &Tensor) -> Result<Heads, KernelError> {
    let shape @ [b, h, t, d] = heads_first("o_bhtd", o_bhtd)?;
    if d > MAX_WIDTH {
        let problem = format!("its heads have {d} channels; a warp holds {MAX_WIDTH}");
        return Err(wrong("o_bhtd", problem));
    }
    let lanes = (width("o_bhtd", d, VECTOR)? / VECTOR as i32)
        .cast_unsigned()
        .next_power_of_two();
    // So that heads of all tokens can be counted, with what the last block has too many.
    let all = length("o_bhtd", b * t * h + i64::from(THREADS))? - THREADS.cast_signed();
    Ok(Heads {
        grid: Grid {
            blocks: (all.cast_unsigned().div_ceil(THREADS / lanes), 1),
            threads: (THREADS, 1),
            shared_bytes: 0,
        },
        arguments: [
            length("o_bhtd", b * t)?.into(),
            length("o_bhtd", t)?.into(),
            length("o_bhtd", h)?.into(),
            length("o_bhtd", d)?.into(),
            lanes.cast_signed().into(),
            (HEAD_NORM_EPS as f32).into(),
        ],
        o_bhtd: shape,
        out_nx: [b * t, h * d],
    })
}

impl CudaKernels {
    pub(super) fn try_head_norm(
        &self,
        o_bhtd: &Tensor,
        out_nx: &mut Tensor,
    ) -> Result<(), KernelError> {
        let heads = heads(o_bhtd)?;
        let bf16 =
            |name, tensor, shape: &[i64]| self.tensors.vectors(name, tensor, Kind::BFloat16, shape);
        let pointers = [
            bf16("o_bhtd", o_bhtd, &heads.o_bhtd)?,
            bf16("out_nx", out_nx, &heads.out_nx)?,
        ];
        let arguments = [&pointers[..], &heads.arguments].concat();
        self.gpu.launch("head_norm", heads.grid, &arguments)
    }

    pub(super) fn try_head_norm_backward(
        &self,
        dout_nx: &Tensor,
        o_bhtd: &Tensor,
        do_bhtd: &mut Tensor,
    ) -> Result<(), KernelError> {
        let heads = heads(o_bhtd)?;
        let bf16 =
            |name, tensor, shape: &[i64]| self.tensors.vectors(name, tensor, Kind::BFloat16, shape);
        let pointers = [
            bf16("dout_nx", dout_nx, &heads.out_nx)?,
            bf16("o_bhtd", o_bhtd, &heads.o_bhtd)?,
            bf16("do_bhtd", do_bhtd, &heads.o_bhtd)?,
        ];
        let arguments = [&pointers[..], &heads.arguments].concat();
        self.gpu
            .launch("head_norm_backward", heads.grid, &arguments)
    }
}
