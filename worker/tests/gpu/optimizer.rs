//! The optimizer's kernels: AdamW to the bit, the norm to the last digits of fp64.

use std::time::Instant;

use supra_worker::kernels::cuda::{Clip, CudaKernels, Shard, Update};
use tch::{Cuda, Device, Kind, Tensor};

use super::bench::{GPU, distance, poison, print_row};
use super::gpu;

const UPDATE: Update = Update {
    betas: (0.9, 0.95),
    eps: 1e-8,
    step_size: 3e-4 / (1.0 - 0.9 * 0.9 * 0.9),
    root_correction: 0.377_655_927,
    decay: 1.0 - 3e-4 * 0.1,
};

struct State {
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compute: Tensor,
}

impl State {
    fn random(count: i64, device: Device) -> State {
        let normal = || Tensor::randn([count], (Kind::Float, device));
        State {
            master: normal(),
            gradient: normal(),
            exp_avg: normal(),
            exp_avg_sq: normal().square(),
            compute: Tensor::full([count], f64::NAN, (Kind::BFloat16, device)),
        }
    }

    fn to(&self, device: Device) -> State {
        State {
            master: self.master.to_device(device).copy(),
            gradient: self.gradient.to_device(device).copy(),
            exp_avg: self.exp_avg.to_device(device).copy(),
            exp_avg_sq: self.exp_avg_sq.to_device(device).copy(),
            compute: self.compute.to_device(device).copy(),
        }
    }

    fn update(&mut self, kernels: &CudaKernels, decayed: i64, control_2: &Tensor) {
        let shard = Shard {
            master_m: &mut self.master,
            gradient_m: &self.gradient,
            exp_avg_m: &mut self.exp_avg,
            exp_avg_sq_m: &mut self.exp_avg_sq,
            compute_m: Some(&mut self.compute),
            decayed,
        };
        kernels.adamw(shard, &UPDATE, control_2).unwrap();
    }

    /// The same on the processor, operation by operation as `optim::AdamW` does it.
    fn update_by_libtorch(&mut self, decayed: i64, scale: f64) {
        let (beta1, beta2) = UPDATE.betas;
        let gradient = &self.gradient * scale;
        let _ = self
            .exp_avg
            .g_mul_scalar_(beta1)
            .g_add_(&(&gradient * (1.0 - beta1)));
        let _ = self
            .exp_avg_sq
            .g_mul_scalar_(beta2)
            .g_add_(&(gradient.square() * (1.0 - beta2)));
        // By way of fp64: libtorch's own root on the processor is not always rounded right.
        let mut denominator = self
            .exp_avg_sq
            .to_kind(Kind::Double)
            .sqrt()
            .to_kind(Kind::Float);
        let _ = denominator
            .g_div_scalar_(UPDATE.root_correction)
            .g_add_scalar_(UPDATE.eps);
        let _ = self
            .master
            .narrow(0, 0, decayed)
            .g_mul_scalar_(UPDATE.decay);
        let step = self.exp_avg.g_div(&denominator) * UPDATE.step_size;
        let _ = self.master.g_sub_(&step);
        self.compute = self.master.to_kind(Kind::BFloat16);
    }

    fn assert_equal(&self, other: &State) {
        let other = other.to(self.master.device());
        for (name, a, b) in [
            ("master", &self.master, &other.master),
            ("exp_avg", &self.exp_avg, &other.exp_avg),
            ("exp_avg_sq", &self.exp_avg_sq, &other.exp_avg_sq),
            ("compute", &self.compute, &other.compute),
        ] {
            let differing = a.ne_tensor(b).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(differing, 0, "{name}: {differing} of {} differ", a.numel());
        }
    }
}

#[test]
fn gpu_adamw_has_the_bits_of_its_formulas() {
    let Some(kernels) = gpu("adamw") else { return };
    for (count, decayed) in [(1, 1), (3, 0), (4097, 1000), (1 << 20, (1 << 19) + 1)] {
        let mut here = State::random(count, Device::Cpu);
        let mut there = here.to(GPU);
        let scale = 0.37f32;
        let run = Tensor::from_slice(&[scale, 0.0]).to_device(GPU);
        for _ in 0..3 {
            here.update_by_libtorch(decayed, f64::from(scale));
            there.update(&kernels, decayed, &run);
        }
        here.assert_equal(&there);
        let skip = Tensor::from_slice(&[f32::NAN, 1.0]).to_device(GPU);
        there.update(&kernels, decayed, &skip);
        here.assert_equal(&there);
    }
}

#[test]
fn gpu_clipping_follows_norm_and_loss() {
    let Some(kernels) = gpu("clip") else { return };
    let double = |number: f64| Tensor::from_slice(&[number]).to_device(GPU);
    let clip = |squares: f64, loss: f64| {
        let (mut norm, mut control) = (poison(&[1], Kind::Double), poison(&[2], Kind::Float));
        let clip = Clip {
            squares_1: &double(squares),
            loss_sum_1: &double(loss),
            targets: 10.0,
            limit: 2.0,
            norm_1: &mut norm,
            control_2: &mut control,
        };
        kernels.clip(clip).unwrap();
        let control = control.to_kind(Kind::Double);
        [
            norm.double_value(&[0]),
            control.double_value(&[0]),
            control.double_value(&[1]),
        ]
    };
    let close = |got: [f64; 3], want: [f64; 3]| {
        let near = got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-7);
        assert!(near, "{got:?} against {want:?}");
    };
    close(clip(100.0, 5.0), [1.0, 0.1, 0.0]);
    close(clip(1600.0, 5.0), [4.0, 0.05, 0.0]);
    for (squares, loss) in [(f64::NAN, 5.0), (f64::INFINITY, 5.0), (100.0, f64::NAN)] {
        assert_eq!(clip(squares, loss)[2], 1.0, "{squares} {loss}");
    }
}

#[test]
fn gpu_squared_norm_is_that_of_fp64() {
    let Some(kernels) = gpu("squared_norm") else {
        return;
    };
    for count in [1, 5, 4096, 1_000_003] {
        let flat = Tensor::randn([count], (Kind::Float, GPU)) * 1e25;
        let mut sums = [poison(&[1], Kind::Double), poison(&[1], Kind::Double)];
        for sum in &mut sums {
            kernels.squared_norm(&flat, sum).unwrap();
        }
        let want = flat.to_kind(Kind::Double).square().sum(Kind::Double);
        let error = distance(&sums[0], &want.view([1]));
        assert!(error < 1e-12, "{count}: {error}");
        assert!(sums[0].equal(&sums[1]), "{count}");
    }
}

#[test]
fn gpu_optimizer_speed() {
    let Some(kernels) = gpu("the optimizer's speed") else {
        return;
    };
    let count = 1 << 28;
    let mut state = State::random(count, GPU);
    let mut squares = poison(&[1], Kind::Double);
    let control = Tensor::from_slice(&[0.5f32, 0.0]).to_device(GPU);
    let timed = |name: &str, bytes, launch: &mut dyn FnMut()| {
        let mut run = |times| {
            (0..times).for_each(|_| launch());
            Cuda::synchronize(0);
        };
        run(3);
        let start = Instant::now();
        run(20);
        print_row(name, 0.0, start.elapsed().as_secs_f64() / 20.0, bytes);
    };
    let gradient = state.gradient.shallow_clone();
    timed("squared_norm 2^28", count * 4, &mut || {
        kernels.squared_norm(&gradient, &mut squares).unwrap();
    });
    timed("adamw 2^28", count * 30, &mut || {
        state.update(&kernels, count / 2, &control);
    });
}
