//! Model directories on disk.
//!
//! Two layouts are read and written: Hugging Face's for softmax models (Llama, Mistral) and the published SUPRA one for
//! both kinds of attention. Weights are safetensors, one file or shards with an index.

pub mod config_json;
pub mod huggingface;
pub mod layout;
pub mod load;
pub mod published;
pub mod save;
pub mod tensors;
