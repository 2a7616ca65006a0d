//! Where an exported model comes from, kept beside its weights: `supra audit --export` finds by it that a ledger lost its end.

use serde::Serialize;
use supra_checkpoint::Manifest;

/// Name of the file.
pub const ORIGIN: &str = "supra_origin.json";

/// What the checkpoint's manifest says that the model's users may want to know; hashes are BLAKE3, hexadecimal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Origin<'a> {
    /// The run.
    pub run: &'a str,
    /// The generation of it that wrote the checkpoint.
    pub generation: u64,
    /// Steps behind the weights, skipped ones included.
    pub step: u64,
    /// Target tokens behind the weights.
    pub tokens: u64,
    /// Head of the run's ledger behind that step; empty when the checkpoint does not know it.
    pub ledger_head: &'a str,
    /// The checkpoint's manifest.
    pub manifest_hash: String,
    /// The training data's manifest.
    pub dataset: &'a str,
    /// The tokenizer that made the data.
    pub tokenizer: &'a str,
}

impl<'a> Origin<'a> {
    /// That of a checkpoint whose manifest has this hash.
    pub fn new(manifest: &'a Manifest, manifest_hash: [u8; 32]) -> Origin<'a> {
        Origin {
            run: &manifest.run,
            generation: manifest.generation,
            step: manifest.step,
            tokens: manifest.tokens,
            ledger_head: &manifest.ledger_head,
            manifest_hash: blake3::Hash::from_bytes(manifest_hash).to_hex().to_string(),
            dataset: &manifest.dataset,
            tokenizer: &manifest.tokenizer,
        }
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(self).expect("invariant: an origin has only string keys");
        bytes.push(b'\n');
        bytes
    }
}
