//! Using a model: held-out loss and text.
//!
//! A model directory is a Hugging Face softmax model, a SUPRA model, or a training checkpoint.

pub mod evaluate;
pub mod gates;
pub mod generate;
pub mod load;
pub mod sampler;
