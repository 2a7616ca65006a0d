//! Launch of the embedding's gradient.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::Grid,
    tensors::{VECTOR, length, matrix, width},
};

/// Its source.
pub const SOURCE: Source = Source {
    name: "embedding.cu",
    text: include_str!("embedding.cu"),
    kernels: &["embedding_backward"],
};

/// Threads of a block; the kernel keeps as many matches.
const THREADS: u32 = 512;

impl CudaKernels {
    pub(super) fn try_embedding_backward(
        &self,
        dx_nd: &Tensor,
        ids_n: &Tensor,
        dembedding_vd_sum: &mut Tensor,
    ) -> Result<(), KernelError> {
        let shape @ [n, d] = matrix("dx_nd", dx_nd)?;
        let [v, _] = matrix("dembedding_vd_sum", dembedding_vd_sum)?;
        let (rows, columns) = (length("dx_nd", n)?, width("dx_nd", d, VECTOR)?);
        let t = self.tensors;
        let arguments = [
            t.vectors("dx_nd", dx_nd, Kind::BFloat16, &shape)?,
            t.numbers("ids_n", ids_n, Kind::Int64, &[n])?,
            t.vectors("dembedding_vd_sum", dembedding_vd_sum, Kind::Float, &[v, d])?,
            rows.into(),
            columns.into(),
            length("dembedding_vd_sum", v)?.into(),
        ];
        let vectors = columns.cast_unsigned() / VECTOR as u32;
        let grid = Grid {
            blocks: (rows.cast_unsigned(), vectors.div_ceil(THREADS)),
            threads: (THREADS, 1),
            shared_bytes: 0,
        };
        self.gpu.launch("embedding_backward", grid, &arguments)
    }
}
