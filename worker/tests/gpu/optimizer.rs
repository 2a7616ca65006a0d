//! The optimizer's kernels: their twin's bits, the norm to the last digits of fp64.

use std::{convert::Infallible, time::Instant};

use supra_agent::collective::Solo;
use supra_recipes::schema::Optimizer;
use supra_worker::{
    kernels::{Kernels, Shard, Twin, Update, twin},
    model::ParamSpec,
    optim::{AdamW, Kinds, Layout, Part, Replica, Run, Section},
};
use tch::{Cuda, Device, Kind, Tensor};

use super::bench::{GPU, print_row, too_large};
use super::gpu;

const UPDATE: Update = Update {
    gradient_scale: 0.37,
    betas: (0.9, 0.95),
    eps: 1e-8,
    step_size: 3e-4 / (1.0 - 0.9 * 0.9 * 0.9),
    root_correction: 0.377_655_927,
    decay: 1.0 - 3e-4 * 0.1,
    rounding: 0xfeed_5eed_1234_5678,
};

/// Where parts begin in the buffers of these tests, and what is left behind them: neither is to be touched.
const MARGIN: i64 = 64;

/// Lengths of parts: ragged, whole, and of more than one round of all threads.
const COUNTS: [i64; 5] = [1, 7, 4096, 4099, (1 << 23) + 5];

fn part(flat: &Tensor, count: i64) -> Tensor {
    flat.narrow(0, MARGIN, count)
}

/// Floats of any bits: NaN, infinite, subnormal and all.
fn any_floats(count: i64) -> Tensor {
    let bits = Tensor::randint_low(-(1 << 31), 1 << 31, [count], (Kind::Int64, Device::Cpu));
    bits.to_kind(Kind::Int).view_dtype(Kind::Float)
}

/// Floats of either sign, about 2 to a power between these two.
fn floats(count: i64, [least, most]: [f64; 2]) -> Tensor {
    let normal = Tensor::randn([count], (Kind::Float, Device::Cpu));
    let powers = normal.rand_like() * (most - least) + least;
    normal * powers.exp2()
}

#[track_caller]
fn assert_bits(name: &str, there: &Tensor, here: &Tensor) {
    let [there, here] =
        [there, here].map(|flat| flat.to_device(Device::Cpu).view_dtype(Kind::Int16));
    let differing = there.ne_tensor(&here).sum(Kind::Int64).int64_value(&[]);
    assert_eq!(differing, 0, "{name}: {differing} of {}", here.numel());
}

struct State {
    param: Tensor,
    remainder: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
}

impl State {
    /// Gradients from sizes whose squares are subnormal to large ones.
    fn random(count: i64, moments: Kind) -> State {
        let count = count + 2 * MARGIN;
        let masters = floats(count, [-20.0, 4.0]);
        let (param, remainder) = (
            masters.to_kind(Kind::BFloat16),
            masters.to_kind(Kind::Int16),
        );
        twin::split(&masters, &param, &remainder);
        State {
            param,
            remainder,
            gradient: floats(count, [-70.0, 8.0]),
            exp_avg: floats(count, [-70.0, 8.0]).to_kind(moments),
            exp_avg_sq: floats(count, [-140.0, 16.0]).abs().to_kind(moments),
        }
    }

    fn to(&self, device: Device) -> State {
        let copy = |flat: &Tensor| flat.to_device(device).copy();
        State {
            param: copy(&self.param),
            remainder: copy(&self.remainder),
            gradient: copy(&self.gradient),
            exp_avg: copy(&self.exp_avg),
            exp_avg_sq: copy(&self.exp_avg_sq),
        }
    }

    fn update(&self, kernels: &dyn Kernels, count: i64, decayed: i64) {
        let shard = Shard {
            param_m: &mut part(&self.param, count),
            remainder_m: Some(&mut part(&self.remainder, count)),
            gradient_m: &part(&self.gradient, count),
            exp_avg_m: &mut part(&self.exp_avg, count),
            exp_avg_sq_m: &mut part(&self.exp_avg_sq, count),
            decayed,
            first: 12_345_678_901,
        };
        kernels.adamw(shard, &UPDATE);
        kernels.check().unwrap();
    }
}

