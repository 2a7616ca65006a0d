//! Published checkpoints of a run, as journal or coordinator name them, and whether their files are what was written.

pub mod command;
mod verify;

use std::path::PathBuf;

use supra_checkpoint::examine::{self, Care};
use supra_checkpoint::{Store, StoredError};
use supra_proto::v1;

use crate::ledger::Hash;
use crate::machine::Run;

/// A published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub step: u64,
    /// Its directory, or its URL.
    pub path: PathBuf,
    pub manifest_hash: Hash,
}

/// Those that the journal names, oldest first; none that is damaged.
pub fn of_run(run: &Run) -> Vec<Checkpoint> {
    let published = run.checkpoints.iter().filter(|known| known.published);
    published
        .map(|known| Checkpoint {
            step: known.step,
            path: run.checkpoint_root.join(&known.path),
            manifest_hash: known.manifest_hash,
        })
        .collect()
}

/// Directories of those that the journal calls damaged.
pub fn damaged_of_run(run: &Run) -> Vec<PathBuf> {
    let damaged = run.damaged.iter().map(|known| &known.checkpoint.path);
    damaged.map(|path| run.checkpoint_root.join(path)).collect()
}

/// Those among the ones that a coordinator names, oldest first; none that is damaged.
pub fn of_answer(named: Vec<v1::Checkpoint>) -> Vec<Checkpoint> {
    let sound = |known: &v1::Checkpoint| known.published && known.damaged.is_empty();
    let published = named.into_iter().filter(sound);
    published
        .filter_map(|known| {
            Some(Checkpoint {
                step: known.step,
                path: known.path.into(),
                manifest_hash: known.manifest_hash.try_into().ok()?,
            })
        })
        .collect()
}

/// Directories of those that a coordinator calls damaged.
pub fn damaged_of_answer(named: &[v1::Checkpoint]) -> Vec<PathBuf> {
    let damaged = named.iter().filter(|known| !known.damaged.is_empty());
    damaged.map(|known| PathBuf::from(&known.path)).collect()
}

/// What is wrong with a checkpoint, file by file, and how many files are right. Nothing is wrong with one that is not there at
/// all: its folder may be on another machine, or it is retired meanwhile.
pub fn examine(checkpoint: &Checkpoint, care: Care) -> (Vec<String>, u64) {
    let Checkpoint {
        path,
        manifest_hash,
        ..
    } = checkpoint;
    let store = match Store::open(&path.display().to_string()) {
        Ok(store) => store,
        Err(error) => return (vec![error.to_string()], 0),
    };
    let Ok(Some(findings)) = examine::published(&store, manifest_hash, care, &mut |_| true) else {
        return Default::default();
    };
    let problems = findings.problems.iter().map(StoredError::finding);
    (problems.collect(), findings.right)
}
