//! Tests that need an NVIDIA GPU. Where there is none, each says so and passes.

mod attention;
mod bench;
mod block;
mod decode;
mod gates;
mod kernels;
mod optimizer;
mod overlap;
mod padding;
mod reader;

use std::path::Path;

use supra_worker::{
    device::{self, DeviceName},
    kernels::cuda::CudaKernels,
};

/// The kernels on the first GPU. With a driver in the system they have to work; without one the test is skipped.
pub fn gpu(test: &str) -> Option<CudaKernels> {
    let driver = ["/proc/driver/nvidia/version", "/dev/nvidiactl"];
    if !driver.iter().any(|path| Path::new(path).exists()) {
        println!("skipped: {test} needs an NVIDIA GPU, and this machine has no driver for one");
        return None;
    }
    device::open(DeviceName::Cuda(0), 4).unwrap_or_else(|error| panic!("{error}"));
    Some(CudaKernels::new(0).unwrap_or_else(|error| panic!("{error}")))
}

/// The kernels on the first GPU without what only Hopper has; none where they would be the same or there is no GPU.
pub fn gpu_without_warpgroups(test: &str) -> Option<CudaKernels> {
    gpu(test)?;
    match CudaKernels::compiled_for(0, "sm_90") {
        Ok(kernels) => Some(kernels),
        // An older GPU does not run it, and never has warpgroups.
        Err(error) if error.to_string().contains("no kernel image") => {
            println!("skipped: {test} needs an NVIDIA GPU that runs sm_90");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
