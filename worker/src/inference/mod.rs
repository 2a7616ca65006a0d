//! Using a model: held-out loss and text.
//!
//! A model directory is a Hugging Face softmax model, a SUPRA model, or a training checkpoint.

pub mod compare;
pub mod completion;
pub mod evaluate;
pub mod generate;
pub mod load;
pub mod sampler;
pub mod saved;
pub mod serve;
pub mod stop;
pub mod text;