#[test]
fn gpu_adamw_has_its_twins_bits() {
    let Some(kernels) = gpu("adamw") else { return };
    for moments in [Kind::Float, Kind::BFloat16] {
        for count in COUNTS {
            let here = State::random(count, moments);
            let there = here.to(GPU);
            for _ in 0..3 {
                here.update(&Twin, count, count / 3);
                there.update(&kernels, count, count / 3);
            }
            for (name, there, here) in [
                ("param", &there.param, &here.param),
                ("remainder", &there.remainder, &here.remainder),
                ("exp_avg", &there.exp_avg, &here.exp_avg),
                ("exp_avg_sq", &there.exp_avg_sq, &here.exp_avg_sq),
            ] {
                assert_bits(&format!("{name} {count} {moments:?}"), there, here);
            }
        }
    }
}

#[test]
fn gpu_adamw_refuses_what_it_is_not_made_for() {
    let Some(kernels) = gpu("adamw's refusals") else {
        return;
    };
    let count = 1024;
    let refused = |change: &dyn Fn(&mut State), decayed: i64, says: &str| {
        let mut state = State::random(count - 2 * MARGIN, Kind::Float).to(GPU);
        change(&mut state);
        let shard = Shard {
            param_m: &mut state.param,
            remainder_m: Some(&mut state.remainder),
            gradient_m: &state.gradient,
            exp_avg_m: &mut state.exp_avg,
            exp_avg_sq_m: &mut state.exp_avg_sq,
            decayed,
            first: 0,
        };
        kernels.adamw(shard, &UPDATE);
        let error = kernels.check().unwrap_err().to_string();
        assert!(error.contains(says), "{says} is not in {error}");
    };
    refused(&|_| (), count + 1, "1025 of its 1024 numbers decay");
    let fp32 = |state: &mut State| state.param = state.param.to_kind(Kind::Float);
    refused(&fp32, 0, "param_m: it is Float, not BFloat16");
    let mixed = |state: &mut State| state.exp_avg = state.exp_avg.to_kind(Kind::BFloat16);
    refused(&mixed, 0, "exp_avg_sq_m: it is Float, not BFloat16");
    let short = |state: &mut State| state.gradient = state.gradient.narrow(0, 0, 8);
    refused(&short, 0, "gradient_m: its shape is [8], not [1024]");
}

#[test]
fn gpu_fingerprints_are_their_twins() {
    let Some(kernels) = gpu("fingerprint") else {
        return;
    };
    for kind in [Kind::Float, Kind::BFloat16, Kind::Int16] {
        for count in COUNTS {
            let floats = any_floats(count + 2 * MARGIN);
            let here = match kind {
                Kind::Float => floats,
                kind => floats.view_dtype(kind).narrow(0, 0, count + 2 * MARGIN),
            };
            let there = here.to_device(GPU);
            let first = 8_589_934_592 - count / 2;
            let [expected, found, again] = [
                Twin.fingerprint(&part(&here, count), first, 5),
                kernels.fingerprint(&part(&there, count), first, 5),
                kernels.fingerprint(&part(&there, count), first, 5),
            ]
            .map(Result::unwrap);
            assert_eq!(found, expected, "{kind:?} {count}");
            assert_eq!(found, again, "{kind:?} {count}");
        }
    }
    let error = kernels
        .fingerprint(&Tensor::zeros([8], (Kind::Float, Device::Cpu)), 0, 5)
        .unwrap_err()
        .to_string();
    assert!(error.contains("flat_m") && error.contains("Cpu"), "{error}");
}

