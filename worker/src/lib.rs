//! The compute plane: model, trainer, checkpoints and inference on libtorch.
#![deny(unsafe_code)]

pub mod model;
