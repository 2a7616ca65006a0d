//! The compute plane: model, trainer, checkpoints and inference on libtorch.
#![deny(unsafe_code)]

pub mod checkpoint;
pub mod collective;
pub mod device;
pub mod failure;
pub mod inference;
pub mod model;
pub mod optim;
pub mod trainer;

/// Version of this program, as the coordinator compares it.
pub const BUILD: &str = env!("CARGO_PKG_VERSION");
