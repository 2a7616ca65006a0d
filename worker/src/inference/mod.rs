//! Using a model: held-out loss and text.
//!
//! A model directory is a Hugging Face softmax model, a SUPRA model, or a training checkpoint. Whatever runs one token by
//! token runs an [`engine`].

pub mod engine;
pub mod evaluate;
pub mod gates;
pub mod generate;
pub mod load;
mod rows;
pub mod sampler;
pub mod score;
