//! Launches of the sum over ranks, which goes on a stream that the caller names.

use tch::{Device, Kind, Tensor};

use super::{
    error::KernelError,
    launch::{Gpu, Grid, Queue},
    load, reduce,
    tensors::{Tensors, wrong},
};

/// The kernel that adds what GPUs have brought together, loaded on one of them.
pub struct RankSum {
    gpu: Gpu,
    tensors: Tensors,
}

impl RankSum {
    /// Compiles the kernel for the GPU with this index, or takes it from the cache, and loads it. The device has been opened
    /// by [`device::open`](crate::device::open).
    pub fn new(index: usize) -> Result<RankSum, KernelError> {
        let mut gpu = Gpu::open(index)?;
        let architecture = gpu.architecture()?;
        load(&mut gpu, &architecture, &[reduce::SOURCE])?;
        Ok(RankSum {
            gpu,
            tensors: Tensors {
                device: Device::Cuda(index),
            },
        })
    }

    /// Replaces `mine_m`, fp32, the numbers of rank `rank`, by the sum over all ranks in their order. `theirs_m` are those
    /// of the others one behind the other, without a gap, in that order, too.
    pub fn add(
        &self,
        queue: &Queue,
        mine_m: &Tensor,
        theirs_m: &Tensor,
        rank: u32,
    ) -> Result<(), KernelError> {
        const THREADS: u32 = 256;
        let (count, total) = (mine_m.numel() as i64, theirs_m.numel() as i64);
        if count == 0 {
            return Ok(());
        }
        let world = total / count + 1;
        if total % count != 0 || i64::from(rank) >= world {
            let problem = format!("{total} numbers are not those of the ranks beside {rank}");
            return Err(wrong("theirs_m", problem));
        }
        let arguments = [
            self.tensors
                .numbers("mine_m", mine_m, Kind::Float, &[count])?,
            self.tensors
                .numbers("theirs_m", theirs_m, Kind::Float, &[total])?,
            count.into(),
            rank.cast_signed().into(),
            (world as i32).into(),
        ];
        let wanted = (count as u64).div_ceil(u64::from(THREADS));
        let grid = Grid {
            blocks: (wanted.min(u64::from(4 * self.gpu.processors())) as u32, 1),
            threads: (THREADS, 1),
            shared_bytes: 0,
        };
        self.gpu.launch_on(queue, "rank_sum", grid, &arguments)
    }
}
