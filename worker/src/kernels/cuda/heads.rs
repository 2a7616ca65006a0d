//! Launches of what lies between projections and attention: bias, ReLU, rotary embedding and layout, and the way back.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::{VECTOR, length, width, wrong},
};
use crate::kernels::{HeadShape, HeadsGrad, HeadsIn};

/// Its source.
pub const SOURCE: Source = Source {
    name: "heads.cu",
    text: include_str!("heads.cu"),
    kernels: &["heads", "heads_backward"],
};

/// What heads' widths are multiples of: two vectors, one of each half.
pub const MULTIPLE: i64 = 2 * VECTOR;

/// Threads of a block, about.
const THREADS: u32 = 128;

/// The lengths that both kernels take, checked.
struct Lengths {
    rows: i32,
    tokens: i32,
    query_heads: i32,
    key_heads: i32,
    width: i32,
    table_rows: i32,
    /// [n, H d].
    q_nx: [i64; 2],
    /// [n, K d].
    k_nx: [i64; 2],
    /// [B, H, T, d].
    q_bhtd: [i64; 4],
    /// [B, K, T, d].
    k_bktd: [i64; 4],
}

fn lengths(input: &HeadsIn<'_>) -> Result<Lengths, KernelError> {
    let HeadShape {
        batch,
        tokens,
        heads,
        kv_heads,
        head_dim,
    } = input.shape;
    let table_rows = input.cos_xtp.size()[0];
    if table_rows != 1 && table_rows != batch {
        let problem = format!("it has {table_rows} rows, not 1 or {batch}");
        return Err(wrong("cos_xtp", problem));
    }
    let n = batch * tokens;
    Ok(Lengths {
        rows: length("pre_q_nx", n)?,
        tokens: length("pre_q_nx", tokens)?,
        query_heads: length("pre_q_nx", heads)?,
        key_heads: length("pre_k_nx", kv_heads)?,
        width: width("pre_q_nx", head_dim, MULTIPLE)?,
        table_rows: length("cos_xtp", table_rows)?,
        q_nx: [n, heads * head_dim],
        k_nx: [n, kv_heads * head_dim],
        q_bhtd: [batch, heads, tokens, head_dim],
        k_bktd: [batch, kv_heads, tokens, head_dim],
    })
}

impl Lengths {
    fn arguments(&self) -> [Argument; 6] {
        [
            self.rows.into(),
            self.tokens.into(),
            self.query_heads.into(),
            self.key_heads.into(),
            self.width.into(),
            self.table_rows.into(),
        ]
    }

    /// All heads side by side, and the tokens in at most so many slices.
    fn grid(&self, slices: u32) -> Grid {
        let pairs = self.width.cast_unsigned() / MULTIPLE as u32;
        let heads = (self.query_heads + 2 * self.key_heads).cast_unsigned();
        let together = (THREADS / pairs).clamp(1, heads);
        Grid {
            blocks: (
                slices.min(self.rows.cast_unsigned()),
                heads.div_ceil(together),
            ),
            threads: (pairs, together),
            shared_bytes: 0,
        }
    }
}

impl CudaKernels {
    /// [B, H or K, T, d] in bf16.
    pub(super) fn heads_first(
        &self,
        name: &'static str,
        tensor: &Tensor,
        shape: [i64; 4],
    ) -> Result<Argument, KernelError> {
        self.tensors.vectors(name, tensor, Kind::BFloat16, &shape)
    }

    /// Both biases, or two null pointers.
    fn biases(&self, input: &HeadsIn<'_>, l: &Lengths) -> Result<[Argument; 2], KernelError> {
        let Some([query, key]) = input.biases else {
            return Ok([Argument::NULL; 2]);
        };
        let bias =
            |name, tensor, width| self.tensors.vectors(name, tensor, Kind::BFloat16, &[width]);
        Ok([
            bias("bias_q", query, l.q_nx[1])?,
            bias("bias_k", key, l.k_nx[1])?,
        ])
    }

    /// Cosines and sines.
    fn tables(&self, input: &HeadsIn<'_>, l: &Lengths) -> Result<[Argument; 2], KernelError> {
        let shape = [
            i64::from(l.table_rows),
            i64::from(l.tokens),
            i64::from(l.width) / 2,
        ];
        let table = |name, tensor| self.tensors.vectors(name, tensor, Kind::Float, &shape);
        Ok([
            table("cos_xtp", input.cos_xtp)?,
            table("sin_xtp", input.sin_xtp)?,
        ])
    }

