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
    kernels: &["square_parts", "square_sum", "adamw", "adamw_bf16_moments"],
};

fn blocks(number: u32, threads: u32) -> Grid {
    Grid {
        blocks: (number, 1),
        threads: (threads, 1),
        shared_bytes: 0,
    }
}

impl CudaKernels {
    pub(super) fn try_squared_norm(&self, flat_m: &Tensor) -> Result<f64, KernelError> {
        const THREADS: u32 = 512;
        let count = flat_m.numel() as i64;
        let flat = self
            .tensors
            .vectors("flat_m", flat_m, Kind::Float, &[count])?;
        let number = 4 * self.gpu.processors();
        let parts = self.scratch(i64::from(number) * 8);
        let arguments = [flat, parts, count.into()];
        self.gpu
            .launch("square_parts", blocks(number, THREADS), &arguments)?;
        let squares_1 = Tensor::empty([1], (Kind::Double, self.tensors.device));
        let sum = Argument::pointer(&squares_1);
        let arguments = [parts, sum, number.cast_signed().into()];
        self.gpu
            .launch("square_sum", blocks(1, THREADS), &arguments)?;
        Ok(squares_1.double_value(&[0]))
    }

    pub(super) fn try_adamw(&self, shard: Shard<'_>, update: &Update) -> Result<(), KernelError> {
        let count = shard.param_m.numel() as i64;
        if !(0..=count).contains(&shard.decayed) {
            let problem = format!("{} of its {count} numbers decay", shard.decayed);
            return Err(wrong("param_m", problem));
        }
        let Some(remainder) = shard.remainder_m else {
            let problem = "there is none, and the parameters are bf16".to_owned();
            return Err(wrong("remainder_m", problem));
        };
        let (kernel, moments) = match shard.exp_avg_m.kind() {
            Kind::BFloat16 => ("adamw_bf16_moments", Kind::BFloat16),
            _ => ("adamw", Kind::Float),
        };
        let flat = |name, tensor: &Tensor, kind| self.tensors.vectors(name, tensor, kind, &[count]);
        let single = |number: f64| Argument::from(number as f32);
        let (beta1, beta2) = update.betas;
        let arguments = [
            flat("param_m", shard.param_m, Kind::BFloat16)?,
            flat("remainder_m", remainder, Kind::Int16)?,
            flat("gradient_m", shard.gradient_m, Kind::Float)?,
            flat("exp_avg_m", shard.exp_avg_m, moments)?,
            flat("exp_avg_sq_m", shard.exp_avg_sq_m, moments)?,
            count.into(),
            shard.decayed.into(),
            shard.first.into(),
            update.rounding.cast_signed().into(),
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
        self.gpu.launch(kernel, self.sweep(count), &arguments)
    }
}
