//! Launches of the gradient's norm, its clipping and AdamW. Nothing here waits for the GPU: what one kernel finds out, the
//! next one reads from device memory.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::wrong,
};

/// Its source.
pub const SOURCE: Source = Source {
    name: "optimizer.cu",
    text: include_str!("optimizer.cu"),
    kernels: &["square_parts", "square_sum", "clip", "adamw"],
};

/// What clipping reads and writes. All on the device.
pub struct Clip<'a> {
    /// Sum of the squares of the gradient of the summed loss, over all ranks: fp64 [1].
    pub squares_1: &'a Tensor,
    /// The summed loss of all ranks: fp64 [1].
    pub loss_sum_1: &'a Tensor,
    /// Targets behind both sums.
    pub targets: f64,
    /// The norm that the gradient of the mean loss is brought down to.
    pub limit: f64,
    /// Written: the norm of the gradient of the mean loss, before clipping. fp64 [1].
    pub norm_1: &'a mut Tensor,
    /// Written: what [`CudaKernels::adamw`] multiplies the gradient by, and whether it does nothing, because norm or loss
    /// are not finite (0 or 1). fp32 [2].
    pub control_2: &'a mut Tensor,
}

/// The part of the flat buffers that one rank updates: m numbers each.
pub struct Shard<'a> {
    /// Masters: fp32 [m].
    pub master_m: &'a mut Tensor,
    /// Gradient sum: fp32 [m].
    pub gradient_m: &'a Tensor,
    /// First moment: fp32 [m].
    pub exp_avg_m: &'a mut Tensor,
    /// Second moment: fp32 [m].
    pub exp_avg_sq_m: &'a mut Tensor,
    /// The rounded masters, if the model computes on such: bf16 [m].
    pub compute_m: Option<&'a mut Tensor>,
    /// How many numbers, from the first one on, weight decay shrinks.
    pub decayed: i64,
}

/// What is the same for every number of one update; see [`AdamW`](crate::optim::AdamW).
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// beta_1 and beta_2.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Learning rate / (1 - beta_1^t).
    pub step_size: f64,
    /// sqrt(1 - beta_2^t).
    pub root_correction: f64,
    /// 1 - learning rate * weight decay.
    pub decay: f64,
}

fn blocks(number: u32, threads: u32) -> Grid {
    Grid {
        blocks: (number, 1),
        threads: (threads, 1),
        shared_bytes: 0,
    }
}

impl CudaKernels {
    /// Writes the sum of the squares of a flat fp32 buffer, in fp64 and always in the same order, to `squares_1` (fp64
    /// [1]).
    pub fn squared_norm(&self, flat_m: &Tensor, squares_1: &mut Tensor) -> Result<(), KernelError> {
        const THREADS: u32 = 512;
        let count = flat_m.numel() as i64;
        let flat = self
            .tensors
            .vectors("gradient_m", flat_m, Kind::Float, &[count])?;
        let squares = self
            .tensors
            .numbers("squares_1", squares_1, Kind::Double, &[1])?;
        let number = 4 * self.gpu.processors();
        let parts = self.scratch(i64::from(number) * 8);
        let arguments = [flat, parts, count.into()];
        self.gpu
            .launch("square_parts", blocks(number, THREADS), &arguments)?;
        let arguments = [parts, squares, number.cast_signed().into()];
        self.gpu
            .launch("square_sum", blocks(1, THREADS), &arguments)
    }

    /// Decides what the gradient is multiplied by, and whether the step is skipped.
    pub fn clip(&self, clip: Clip<'_>) -> Result<(), KernelError> {
        let double = |name, tensor| self.tensors.numbers(name, tensor, Kind::Double, &[1]);
        let arguments = [
            double("squares_1", clip.squares_1)?,
            double("loss_sum_1", clip.loss_sum_1)?,
            double("norm_1", clip.norm_1)?,
            self.tensors
                .numbers("control_2", clip.control_2, Kind::Float, &[2])?,
            clip.targets.into(),
            clip.limit.into(),
        ];
        self.gpu.launch("clip", blocks(1, 1), &arguments)
    }

    /// One update of a shard: the formulas of [`AdamW`](crate::optim::AdamW), each operation rounded by itself and in the
    /// same order. `control_2` is what [`clip`](Self::clip) wrote.
    pub fn adamw(
        &self,
        shard: Shard<'_>,
        update: &Update,
        control_2: &Tensor,
    ) -> Result<(), KernelError> {
        const THREADS: u32 = 256;
        let count = shard.master_m.numel() as i64;
        if !(0..=count).contains(&shard.decayed) {
            let problem = format!("{} of its {count} numbers decay", shard.decayed);
            return Err(wrong("master_m", problem));
        }
        let flat =
            |name, tensor: &Tensor| self.tensors.vectors(name, tensor, Kind::Float, &[count]);
        let compute = shard.compute_m.map_or(Ok(Argument::NULL), |compute| {
            self.tensors
                .vectors("compute_m", compute, Kind::BFloat16, &[count])
        });
        let single = |number: f64| Argument::from(number as f32);
        let (beta1, beta2) = update.betas;
        let arguments = [
            flat("master_m", shard.master_m)?,
            flat("gradient_m", shard.gradient_m)?,
            flat("exp_avg_m", shard.exp_avg_m)?,
            flat("exp_avg_sq_m", shard.exp_avg_sq_m)?,
            compute?,
            self.tensors
                .numbers("control_2", control_2, Kind::Float, &[2])?,
            count.into(),
            shard.decayed.into(),
            single(beta1),
            single(1.0 - beta1),
            single(beta2),
            single(1.0 - beta2),
            single(update.eps),
            single(update.step_size),
            single(update.root_correction),
            single(update.decay),
        ];
        let wanted = (count as u64).div_ceil(4 * u64::from(THREADS)).max(1);
        let number = wanted.min(u64::from(32 * self.gpu.processors())) as u32;
        self.gpu
            .launch("adamw", blocks(number, THREADS), &arguments)
    }
}
