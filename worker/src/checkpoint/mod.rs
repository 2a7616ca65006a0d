//! Checkpoints: everything that training changes, in a directory that is complete or not there.
//!
//! ```text
//! <checkpoint root>/step-00000123-gen-4/
//!   model-rank-000-of-004-00001.safetensors       fp32 masters: a rank's part of every tensor, under its published name
//!   optimizer-rank-000-of-004-00001.safetensors   its part of exp_avg.NAME and exp_avg_sq.NAME
//!   config.json, tokenizer.json, …                what makes the directory a model directory
//!   manifest.json                                 what all of this is, with the BLAKE3 of every file
//! ```
//!
//! Every rank copies its part of the state to host memory between two steps ([`saver`]) and writes and syncs it while training
//! goes on ([`write`](mod@write)), into files that [`shard`] plans. When all are done rank 0 puts the manifest together and names
//! it `manifest.pending`; only when the coordinator has made its hash durable does it become `manifest.json`. Readers ([`read`])
//! trust nothing else. The path holds step and generation, so a writer that was left behind can never complete or
//! overwrite the checkpoint of another generation.

pub mod card;
pub mod error;
pub mod origin;
pub mod probe;
pub mod read;
pub mod saver;
pub mod shard;
pub mod side_by_side;
pub mod write;

pub use card::CARD;
pub use error::CheckpointError;
pub use origin::{ORIGIN, Origin};