    pub(super) fn try_heads(
        &self,
        input: &HeadsIn<'_>,
        q_bhtd: &mut Tensor,
        k_bktd: &mut Tensor,
        v_bktd: &mut Tensor,
    ) -> Result<(), KernelError> {
        let l = lengths(input)?;
        let (pre_q, stride_q) = self.tensors.rows("pre_q_nx", input.pre_q_nx, l.q_nx)?;
        let (pre_k, stride_k) = self.tensors.rows("pre_k_nx", input.pre_k_nx, l.k_nx)?;
        let (v, stride_v) = self.tensors.rows("v_nx", input.v_nx, l.k_nx)?;
        let [bias_q, bias_k] = self.biases(input, &l)?;
        let [cosines, sines] = self.tables(input, &l)?;
        let pointers = [
            pre_q,
            pre_k,
            v,
            bias_q,
            bias_k,
            cosines,
            sines,
            self.heads_first("q_bhtd", q_bhtd, l.q_bhtd)?,
            self.heads_first("k_bktd", k_bktd, l.k_bktd)?,
            self.heads_first("v_bktd", v_bktd, l.k_bktd)?,
        ];
        let strides = [stride_q, stride_k, stride_v];
        let scale = [Argument::from(input.key_scale as f32)];
        let arguments = [&pointers[..], &strides, &l.arguments(), &scale].concat();
        let grid = l.grid(16 * self.gpu.processors());
        self.gpu.launch("heads", grid, &arguments)
    }

    pub(super) fn try_heads_backward(
        &self,
        input: &HeadsIn<'_>,
        dq_bhtd: &Tensor,
        dk_bktd: &Tensor,
        dv_bktd: &Tensor,
        out: HeadsGrad<'_>,
    ) -> Result<(), KernelError> {
        let l = lengths(input)?;
        let [bias_q, bias_k] = self.biases(input, &l)?;
        let [cosines, sines] = self.tables(input, &l)?;
        let (pre_q, stride_q) = self.tensors.rows("pre_q_nx", input.pre_q_nx, l.q_nx)?;
        let (pre_k, stride_k) = self.tensors.rows("pre_k_nx", input.pre_k_nx, l.k_nx)?;
        let (dpre_q, dstride_q) = self.tensors.rows("dpre_q_nx", out.dpre_q_nx, l.q_nx)?;
        let (dpre_k, dstride_k) = self.tensors.rows("dpre_k_nx", out.dpre_k_nx, l.k_nx)?;
        let (dv, dstride_v) = self.tensors.rows("dv_nx", out.dv_nx, l.k_nx)?;
        // Each slice makes a row of parts of the biases' gradients, so not more of them than fill the GPU.
        let grid = l.grid(4 * self.gpu.processors());
        let parts_width = l.q_nx[1] + l.k_nx[1];
        let parts = self.scratch(i64::from(grid.blocks.0) * parts_width * 4);
        let pointers = [
            self.heads_first("dq_bhtd", dq_bhtd, l.q_bhtd)?,
            self.heads_first("dk_bktd", dk_bktd, l.k_bktd)?,
            self.heads_first("dv_bktd", dv_bktd, l.k_bktd)?,
            pre_q,
            pre_k,
            bias_q,
            bias_k,
            cosines,
            sines,
            dpre_q,
            dpre_k,
            dv,
            parts,
        ];
        let strides = [stride_q, stride_k, dstride_q, dstride_k, dstride_v];
        let scale = [Argument::from(input.key_scale as f32)];
        let arguments = [&pointers[..], &strides, &l.arguments(), &scale].concat();
        let sums = self.bias_gradients(input, &out.dbiases_sum, &l)?;
        self.gpu.launch("heads_backward", grid, &arguments)?;
        let stride = length("dbiases_sum", parts_width)?;
        let mut begin = 0;
        for (sum, width) in sums.into_iter().flatten() {
            let width = length("dbiases_sum", width)?;
            self.column_sum(parts.offset(begin * 4), sum, grid.blocks.0, [width, stride])?;
            begin += i64::from(width);
        }
        Ok(())
    }

    /// Where the biases' gradients go, and how wide they are.
    fn bias_gradients(
        &self,
        input: &HeadsIn<'_>,
        sums: &Option<[&mut Tensor; 2]>,
        l: &Lengths,
    ) -> Result<Option<[(Argument, i64); 2]>, KernelError> {
        let sum = |name, tensor, width| {
            let sum = self.tensors.numbers(name, tensor, Kind::Float, &[width])?;
            Ok((sum, width))
        };
        match (input.biases, sums) {
            (None, None) => Ok(None),
            (Some(_), Some([query, key])) => Ok(Some([
                sum("dbias_q_sum", query, l.q_nx[1])?,
                sum("dbias_k_sum", key, l.k_nx[1])?,
            ])),
            (biases, _) => Err(wrong(
                "dbiases_sum",
                format!(
                    "biases are {}given and their gradients are not alike",
                    if biases.is_some() { "" } else { "not " }
                ),
            )),
        }
    }
}
