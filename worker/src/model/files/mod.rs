//! Model directories on disk.
//!
//! Two layouts are read and written: Hugging Face's for softmax models (Llama, Mistral) and the published SUPRA one for
//! both kinds of attention. Weights are safetensors, one file or shards with an index; linear_open_lm's training code gets a
//! checkpoint of its own kind.

pub mod config_json;
pub mod draft;
pub mod hub;
pub mod huggingface;
pub mod inventory;
pub mod layout;
pub mod load;
pub mod openlm;
pub mod published;
pub mod save;
pub mod tensors;
pub mod torch_save;
