//! Checkpoints: everything that training changes, in a directory that is complete or not there.
//!
//! ```text
//! <checkpoint root>/step-00000123-gen-4/
//!   model.safetensors        fp32 masters under their published names (split and indexed beyond 4 GiB)
//!   optimizer.safetensors    exp_avg.NAME and exp_avg_sq.NAME, fp32
//!   config.json, tokenizer.json, …   what makes the directory a model directory
//!   manifest.json            what all of this is, with the BLAKE3 of every file
//! ```
//!
//! Rank 0 writes and syncs everything and names the manifest `manifest.pending`; only when the
//! coordinator has made its hash durable does it become `manifest.json`. Readers trust nothing else.
//! The path holds step and generation, so a writer that was left behind can never complete or
//! overwrite the checkpoint of another generation.

pub mod error;
pub mod origin;
pub mod probe;
pub mod read;
pub mod safetensors;
pub mod write;

pub use error::CheckpointError;
pub use origin::{ORIGIN, Origin};
