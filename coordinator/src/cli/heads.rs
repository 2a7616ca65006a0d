//! What published checkpoints remember of the ledger: the witness outside the journal.
//!
//! A journal that lost its end is whole in itself; the checkpoints that were written after it are not
//! lost with it.

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::audit::Remembered;
use crate::ledger::{Hash, hex32};

/// The part of a checkpoint's `manifest.json` that an audit reads.
#[derive(Deserialize)]
struct Manifest {
    run: String,
    #[serde(with = "hex32")]
    ledger_head: Hash,
}

/// The heads that the published checkpoints of a run below `root` remember. One that cannot be read, on
/// another machine or of a build that kept no head, remembers nothing.
pub(super) fn remembered(root: &Path, run: &str) -> Vec<Remembered> {
    let Ok(entries) = fs::read_dir(root) else {
        return Vec::new();
    };
    let mut remembered: Vec<Remembered> = entries
        .flatten()
        .filter_map(|entry| {
            let path = entry.path().join("manifest.json");
            let manifest: Manifest = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
            (manifest.run == run).then(|| Remembered {
                manifest: path.display().to_string(),
                head: manifest.ledger_head,
            })
        })
        .collect();
    remembered.sort_by(|a, b| a.manifest.cmp(&b.manifest));
    remembered
}
