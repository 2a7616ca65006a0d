//! A checkpoint that lacks ledger and manifest: these hold what the coordinator gives once all ranks have reported the step.
//! The training loop does not wait for it, so a checkpoint may be due while the coordinator is away.

use supra_checkpoint::publish::{PENDING, PublishError};
use supra_checkpoint::tree::TreeHasher;
use supra_checkpoint::{LEDGER, Manifest, Store, store};
use supra_proto::v1::CheckpointWritten;

/// A checkpoint of which every file but the ledger and the manifest is written and synced.
#[derive(Clone, Debug, PartialEq)]
pub struct Unfinished {
    /// Step whose state it holds.
    pub step: u64,
    /// Its directory, relative to the checkpoint root.
    pub path: String,
    /// Bytes of the files that are there.
    pub bytes: u64,
    /// The manifest but for the ledger and its head.
    pub manifest: Box<Manifest>,
    /// Wall time that the files took, seconds.
    pub seconds: f64,
}

/// Why a checkpoint got no manifest.
#[derive(Debug)]
pub enum Unwritten {
    /// The coordinator did not give the ledger, though it named the head: it is to be asked again.
    NoLedger(Box<Unfinished>),
    /// The storage refused: why, in one line.
    Refused(String),
}

impl Unfinished {
    /// Writes and syncs the ledger and, last, `manifest.pending` with its head. When that fails, nothing stays: half a checkpoint
    /// is of no use and takes room.
    ///
    /// # Errors
    ///
    /// The path is not below the root, or the store refuses.
    pub fn finish(
        &self,
        root: &Store,
        head: [u8; 32],
        ledger: &[u8],
    ) -> Result<CheckpointWritten, PublishError> {
        let mut hasher = TreeHasher::default();
        hasher.update(ledger);
        let mut manifest = Manifest::clone(&self.manifest);
        manifest.ledger_head = blake3::Hash::from_bytes(head).to_hex().to_string();
        manifest.files.insert(LEDGER.to_owned(), hasher.finish());
        let text = manifest.to_bytes();
        let write = |name, bytes: &[u8]| root.replace(&store::join(&self.path, name), bytes);
        write(LEDGER, ledger)
            .and_then(|()| write(PENDING, &text))
            .map_err(|error| {
                let _ = root.remove_dir(&self.path);
                PublishError::Unfinished(error)
            })?;
        Ok(CheckpointWritten {
            step: self.step,
            path: self.path.clone(),
            bytes: self.bytes + (ledger.len() + text.len()) as u64,
            manifest_hash: blake3::hash(&text).as_bytes().to_vec(),
            seconds: self.seconds,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use supra_checkpoint::manifest::FORMAT;
    use supra_checkpoint::verify;

    use super::*;

    fn unfinished(path: &str) -> Unfinished {
        Unfinished {
            step: 8,
            path: path.to_owned(),
            bytes: 100,
            manifest: Box::new(Manifest {
                format: FORMAT,
                step: 8,
                ..Manifest::default()
            }),
            seconds: 0.5,
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path().to_str().unwrap()).unwrap();
        (root, store)
    }

    #[test]
    fn the_manifest_gets_the_ledger_and_its_head_and_can_be_published() {
        let (root, store) = store();
        fs::create_dir(root.path().join("step-8")).unwrap();
        // Again, as after an answer that was lost.
        for ledger in ["{\"index\"", "{\"index\":0}\n"] {
            let written = unfinished("step-8").finish(&store, [7; 32], ledger.as_bytes());
            assert_eq!(written.unwrap().step, 8);
        }
        let written = unfinished("step-8")
            .finish(&store, [7; 32], b"{}\n")
            .unwrap();
        let hash = written.manifest_hash.as_slice().try_into().unwrap();
        store.publish("step-8", hash).unwrap();
        let manifest = verify::manifest(&store, "step-8", Some(&hash)).unwrap();
        assert_eq!(manifest.ledger_head, "07".repeat(32));
        verify::file(&store, "step-8/ledger.jsonl", &manifest.files[LEDGER]).unwrap();
        let text = store.read_all("step-8/manifest.json").unwrap();
        assert_eq!(written.bytes, 100 + 3 + text.len() as u64);
    }

    #[test]
    fn a_checkpoint_whose_manifest_cannot_be_written_goes() {
        let (root, store) = store();
        fs::create_dir_all(root.path().join("step-8").join(PENDING)).unwrap();
        let error = unfinished("step-8")
            .finish(&store, [7; 32], b"")
            .unwrap_err();
        assert!(error.to_string().contains(PENDING), "{error}");
        assert!(!root.path().join("step-8").exists());
        assert!(unfinished("../8").finish(&store, [7; 32], b"").is_err());
    }

    #[test]
    fn a_checkpoint_whose_files_are_gone_gets_no_manifest() {
        let (_root, store) = store();
        assert!(unfinished("step-8").finish(&store, [7; 32], b"").is_err());
        assert_eq!(store.list("").unwrap(), [""; 0]);
    }
}
