//! Launches of fingerprints.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::wrong,
};
use crate::kernels::mix;

/// Its source.
pub const SOURCE: Source = Source {
    name: "fingerprint.cu",
    text: include_str!("fingerprint.cu"),
    kernels: &["fingerprint_words", "fingerprint_halves"],
};

impl CudaKernels {
    /// Threads for all of `count` numbers, four each or more.
    pub(super) fn sweep(&self, count: i64) -> Grid {
        const THREADS: u32 = 256;
        let wanted = (count as u64).div_ceil(4 * u64::from(THREADS)).max(1);
        let number = wanted.min(u64::from(32 * self.gpu.processors())) as u32;
        Grid {
            blocks: (number, 1),
            threads: (THREADS, 1),
            shared_bytes: 0,
        }
    }

    pub(super) fn try_fingerprint(
        &self,
        flat_m: &Tensor,
        first: i64,
        key: u64,
    ) -> Result<[u64; 4], KernelError> {
        let (count, kind) = (flat_m.numel() as i64, flat_m.kind());
        let kernel = match kind {
            Kind::Float => "fingerprint_words",
            Kind::BFloat16 | Kind::Int16 => "fingerprint_halves",
            kind => {
                let problem = format!("it is {kind:?}, not Float, BFloat16 or Int16");
                return Err(wrong("flat_m", problem));
            }
        };
        let sums_4 = Tensor::zeros([4], (Kind::Int64, self.tensors.device));
        let [key0, key1, key2, key3] =
            [0, 1, 2, 3].map(|lane| mix::number(key, lane).cast_signed().into());
        let arguments = [
            self.tensors.vectors("flat_m", flat_m, kind, &[count])?,
            Argument::pointer(&sums_4),
            count.into(),
            first.into(),
            key0,
            key1,
            key2,
            key3,
        ];
        self.gpu.launch(kernel, self.sweep(count), &arguments)?;
        Ok([0, 1, 2, 3].map(|lane| sums_4.int64_value(&[lane]).cast_unsigned()))
    }
}
