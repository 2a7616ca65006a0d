//! One kernel beside its twin: right, the same every time, and how fast.

use std::{env, time::Instant};

use supra_worker::kernels::{Kernels, Twin, cuda::CudaKernels};
use tch::{Cuda, Device, Kind, Tensor};

/// What the root of the mean square error may be, relative to that of the right values.
pub const TOLERANCE: f64 = 4e-3;

/// Where everything happens. The twin's fp64 too: a large GPU is good at it.
pub const GPU: Device = Device::Cuda(0);

/// Launches that are timed, after some that are not.
const TIMED: u32 = 20;

/// A call of the contract: what is read, what is written.
pub type Call<'a> = dyn Fn(&dyn Kernels, &[Tensor], &mut [Tensor]) + 'a;

/// One call of the contract, with what it is called on.
pub struct Case<'a> {
    /// Name and shape, for the table.
    pub name: String,
    /// What is read.
    pub inputs: Vec<Tensor>,
    /// What is written, as it is before: poison, or what is added to.
    pub outputs: Vec<Tensor>,
    /// The call itself.
    pub call: &'a Call<'a>,
}

/// Whether a sanitizer looks on, as scripts/test-gpu says: then nothing is timed, and large cases are left out, for every
/// access takes long.
pub fn sanitized() -> bool {
    env::var_os("SUPRA_SANITIZED").is_some()
}

/// Numbers of the largest tensor that a sanitizer gets to see.
const SANITIZED_NUMBERS: usize = 1 << 20;

/// Whether to leave a case out that has this as its largest tensor.
pub fn too_large(numbers: usize) -> bool {
    sanitized() && numbers > SANITIZED_NUMBERS
}

/// Fresh numbers from N(0, 1), rounded to bf16.
pub fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, GPU)).to_kind(Kind::BFloat16)
}

/// What must not be there any more afterwards.
pub fn poison(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::full(shape, f64::NAN, (kind, GPU))
}

/// |got - want| / |want|: NaN if anything is.
pub fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let want = want.to_kind(Kind::Double);
    let difference = (got.to_kind(Kind::Double) - &want).norm().double_value(&[]);
    let size = want.norm().double_value(&[]);
    if difference == 0.0 {
        0.0
    } else {
        difference / size
    }
}

fn in_fp64(tensor: &Tensor) -> Tensor {
    match tensor.kind() {
        Kind::BFloat16 | Kind::Float => tensor.to_kind(Kind::Double),
        _ => tensor.copy(),
    }
}

impl Case<'_> {
    fn run(&self, kernels: &CudaKernels) -> Vec<Tensor> {
        let mut outputs: Vec<Tensor> = self.outputs.iter().map(Tensor::copy).collect();
        (self.call)(kernels, &self.inputs, &mut outputs);
        kernels
            .check()
            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
        outputs
    }

    /// Compares every output with the twin's in fp64 on the same rounded inputs, and with a second run's, to the bit.
    /// Returns the largest error.
    pub fn check(&self, kernels: &CudaKernels) -> f64 {
        let got = self.run(kernels);
        let again = self.run(kernels);
        let inputs: Vec<Tensor> = self.inputs.iter().map(in_fp64).collect();
        let mut want: Vec<Tensor> = self.outputs.iter().map(in_fp64).collect();
        (self.call)(&Twin, &inputs, &mut want);
        let mut worst = 0f64;
        for (place, ((got, again), want)) in got.iter().zip(&again).zip(&want).enumerate() {
            let error = distance(got, want);
            assert!(error <= TOLERANCE, "{}: output {place}: {error}", self.name);
            assert!(got.equal(again), "{}: output {place} varies", self.name);
            worst = worst.max(error);
        }
        worst
    }

    /// Checks, times, and prints a line of the table. `bytes` is what one call has to move.
    pub fn measure(&self, kernels: &CudaKernels, bytes: i64) {
        let tensors = self.inputs.iter().chain(&self.outputs);
        if too_large(tensors.map(Tensor::numel).max().unwrap_or(0)) {
            return;
        }
        let error = self.check(kernels);
        if sanitized() {
            return;
        }
        let mut outputs: Vec<Tensor> = self.outputs.iter().map(Tensor::copy).collect();
        let mut launch = |times| {
            for _ in 0..times {
                (self.call)(kernels, &self.inputs, &mut outputs);
            }
            Cuda::synchronize(0);
        };
        launch(3);
        let start = Instant::now();
        launch(TIMED);
        let seconds = start.elapsed().as_secs_f64() / f64::from(TIMED);
        print_row(&self.name, error, seconds, bytes);
    }
}

/// One line of the table.
pub fn print_row(name: &str, error: f64, seconds: f64, bytes: i64) {
    let (micros, rate) = (seconds * 1e6, bytes as f64 / seconds / 1e9);
    println!("kernel {name:<44} error {error:.2e}  {micros:8.1} us  {rate:7.0} GB/s");
}
