//! Launches of the gradient's norm and of AdamW.

use tch::{Kind, Tensor};

use super::{
    CudaKernels,
    compile::Source,
    error::KernelError,
    launch::{Argument, Grid},
    tensors::wrong,
};
use crate::kernels::{Shard, Update};

/// Its source.
pub const SOURCE: Source = Source {
    name: "optimizer.cu",
    text: include_str!("optimizer.cu"),
    kernels: &["square_parts", "square_sum", "adamw"],
};

fn blocks(number: u32, threads: u32) -> Grid {
    Grid {
        blocks: (number, 1),
        threads: (threads, 1),
        shared_bytes: 0,
    }
}

impl CudaKernels {
    pub(super) fn try_squared_norm(&self, flats_m: &[Tensor]) -> Result<f64, KernelError> {
        const THREADS: u32 = 512;
        let number = 4 * self.gpu.processors();
        let parts = self.scratch(i64::from(number) * 8);
        let squares_n = Tensor::empty([flats_m.len() as i64], (Kind::Double, self.tensors.device));
        for (flat_m, at) in flats_m.iter().zip(0..) {
            let count = flat_m.numel() as i64;
            let flat = self
                .tensors
                .vectors("flat_m", flat_m, Kind::Float, &[count])?;
            let arguments = [flat, parts, count.into()];
            self.gpu
                .launch("square_parts", blocks(number, THREADS), &arguments)?;
            let sum = Argument::pointer(&squares_n).offset(8 * at);
            let arguments = [parts, sum, number.cast_signed().into()];
            self.gpu
                .launch("square_sum", blocks(1, THREADS), &arguments)?;
        }
        let mut squares = vec![0.0; flats_m.len()];
        squares_n.copy_data(&mut squares, flats_m.len());
        Ok(squares.iter().sum())
    }

    pub(super) fn try_adamw(&self, shard: Shard<'_>, update: &Update) -> Result<(), KernelError> {
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
            count.into(),
            shard.decayed.into(),
            single(update.gradient_scale),
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
