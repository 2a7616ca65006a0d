//! Model directories on disk.
//!
//! Three layouts are read: Hugging Face's for softmax models (Llama, Mistral), the published SUPRA one (that of open_lm) for both
//! kinds of attention, and Meta's own. The first two are written; linear_open_lm's training code gets a checkpoint of its own kind.
//! [`find`] says which files are a model's, [`weight_file`] reads one, [`tensors`] all of them; [`layout`] knows names, [`load`]
//! compares them with the configuration, [`inventory`] what is written.

pub mod config_json;
pub mod draft;
pub mod find;
pub mod hub;
pub mod huggingface;
pub mod inventory;
pub mod layout;
pub mod linear_open_lm;
pub mod load;
pub mod meta;
pub mod open_lm;

pub mod published;
pub mod save;
pub mod tensors;
pub mod torch_save;
pub mod weight_file;
