//! The compute plane: model, trainer, checkpoints and inference on libtorch.
#![deny(unsafe_code)]

pub mod bench;
pub mod checkpoint;
pub mod collective;
pub mod device;
pub mod failure;
pub mod inference;
pub mod kernels;
pub mod model;
pub mod optim;
pub mod step;
pub mod trainer;
