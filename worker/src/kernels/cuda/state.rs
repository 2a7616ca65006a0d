//! Launches of what turns masters into halves and back, and of fingerprints.

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
    name: "state.cu",
    text: include_str!("state.cu"),
    kernels: &[
        "split_masters",
        "join_masters",
        "fingerprint_words",
        "fingerprint_halves",
    ],
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

    pub(super) fn try_split(
        &self,
        master_m: &Tensor,
        param_m: &mut Tensor,
        remainder_m: &mut Tensor,
    ) -> Result<(), KernelError> {
        let [master, param, remainder, count] = self.halves(master_m, param_m, remainder_m)?;
        let grid = self.sweep(master_m.numel() as i64);
        self.gpu
            .launch("split_masters", grid, &[master, param, remainder, count])
    }

    pub(super) fn try_join(
        &self,
        param_m: &Tensor,
        remainder_m: &Tensor,
        master_m: &mut Tensor,
    ) -> Result<(), KernelError> {
        let [master, param, remainder, count] = self.halves(master_m, param_m, remainder_m)?;
        let grid = self.sweep(master_m.numel() as i64);
        self.gpu
            .launch("join_masters", grid, &[param, remainder, master, count])
    }

    /// Masters, parameters and remainders, and how many of each.
    fn halves(
        &self,
        master_m: &Tensor,
        param_m: &Tensor,
        remainder_m: &Tensor,
    ) -> Result<[Argument; 4], KernelError> {
        let count = master_m.numel() as i64;
        let flat = |name, tensor: &Tensor, kind| self.tensors.vectors(name, tensor, kind, &[count]);
        Ok([
            flat("master_m", master_m, Kind::Float)?,
            flat("param_m", param_m, Kind::BFloat16)?,
            flat("remainder_m", remainder_m, Kind::Int16)?,
            count.into(),
        ])
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
