//! What checkpoints and exported models remember of the ledger: the witnesses outside the journal.
//!
//! A journal that lost its end is whole in itself; the checkpoints that were written after it are not
//! lost with it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use supra_checkpoint::{PUBLISHED, Store, StoredError, seal, store, sums};

use super::failure::Failure;
use crate::audit::{Manifest, Remembered};
use crate::capsule::{RECEIPT, SEALED_RECEIPT};
use crate::ledger::{Hash, hex32};

/// What `supra-worker export` writes beside a model.
const ORIGIN: &str = "supra_origin.json";

/// The part of a checkpoint's `manifest.json`, or of an export's `supra_origin.json`, that an audit reads.
#[derive(Deserialize)]
struct Said {
    run: String,
    generation: u64,
    step: u64,
    #[serde(with = "hex32")]
    ledger_head: Hash,
}

/// What the published checkpoints of a run below `root` say: the heads that they remember, and themselves. One that cannot be
/// read, on another machine or of a build that kept no head, says nothing; nor do those in the `damaged` directories.
pub(super) fn remembered(
    root: &Path,
    run: &str,
    damaged: &[PathBuf],
) -> (Vec<Remembered>, Vec<Manifest>) {
    let store = Store::open(&root.display().to_string());
    let Ok((store, names)) = store.and_then(|store| {
        let names = store.list("")?;
        Ok((store, names))
    }) else {
        return Default::default();
    };
    let mut said: Vec<(Remembered, Manifest)> = names
        .iter()
        .filter(|name| !damaged.contains(&store.at(name)))
        .filter_map(|name| {
            let name = store::join(name, PUBLISHED);
            let bytes = store.read_all(&name).ok()?;
            said(&store.at(&name).display().to_string(), &bytes, run)
        })
        .collect();
    said.sort_by(|a, b| a.1.path.cmp(&b.1.path));
    said.into_iter().unzip()
}

/// What the manifest of a checkpoint of a run says; nothing when it is another run's, or of a build that kept no head.
pub(super) fn said(path: &str, bytes: &[u8], run: &str) -> Option<(Remembered, Manifest)> {
    let said: Said = serde_json::from_slice(bytes).ok()?;
    let remembered = Remembered {
        manifest: path.to_owned(),
        head: said.ledger_head,
    };
    let manifest = Manifest {
        path: path.to_owned(),
        generation: said.generation,
        step: said.step,
        hash: *blake3::hash(bytes).as_bytes(),
    };
    (said.run == run).then_some((remembered, manifest))
}

/// The head that the receipt of a run below `root` remembers, if there is one: its hash is proved first.
///
/// # Errors
/// It is damaged: what is wrong.
pub(super) fn of_receipt(root: &Path, run: &str) -> Result<Option<Remembered>, String> {
    #[derive(Deserialize)]
    struct Receipt {
        run: String,
        #[serde(with = "hex32")]
        ledger_head: Hash,
    }
    let read = Store::open(&root.display().to_string()).and_then(|store| {
        let bytes = store.read_all(RECEIPT)?;
        Ok::<_, StoredError>((store.at(RECEIPT).display().to_string(), bytes))
    });
    // None is there before the run has ended, nor on another machine.
    let Ok((path, bytes)) = read else {
        return Ok(None);
    };
    let damaged = |problem| format!("{path}: {problem}");
    seal::check(&bytes, SEALED_RECEIPT).map_err(damaged)?;
    let said: Receipt =
        serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
    // A run without records has a head of zeros.
    let remembered = Remembered {
        manifest: path,
        head: said.ledger_head,
    };
    Ok(Some(remembered).filter(|known| said.run == run && known.head != Hash::default()))
}

/// What is wrong with the files of an exported model, and how many are right. Nothing is with one of a build that kept no hashes.
pub(super) fn files_of_export(directory: &Path) -> (Vec<String>, u64) {
    match sums::verify(directory) {
        Ok(proved) => (Vec::new(), proved.files),
        Err(sums::SumsError::Absent { .. }) => Default::default(),
        Err(error) => (vec![error.to_string()], 0),
    }
}

/// The run that an exported model in `directory` is of, and the head that it remembers.
///
/// # Errors
/// It is no export, or one of a build that kept no head.
pub(super) fn of_export(directory: &Path) -> Result<(String, Remembered), Failure> {
    let path = directory.join(ORIGIN);
    let cannot = |cause: String| {
        Failure::input(format!(
            "{} does not say which run the model is of: {cause}. Name a directory that `supra-worker export` has made from a \
             checkpoint that remembers the ledger.",
            path.display()
        ))
    };
    let bytes = fs::read(&path).map_err(|error| cannot(error.to_string()))?;
    let said: Said = serde_json::from_slice(&bytes).map_err(|error| cannot(error.to_string()))?;
    let remembered = Remembered {
        manifest: path.display().to_string(),
        head: said.ledger_head,
    };
    Ok((said.run, remembered))
}
