//! What else the bits of a run depend on, as checkpoints remember it.

use std::env;

use supra_checkpoint::Environment;

use crate::device::{self, Place};

/// By which NCCL's algorithm is pinned; the supervisor sets them.
const NCCL_VARIABLES: [&str; 2] = ["NCCL_ALGO", "NCCL_PROTO"];

/// That of one of `world` ranks. `build` is the program's version and commit.
pub fn environment(place: &Place, world: u32, build: &str) -> Environment {
    let device = if place.device.is_cuda() {
        "cuda"
    } else {
        "cpu"
    };
    Environment {
        build: build.to_owned(),
        libtorch: device::LIBTORCH.to_owned(),
        device: device.to_owned(),
        model: place.model.clone(),
        threads: place.threads,
        nccl: nccl(place, world),
    }
}

/// What NCCL's sums depend on: its version, and what its variables say. Empty where no GPUs add.
fn nccl(place: &Place, world: u32) -> String {
    let Some(library) = place.nccl.as_ref().filter(|_| world > 1) else {
        return String::new();
    };
    let variables = NCCL_VARIABLES.map(|name| env::var(name).unwrap_or_else(|_| "any".to_owned()));
    format!("{} {}", library.version(), variables.join(" "))
}