#[test]
fn gpu_replicas_are_the_processors_after_twenty_steps() {
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
    let layout = Layout::new(&specs, false, 1);
    let masters = Tensor::randn([layout.numbers()], (Kind::Float, Device::Cpu));
    for moments in [Kind::Float, Kind::BFloat16] {
        let kinds = Kinds {
            parameters: Kind::BFloat16,
            moments,
        };
        let [mut here, mut there] = [Device::Cpu, GPU].map(|device| {
            let mut replica = Replica::new(layout.clone(), Part::WHOLE, kinds, device);
            replica.load(Section::Masters, 0, &masters);
            replica
        });
        let adamw = AdamW::new(&Optimizer::default(), 17);
        for _ in 0..20 {
            let gradient = masters.randn_like() * 3.0;
            for replica in [&mut here, &mut there] {
                let numbers = layout.numbers();
                replica.gradient.narrow(0, 0, numbers).copy_(&gradient);
            }
            let updated = |_| Ok::<_, Infallible>(());
            let Ok(()) = adamw.update(&Twin, &mut here, 1e-2, 0.37, updated);
            let Ok(()) = adamw.update(&kernels, &mut there, 1e-2, 0.37, updated);
        }
        kernels.check().unwrap();
        let hashes = [
            there.hash(&kernels, &mut Solo).unwrap(),
            here.hash(&Twin, &mut Solo).unwrap(),
        ];
        assert_eq!(hashes[0], hashes[1], "{moments:?}");
        let [there, here] = [there, here].map(|replica| {
            let length = replica.layout().elements();
            let (run, mut bytes) = (
                Run {
                    all: 0,
                    own: 0,
                    length,
                },
                Vec::new(),
            );
            let numbers = replica.numbers(Part::WHOLE);
            numbers.read(Section::Masters, run, &mut bytes);
            Tensor::from_data_size(&bytes, &[length], Kind::Float)
        });
        assert_bits("masters", &there, &here);
    }
}

#[test]
fn gpu_squared_norm_is_that_of_fp64() {
    let Some(kernels) = gpu("squared_norm") else {
        return;
    };
    for count in [1, 5, 4096, 1_000_003] {
        let flat = Tensor::randn([count], (Kind::Float, GPU)) * 1e25;
        let [got, again] = [(); 2].map(|()| kernels.squared_norm(&[flat.shallow_clone()]));
        let squares = flat.to_kind(Kind::Double).square();
        let error = (got / squares.sum(Kind::Double).double_value(&[]) - 1.0).abs();
        assert!(error < 1e-12, "{count}: {error}");
        assert_eq!(got, again, "{count}");
        for bad in [f32::NAN, f32::INFINITY] {
            let _ = flat.narrow(0, count - 1, 1).fill_(f64::from(bad));
            assert!(
                !kernels.squared_norm(&[flat.shallow_clone()]).is_finite(),
                "{count} {bad}"
            );
        }
    }
    kernels.check().unwrap();
    let elsewhere = Tensor::ones([8], (Kind::Float, Device::Cpu));
    assert!(kernels.squared_norm(&[elsewhere]).is_nan());
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
    let normal = |kind| Tensor::randn([count + 2 * MARGIN], (Kind::Float, GPU)).to_kind(kind);
    let mut state = State {
        param: normal(Kind::BFloat16),
        remainder: normal(Kind::Float).to_kind(Kind::Int16),
        gradient: normal(Kind::Float),
        exp_avg: normal(Kind::Float),
        exp_avg_sq: normal(Kind::Float).square(),
    };
    timed("squared_norm 2^28", count * 4, &mut || {
        let _ = kernels.squared_norm(&[part(&state.gradient, count)]);
    });
    timed("adamw 2^28", count * 28, &mut || {
        state.update(&kernels, count, count / 2);
    });
    state.exp_avg = state.exp_avg.to_kind(Kind::BFloat16);
    state.exp_avg_sq = state.exp_avg_sq.to_kind(Kind::BFloat16);
    timed("adamw, bf16 moments 2^28", count * 20, &mut || {
        state.update(&kernels, count, count / 2);
    });
    let [master, param] = [&state.gradient, &state.param].map(|flat| part(flat, count));
    for (name, flat, bytes) in [("fp32", &master, 4), ("bf16", &param, 2)] {
        let name = format!("fingerprint, {name} 2^28");
        timed(&name, count * bytes, &mut || {
            kernels.fingerprint(flat, 0, 0).unwrap();
        });
    }
    kernels.check().unwrap();
}
