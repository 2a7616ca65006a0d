//! The optimizer's kernels: AdamW to the bit, the norm to the last digits of fp64.

use std::time::Instant;

use supra_recipes::schema::Optimizer;
use supra_worker::{
    kernels::{Kernels, Shard, Twin, Update, cuda::CudaKernels},
    model::ParamSpec,
    optim::{AdamW, Layout, Replica},
};
use tch::{Cuda, Device, Kind, Tensor};

use super::bench::{GPU, distance, print_row, too_large};
use super::gpu;

const UPDATE: Update = Update {
    gradient_scale: 0.37,
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

    fn update(&mut self, kernels: &CudaKernels, decayed: i64) {
        let shard = Shard {
            master_m: &mut self.master,
            gradient_m: &self.gradient,
            exp_avg_m: &mut self.exp_avg,
            exp_avg_sq_m: &mut self.exp_avg_sq,
            compute_m: Some(&mut self.compute),
            decayed,
        };
        kernels.adamw(shard, &UPDATE);
        kernels.check().unwrap();
    }

    /// The same on the processor, operation by operation as the twin does it.
    fn update_by_libtorch(&mut self, decayed: i64) {
        let (beta1, beta2) = UPDATE.betas;
        let gradient = &self.gradient * UPDATE.gradient_scale;
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
        for _ in 0..3 {
            here.update_by_libtorch(decayed);
            there.update(&kernels, decayed);
        }
        here.assert_equal(&there);
    }
}

/// Gradients of 20 steps on either device; no step differs from the processor's by more than roundings of a root.
#[test]
fn gpu_replicas_go_where_the_processors_go() {
    let Some(kernels) = gpu("adamw on replicas") else {
        return;
    };
    let spec = |name: &str, shape: &[i64], decayed| ParamSpec {
        name: name.to_owned(),
        shape: shape.to_vec(),
        decayed,
        new: false,
    };
    let specs = [spec("norm", &[64], false), spec("w", &[1000, 64], true)];
    let layout = Layout::new(&specs, false);
    let masters = Tensor::randn([layout.elements()], (Kind::Float, Device::Cpu));
    let [mut here, mut there] = [Device::Cpu, GPU]
        .map(|device| Replica::new(layout.clone(), masters.copy(), Kind::BFloat16, device));
    let adamw = AdamW::new(&Optimizer::default());
    for _ in 0..20 {
        let gradient = masters.randn_like() * 3.0;
        for replica in [&mut here, &mut there] {
            replica.gradient.copy_(&gradient);
        }
        adamw.update(&Twin, &mut here, 1e-2, 0.37);
        adamw.update(&kernels, &mut there, 1e-2, 0.37);
    }
    kernels.check().unwrap();
    assert!(there.exp_avg.to_device(Device::Cpu) == here.exp_avg);
    assert!(there.exp_avg_sq.to_device(Device::Cpu) == here.exp_avg_sq);
    let error = distance(&there.masters.to_device(Device::Cpu), &here.masters);
    assert!(error < 1e-6, "masters are off by {error:e}");
    let rounded = there.layout().views(&there.masters.to_kind(Kind::BFloat16));
    for (name, weight) in there.params().iter() {
        assert!(weight == rounded.get(name), "{name}");
    }
    assert_eq!(there.updates, 20);
}

#[test]
fn gpu_squared_norm_is_that_of_fp64() {
    let Some(kernels) = gpu("squared_norm") else {
        return;
    };
    for count in [1, 5, 4096, 1_000_003] {
        let flat = Tensor::randn([count], (Kind::Float, GPU)) * 1e25;
        let [got, again] = [(); 2].map(|()| kernels.squared_norm(&flat));
        let squares = flat.to_kind(Kind::Double).square();
        let error = (got / squares.sum(Kind::Double).double_value(&[]) - 1.0).abs();
        assert!(error < 1e-12, "{count}: {error}");
        assert_eq!(got, again, "{count}");
        for bad in [f32::NAN, f32::INFINITY] {
            let _ = flat.narrow(0, count - 1, 1).fill_(f64::from(bad));
            assert!(!kernels.squared_norm(&flat).is_finite(), "{count} {bad}");
        }
    }
    kernels.check().unwrap();
    let elsewhere = Tensor::ones([8], (Kind::Float, Device::Cpu));
    assert!(kernels.squared_norm(&elsewhere).is_nan());
    let error = kernels.check().unwrap_err().to_string();
    assert!(error.contains("flat_m") && error.contains("Cpu"), "{error}");
}

#[test]
fn gpu_optimizer_speed() {
    let Some(kernels) = gpu("the optimizer's speed") else {
        return;
    };
    let count = 1 << 28;
    if too_large(count as usize) {
        return;
    }
    let mut state = State::random(count, GPU);
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
        let _ = kernels.squared_norm(&gradient);
    });
    timed("adamw 2^28", count * 30, &mut || {
        state.update(&kernels, count / 2);
    });
}
