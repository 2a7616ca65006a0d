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
pub mod manifest;
pub mod origin;
pub mod read;
pub mod safetensors;
pub mod store;
pub mod write;

pub use error::CheckpointError;
pub use manifest::{Environment, Manifest};
pub use origin::{ORIGIN, Origin};
pub use supra_agent::publish::{PENDING, PUBLISHED as MANIFEST};

/// Prefix of the first moments' keys in the optimizer's files.
const EXP_AVG: &str = "exp_avg.";

/// Prefix of the second moments' keys in the optimizer's files.
const EXP_AVG_SQ: &str = "exp_avg_sq.";
