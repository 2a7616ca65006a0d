//! AdamW and the gradient's norm, a chunk of the flat buffers at a time.

use tch::{Kind, Tensor};

use super::state;
use crate::{
    kernels::{Shard, Update},
    optim::chunks,
};

pub fn squared_norm(flat_m: &Tensor) -> f64 {
    let squares = chunks(flat_m.size()[0]).map(|(start, length)| {
        let norm = flat_m
            .narrow(0, start, length)
            .norm_scalaropt_dtype(2, Kind::Double)
            .double_value(&[]);
        norm * norm
    });
    squares.sum()
}

pub fn adamw(mut shard: Shard<'_>, update: &Update) {
    let decayed = shard.decayed;
    let plain = shard.param_m.size()[0] - decayed;
    for (start, length) in chunks(decayed) {
        update_range(&mut shard, (start, length), update, true);
    }
    for (start, length) in chunks(plain) {
        update_range(&mut shard, (decayed + start, length), update, false);
    }
}

fn update_range(shard: &mut Shard<'_>, (start, length): (i64, i64), update: &Update, decays: bool) {
    let range = |flat_m: &Tensor| flat_m.narrow(0, start, length);
    let (param, exp_avg, exp_avg_sq) = (
        range(shard.param_m),
        range(shard.exp_avg_m),
        range(shard.exp_avg_sq_m),
    );
    let remainder = shard.remainder_m.as_deref().map(range);
    let mut master = match &remainder {
        Some(remainder) => {
            let master = Tensor::empty([length], (Kind::Float, param.device()));
            state::join(&param, remainder, &master);
            master
        }
        None => param.shallow_clone(),
    };
    // What is fp32 already is changed in place.
    let mut average = exp_avg.to_kind(Kind::Float);
    let mut square = exp_avg_sq.to_kind(Kind::Float);
    let gradient = range(shard.gradient_m) * update.gradient_scale;
    let (beta1, beta2) = update.betas;

    let _ = average
        .g_mul_scalar_(beta1)
        .g_add_(&(&gradient * (1.0 - beta1)));
    let _ = square
        .g_mul_scalar_(beta2)
        .g_add_(&(gradient.square() * (1.0 - beta2)));
    let mut denominator = root(&square);
    let _ = denominator
        .g_div_scalar_(update.root_correction)
        .g_add_scalar_(update.eps);
    if decays {
        let _ = master.g_mul_scalar_(update.decay);
    }
    let _ = master.g_sub_(&(average.g_div(&denominator) * update.step_size));

    if let Some(remainder) = &remainder {
        state::split(&master, &param, remainder);
    }
    if exp_avg.kind() == Kind::BFloat16 {
        // The places that the contract names: see `Update::rounding`.
        let random = state::random(update.rounding, shard.first + start, &average);
        state::round(&average, &random, 48, &exp_avg);
        state::round(&square, &random, 32, &exp_avg_sq);
    }
}

