//! Fuzz targets: functions that take any bytes the way a reader of ours gets them, and panic when it breaks a promise.
//!
//! A reader answers with a value or an error; it does not panic, hang or take memory that the bytes do not account for. What
//! more a target demands stands beside it. `scripts/fuzz` runs them under libFuzzer; the test of this crate replays the
//! corpora with a few seconds of blind changes.
#![forbid(unsafe_code)]

mod checkpoint;
mod data;
mod journal;
mod pickle;
mod recipe;
mod scratch;

pub use checkpoint::{manifest, safetensors};
pub use data::{dataset, parquet};
pub use journal::{facts, journal, ledger};
pub use pickle::pickle;
pub use recipe::recipe;

/// A target.
pub type Target = fn(&[u8]);

/// All targets by name, which is also that of their corpus.
pub const TARGETS: [(&str, Target); 9] = [
    ("dataset", dataset),
    ("facts", facts),
    ("journal", journal),
    ("ledger", ledger),
    ("manifest", manifest),
    ("parquet", parquet),
    ("pickle", pickle),
    ("recipe", recipe),
    ("safetensors", safetensors),
];

#[cfg(test)]
mod replay;
