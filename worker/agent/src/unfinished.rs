//! A checkpoint that lacks its manifest: that holds the ledger's head, which the coordinator gives once all ranks have
//! reported the step. The training loop does not wait for it, so a checkpoint may be due while the coordinator is away.

use supra_checkpoint::publish::{PENDING, PublishError};
use supra_checkpoint::{Store, store};
use supra_proto::v1::CheckpointWritten;

/// A checkpoint of which every file but the manifest is written and synced.
#[derive(Clone, Debug, PartialEq)]
pub struct Unfinished {
    /// Step whose state it holds.
    pub step: u64,
    /// Its directory, relative to the checkpoint root.
    pub path: String,
    /// Bytes of the files that are there.
    pub bytes: u64,
    /// The manifest's text before and after the ledger's head, which is 64 hexadecimal digits.
    pub manifest: [String; 2],
    /// Wall time that the files took, seconds.
    pub seconds: f64,
}

impl Unfinished {
    /// Writes and syncs `manifest.pending` with the ledger's head behind the step. When that fails, nothing stays: half a
    /// checkpoint is of no use and takes room.
    ///
    /// # Errors
    ///
    /// The path is not below the root, or the store refuses.
    pub fn finish(&self, root: &Store, head: [u8; 32]) -> Result<CheckpointWritten, PublishError> {
        let [before, after] = &self.manifest;
        let head = blake3::Hash::from_bytes(head).to_hex();
        let text = [before, head.as_str(), after].concat();
        let pending = store::join(&self.path, PENDING);
        root.replace(&pending, text.as_bytes()).map_err(|error| {
            let _ = root.remove_dir(&self.path);
            PublishError::Unfinished(error)
        })?;
        Ok(CheckpointWritten {
            step: self.step,
            path: self.path.clone(),
            bytes: self.bytes + text.len() as u64,
            manifest_hash: blake3::hash(text.as_bytes()).as_bytes().to_vec(),
            seconds: self.seconds,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn unfinished(path: &str) -> Unfinished {
        Unfinished {
            step: 8,
            path: path.to_owned(),
            bytes: 100,
            manifest: ["{\"head\": \"".to_owned(), "\"}\n".to_owned()],
            seconds: 0.5,
        }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path().to_str().unwrap()).unwrap();
        (root, store)
    }

    #[test]
    fn the_manifest_gets_the_head_and_can_be_published() {
        let (root, store) = store();
        fs::create_dir(root.path().join("step-8")).unwrap();
        let written = unfinished("step-8").finish(&store, [7; 32]).unwrap();
        let text = format!("{{\"head\": \"{}\"}}\n", "07".repeat(32));
        assert_eq!(written.bytes, 100 + text.len() as u64);
        let hash = written.manifest_hash.as_slice().try_into().unwrap();
        store.publish("step-8", hash).unwrap();
        let published = store.read_all("step-8/manifest.json").unwrap();
        assert_eq!(published, text.as_bytes());
    }

    #[test]
    fn a_checkpoint_whose_manifest_cannot_be_written_goes() {
        let (root, store) = store();
        fs::create_dir_all(root.path().join("step-8").join(PENDING)).unwrap();
        let error = unfinished("step-8").finish(&store, [7; 32]).unwrap_err();
        assert!(error.to_string().contains(PENDING), "{error}");
        assert!(!root.path().join("step-8").exists());
        assert!(unfinished("../8").finish(&store, [7; 32]).is_err());
    }

    #[test]
    fn a_checkpoint_whose_files_are_gone_gets_no_manifest() {
        let (_root, store) = store();
        assert!(unfinished("step-8").finish(&store, [7; 32]).is_err());
        assert_eq!(store.list("").unwrap(), [""; 0]);
    }
}
