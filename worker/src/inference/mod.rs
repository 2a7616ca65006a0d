//! Using a model: held-out loss and text.
//!
//! A model directory is a Hugging Face softmax model, a SUPRA model, or a training checkpoint. Whatever runs one token by
//! token runs an [`engine`].

pub mod compare;
pub mod completion;
pub mod engine;
pub mod evaluate;
pub mod gates;
pub mod generate;
pub mod load;
pub mod reader;
pub mod report;
mod rows;
pub mod sampler;
pub mod saved;
pub mod score;
pub mod scorer;
pub mod serve;
pub mod statistics;
pub mod stop;
pub mod tasks;
pub mod text;
pub mod token_bytes;