/// The root, rounded right: libtorch's own on the processor is not always, one of fp64 rounded once more is.
fn root(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Double).sqrt_().to_kind(Kind::Float)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::Device;

    use super::*;
    use crate::{kernels::mix, optim::CHUNK};

    const UPDATE: Update = Update {
        gradient_scale: 1.0,
        betas: (0.9, 0.95),
        eps: 1e-8,
        step_size: 1e-2,
        root_correction: 1.0,
        decay: 0.999,
        rounding: 3,
    };

    struct State {
        param: Tensor,
        remainder: Option<Tensor>,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    }

    impl State {
        fn new(masters: &Tensor, parameters: Kind, moments: Kind) -> State {
            let zeros = |kind| masters.zeros_like().to_kind(kind);
            let split = |masters| {
                let (param, remainder) = (zeros(parameters), zeros(Kind::Int16));
                state::split(masters, &param, &remainder);
                (param, Some(remainder))
            };
            let (param, remainder) = match parameters {
                Kind::Float => (masters.copy(), None),
                _ => split(masters),
            };
            State {
                param,
                remainder,
                exp_avg: zeros(moments),
                exp_avg_sq: zeros(moments),
            }
        }

        /// One update of the part from `first` on, which is `length` long.
        fn update_part(
            &self,
            gradient: &Tensor,
            update: &Update,
            [first, length, decayed]: [i64; 3],
        ) {
            let range = |flat: &Tensor| flat.narrow(0, first, length);
            let mut remainder = self.remainder.as_ref().map(range);
            let shard = Shard {
                param_m: &mut range(&self.param),
                remainder_m: remainder.as_mut(),
                gradient_m: &range(gradient),
                exp_avg_m: &mut range(&self.exp_avg),
                exp_avg_sq_m: &mut range(&self.exp_avg_sq),
                decayed,
                first,
            };
            adamw(shard, update);
        }

        fn masters(&self) -> Tensor {
            let Some(remainder) = &self.remainder else {
                return self.param.copy();
            };
            let masters = self.param.to_kind(Kind::Float);
            state::join(&self.param, remainder, &masters);
            masters
        }

        fn fingerprints(&self) -> Vec<[u64; 4]> {
            let flats = [&self.param, &self.exp_avg, &self.exp_avg_sq].into_iter();
            flats
                .chain(&self.remainder)
                .map(|flat| state::fingerprint(flat, 0, 0).unwrap())
                .collect()
        }
    }

    fn randn(count: i64) -> Tensor {
        Tensor::randn([count], (Kind::Float, Device::Cpu))
    }

    /// bf16, ties away from zero, from an fp32 copy of everything: what training with separate masters computes on.
    fn rounded(masters: &Tensor) -> Tensor {
        let (param, remainder) = (
            masters.to_kind(Kind::BFloat16),
            masters.to_kind(Kind::Int16),
        );
        state::split(masters, &param, &remainder);
        param
    }

    #[test]
    fn split_masters_train_as_separate_ones_do_to_the_bit() {
        let (masters, target) = (randn(1000), randn(1000));
        let split = State::new(&masters, Kind::BFloat16, Kind::Float);
        let whole = State::new(&masters, Kind::Float, Kind::Float);
        for _ in 0..50 {
            let gradient = |param: &Tensor| param.to_kind(Kind::Float) - &target;
            split.update_part(&gradient(&split.param), &UPDATE, [0, 1000, 600]);
            whole.update_part(&gradient(&rounded(&whole.param)), &UPDATE, [0, 1000, 600]);
        }
        assert!(split.masters() == whole.param);
        assert!(split.param == rounded(&whole.param));
        assert!(split.exp_avg == whole.exp_avg && split.exp_avg_sq == whole.exp_avg_sq);
        let moved = (split.masters() - &masters).abs();
        let moved = moved.mean(Kind::Double).double_value(&[]);
        assert!(moved > 0.1, "it did train: {moved}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn cuts_into_shards_change_no_bit(cuts in prop::collection::vec(0..=500i64, 0..4), seed: u32) {
            tch::manual_seed(i64::from(seed));
            let (masters, gradients) = (randn(500), [randn(500), randn(500)]);
            let trained = |cuts: &[i64]| {
                let state = State::new(&masters, Kind::BFloat16, Kind::BFloat16);
                for (gradient, step) in gradients.iter().zip(0..) {
                    let update = Update { rounding: mix::number(u64::from(seed), step), ..UPDATE };
                    for ends in cuts.windows(2) {
                        let length = ends[1] - ends[0];
                        let decayed = (300 - ends[0]).clamp(0, length);
                        state.update_part(gradient, &update, [ends[0], length, decayed]);
                    }
                }
                state.fingerprints()
            };
            let mut cuts = [cuts, vec![0, 500]].concat();
            cuts.sort_unstable();
            prop_assert_eq!(trained(&cuts), trained(&[0, 500]));
        }
    }

    /// Both moments after `steps` of one constant gradient, kept in bf16: beside what they are in fp64, each as (mean
    /// over all numbers, largest deviation of one), relative.
    fn moments_of_a_constant(beta: f64, start: f64, steps: i32) -> [(f64, f64); 2] {
        const COUNT: i64 = 1024;
        const GRADIENT: f64 = 3.1e-4;
        let state = State::new(&randn(COUNT), Kind::BFloat16, Kind::BFloat16);
        let gradient = Tensor::full([COUNT], GRADIENT, (Kind::Float, Device::Cpu));
        let limits = [GRADIENT, GRADIENT * GRADIENT];
        let kept = [&state.exp_avg, &state.exp_avg_sq];
        for (moment, limit) in kept.iter().zip(limits) {
            let _ = moment.shallow_clone().fill_(start * limit);
        }
        let mut exact = kept.map(|moment| moment.double_value(&[0]));
        for step in 0..steps {
            let update = Update {
                betas: (beta, beta),
                rounding: mix::number(11, step as u64),
                ..UPDATE
            };
            state.update_part(&gradient, &update, [0, COUNT, 0]);
            for (exact, limit) in exact.iter_mut().zip(limits) {
                *exact = beta * *exact + (1.0 - beta) * limit;
            }
        }
        [0, 1].map(|moment: usize| {
            let off = kept[moment].to_kind(Kind::Double) / exact[moment] - 1.0;
            let largest = off.abs().max().double_value(&[]);
            (off.mean(Kind::Double).double_value(&[]), largest)
        })
    }

    /// The second moment of the same gradient where every step rounds to nearest, relative to its limit.
    fn rounded_to_nearest(beta: f64, start: f64, steps: i32) -> f64 {
        let limit = 3.1e-4f64 * 3.1e-4;
        let nearest = |x: f64| half::bf16::from_f64(x).to_f64();
        let step = |square, _| nearest(beta * square + (1.0 - beta) * limit);
        (0..steps).fold(nearest(start * limit), step) / limit
    }

    /// From nothing and from twice too much, over ten time constants. Where a step is less than a place of bf16 (2^-8 to
    /// 2^-7 of the number), random rounding takes a number only towards its limit, so each ends within one place of it, or
    /// two where its last step came late. Its deviation is at most half a place, and the mean's over 1024 numbers 1 / 32 of
    /// that; five times as much is allowed. Rounding to nearest takes no step of less than half a place.
    #[test]
    fn small_updates_of_bf16_moments_are_not_lost() {
        const PLACE: f64 = 1.0 / 128.0;
        for (beta, steps) in [(0.95, 200), (0.999, 10_000)] {
            for start in [0.0, 2.0] {
                for (mean, largest) in moments_of_a_constant(beta, start, steps) {
                    let what = format!("beta {beta} from {start}: mean {mean}, largest {largest}");
                    assert!(mean.abs() < 5.0 / 32.0 * 0.5 * PLACE, "{what}");
                    assert!(largest < 2.0 * PLACE, "{what}");
                }
            }
        }
        let nearest = |beta, steps| [0.0, 2.0].map(|start| rounded_to_nearest(beta, start, steps));
        let [low, high] = nearest(0.95, 200);
        assert!(low < 0.97 && high > 1.03, "{low} {high}");
        let [low, high] = nearest(0.999, 10_000);
        assert!(low < 0.4 && high > 1.9, "{low} {high}");
    }

    #[test]
    fn padding_stays_zero() {
        let state = State::new(&randn(64).zeros_like(), Kind::BFloat16, Kind::BFloat16);
        let before = state.fingerprints();
        state.update_part(&randn(64).zeros_like(), &UPDATE, [0, 64, 32]);
        assert_eq!(state.fingerprints(), before);
    }

    #[test]
    fn the_norm_spans_chunks() {
        let elements = CHUNK + 7;
        let flat = Tensor::full([elements], 2.0, (Kind::Float, Device::Cpu));
        assert!((squared_norm(&flat).sqrt() - 2.0 * (elements as f64).sqrt()).abs() < 1e-6);
    }

    #[test]
    fn large_values_do_not_overflow_and_nan_shows() {
        let flat = Tensor::from_slice(&[1e30f32, 1e30]);
        assert!((squared_norm(&flat) / 2e60 - 1.0).abs() < 1e-6);
        assert!(squared_norm(&Tensor::from_slice(&[1.0f32, f32::NAN])).is_nan());
        assert!(squared_norm(&Tensor::from_slice(&[1.0f32, f32::INFINITY])).is_infinite());
    }
}
