//! AdamW and the gradient's norm, a chunk of the flat buffers at a time.

use tch::{Kind, Tensor};

use crate::{
    kernels::{Shard, Update},
    optim::chunks,
};

pub fn squared_norm(flats_m: &[Tensor]) -> f64 {
    let squares = flats_m.iter().flat_map(|flat_m| {
        chunks(flat_m.size()[0]).map(move |(start, length)| {
            let norm = flat_m
                .narrow(0, start, length)
                .norm_scalaropt_dtype(2, Kind::Double)
                .double_value(&[]);
            norm * norm
        })
    });
    squares.sum()
}

pub fn adamw(mut shard: Shard<'_>, update: &Update) {
    let decayed = shard.decayed;
    let plain = shard.master_m.size()[0] - decayed;
    for (start, length) in chunks(decayed) {
        update_range(&mut shard, (start, length), update, true);
    }
    for (start, length) in chunks(plain) {
        update_range(&mut shard, (decayed + start, length), update, false);
    }
}

fn update_range(shard: &mut Shard<'_>, (start, length): (i64, i64), update: &Update, decays: bool) {
    let range = |flat_m: &Tensor| flat_m.narrow(0, start, length);
    let (mut master, mut average, mut square) = (
        range(shard.master_m),
        range(shard.exp_avg_m),
        range(shard.exp_avg_sq_m),
    );
    let gradient = range(shard.gradient_m) * update.gradient_scale;
    let (beta1, beta2) = update.betas;

    let _ = average
        .g_mul_scalar_(beta1)
        .g_add_(&(&gradient * (1.0 - beta1)));
    let _ = square
        .g_mul_scalar_(beta2)
        .g_add_(&(gradient.square() * (1.0 - beta2)));
    let mut denominator = square.sqrt();
    let _ = denominator
        .g_div_scalar_(update.root_correction)
        .g_add_scalar_(update.eps);
    if decays {
        let _ = master.g_mul_scalar_(update.decay);
    }
    let _ = master.g_sub_(&(average.g_div(&denominator) * update.step_size));
    if let Some(compute_m) = &shard.compute_m {
        range(compute_m).copy_(&master);
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::optim::CHUNK;

    #[test]
    fn the_norm_spans_chunks_and_buffers() {
        let elements = CHUNK + 7;
        let flat = Tensor::full([elements], 2.0, (Kind::Float, Device::Cpu));
        let rest = Tensor::full([3], 2.0, (Kind::Float, Device::Cpu));
        let norm = squared_norm(&[flat, rest]).sqrt();
        assert!((norm - 2.0 * ((elements + 3) as f64).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn large_values_do_not_overflow_and_nan_shows() {
        let flat = Tensor::from_slice(&[1e30f32, 1e30]);
        assert!((squared_norm(&[flat]) / 2e60 - 1.0).abs() < 1e-6);
        assert!(squared_norm(&[Tensor::from_slice(&[1.0f32, f32::NAN])]).is_nan());
        assert!(squared_norm(&[Tensor::from_slice(&[1.0f32, f32::INFINITY])]).is_infinite());
    }
}
