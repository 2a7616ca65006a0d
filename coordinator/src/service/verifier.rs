//! Reads published checkpoints again, in threads of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use supra_checkpoint::examine::{self, Care};
use supra_checkpoint::{Store, StoredError};
use tokio::sync::mpsc;

use super::handle::Ask;
use crate::ledger::Hash;
use crate::machine::{Event, Found, RunNumber};

/// What reads checkpoints again. Dropping it ends that, as a coordinator that ends does not wait for it: the next one begins
/// anew.
#[derive(Default)]
pub(super) struct Verifier {
    stopped: Arc<AtomicBool>,
}

impl Verifier {
    /// Reads all of the checkpoint in `directory`, and tells the owner what it shows.
    pub fn read(
        &self,
        run: RunNumber,
        attempt: u64,
        directory: PathBuf,
        manifest_hash: Hash,
        events: &mpsc::WeakSender<Ask>,
    ) {
        let (stopped, events) = (self.stopped.clone(), events.clone());
        tokio::task::spawn_blocking(move || {
            let found = read(&directory, &manifest_hash, &stopped);
            let (Some(found), Some(events)) = (found, events.upgrade()) else {
                return;
            };
            let event = Event::Verified {
                run,
                attempt,
                found,
            };
            // Fails only when the owner is gone.
            let _ = events.blocking_send(Ask::Event(event));
        });
    }

    /// Ends all reading soon.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

impl Drop for Verifier {
    fn drop(&mut self) {
        self.stop();
    }
}

/// None when the coordinator ends before all is read.
fn read(directory: &Path, manifest_hash: &Hash, stopped: &AtomicBool) -> Option<Found> {
    let mut go_on = |_| !stopped.load(Ordering::Relaxed);
    let shown = directory.display().to_string();
    let root = directory
        .parent()
        .unwrap_or(directory)
        .display()
        .to_string();
    let (store, root) = match Store::open(&shown).and_then(|store| Ok((store, Store::open(&root)?)))
    {
        Ok(stores) => stores,
        Err(error) => return Some(Found::Unread(error.finding())),
    };
    let found = examine::published(&store, manifest_hash, Care::Thorough, &mut go_on).ok()?;
    let Some(findings) = found else {
        // Where others are to be seen it is this one that is missing, and not the storage.
        return Some(if examine::any_published(&root) {
            Found::Damaged(format!("{shown}: nothing is there"))
        } else {
            let root = root.url();
            Found::Unread(format!("no published checkpoint is to be seen in {root}"))
        });
    };
    Some(match (findings.damage(), findings.problems.first()) {
        (Some(problem), _) => Found::Damaged(problem),
        (None, Some(error)) => Found::Unread(StoredError::finding(error)),
        (None, None) => Found::Whole,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn reading(directory: &Path) -> Option<Found> {
        read(directory, &[7; 32], &AtomicBool::new(false))
    }

    #[test]
    fn storage_that_is_missing_is_not_a_damaged_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let gone = root.path().join("step-8");
        let found = reading(&gone);
        assert!(matches!(found, Some(Found::Unread(_))), "{found:?}");
        let other = root.path().join("step-4");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("manifest.json"), "{}").unwrap();
        let found = reading(&gone);
        assert!(matches!(found, Some(Found::Damaged(_))), "{found:?}");
        let Some(Found::Damaged(problem)) = reading(&other) else {
            panic!("another manifest than the journalled one is damage");
        };
        assert!(problem.contains("manifest.json"), "{problem}");
    }
}
