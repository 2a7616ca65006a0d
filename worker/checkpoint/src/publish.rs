//! Publishing a checkpoint: the rename that makes it one.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

/// Manifest of a checkpoint that is complete but not journalled yet.
pub const PENDING: &str = "manifest.pending";

/// Manifest of a checkpoint that readers may trust.
pub const PUBLISHED: &str = "manifest.json";

/// Why a checkpoint could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The system refused.
    #[error("cannot publish the checkpoint {}: {cause}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },

    /// The system refused the manifest.
    #[error("cannot write the checkpoint's manifest {}: {cause}", path.display())]
    Unfinished {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },

    /// The store refused.
    #[error("cannot publish the checkpoint: {0}")]
    Store(#[from] crate::StoredError),

    /// The manifest is another one than the coordinator journalled.
    #[error(
        "cannot publish the checkpoint {}: its manifest is not the journalled one (BLAKE3 {found}, journalled {journalled})",
        path.display()
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Hash of what is there.
        found: blake3::Hash,
        /// Hash that the coordinator has.
        journalled: blake3::Hash,
    },

    /// The directory is not below the checkpoint root.
    #[error("the checkpoint path {path:?} is not a plain relative path")]
    Outside {
        /// The path.
        path: String,
    },
}

/// Renames `manifest.pending` in `directory` to `manifest.json`, after checking that it is the
/// journalled one, and syncs the directory. One that is published already is left as it is.
pub fn publish(directory: &Path, manifest_hash: [u8; 32]) -> Result<(), PublishError> {
    let (pending, published) = (directory.join(PENDING), directory.join(PUBLISHED));
    let journalled = blake3::Hash::from_bytes(manifest_hash);
    match check(&pending, journalled) {
        Ok(()) => {}
        Err(PublishError::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
            return check(&published, journalled);
        }
        Err(error) => return Err(error),
    }
    let sync = || {
        fs::rename(&pending, &published)?;
        File::open(directory)?.sync_all()
    };
    sync().map_err(|cause| PublishError::Io {
        path: published.clone(),
        cause,
    })
}

/// The directory of a checkpoint whose `path` came over the wire: relative, and below `root`.
pub fn directory(root: &Path, path: &str) -> Result<PathBuf, PublishError> {
    let plain = !path.is_empty()
        && Path::new(path)
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    if plain {
        Ok(root.join(path))
    } else {
        Err(PublishError::Outside {
            path: path.to_owned(),
        })
    }
}

fn check(file: &Path, journalled: blake3::Hash) -> Result<(), PublishError> {
    let bytes = fs::read(file).map_err(|cause| PublishError::Io {
        path: file.to_owned(),
        cause,
    })?;
    let found = blake3::hash(&bytes);
    if found == journalled {
        Ok(())
    } else {
        Err(PublishError::Changed {
            path: file.to_owned(),
            found,
            journalled,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(text: &str) -> (tempfile::TempDir, [u8; 32]) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(PENDING), text).unwrap();
        (directory, *blake3::hash(text.as_bytes()).as_bytes())
    }

    #[test]
    fn publishing_renames_and_a_repeat_changes_nothing() {
        let (directory, hash) = pending("{}");
        for _ in 0..2 {
            publish(directory.path(), hash).unwrap();
            assert!(!directory.path().join(PENDING).exists());
            assert_eq!(
                fs::read_to_string(directory.path().join(PUBLISHED)).unwrap(),
                "{}"
            );
        }
    }

    #[test]
    fn another_manifest_is_not_published() {
        let (directory, _) = pending("{}");
        let message = publish(directory.path(), [7; 32]).unwrap_err().to_string();
        assert!(message.contains("not the journalled one"), "{message}");
        assert!(!directory.path().join(PUBLISHED).exists());
    }

    #[test]
    fn nothing_to_publish_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let message = publish(directory.path(), [7; 32]).unwrap_err().to_string();
        assert!(message.contains(PUBLISHED), "{message}");
    }

    #[test]
    fn a_path_from_the_wire_stays_below_the_root() {
        let root = Path::new("/checkpoints");
        for path in ["", "..", "a/../b", "/etc", "a/.."] {
            assert!(directory(root, path).is_err(), "{path:?}");
        }
        assert_eq!(
            directory(root, "step-1").unwrap(),
            Path::new("/checkpoints/step-1")
        );
    }
}
