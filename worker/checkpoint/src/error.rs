//! What can go wrong with a checkpoint, and the remedy.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::store::{self, Refusal};

/// Why a checkpoint cannot be written or read.
#[derive(Debug, Error)]
pub enum StoredError {
    /// The storage has too little room: nothing was begun.
    #[error(
        "no room for the checkpoint at {path}: it needs {needed} bytes, {free} are free. Free some, lower \
         checkpoint.keep, or move checkpoint.to"
    )]
    Full {
        /// The directory being written.
        path: PathBuf,
        /// Bytes of the checkpoint.
        needed: u64,
        /// Bytes left on the storage.
        free: u64,
    },
    /// The room ran out while the checkpoint was written: another writer, a quota, a limit of the process.
    #[error(
        "cannot write {path}: {cause}; {free} bytes are free there. Free some room or raise the quota or the limit of \
         file sizes (`ulimit -f`), lower checkpoint.keep, or move checkpoint.to"
    )]
    RanOut {
        /// The file that could not be written to its end.
        path: PathBuf,
        /// Bytes left on the storage.
        free: u64,
        /// The system's reason.
        cause: io::Error,
    },
    /// The storage refuses to be written.
    #[error(
        "cannot write {path}: {cause}. checkpoint.to has to be a directory that the worker may write to"
    )]
    NotWritable {
        /// What could not be written.
        path: PathBuf,
        /// The system's reason.
        cause: io::Error,
    },
    /// Anything else that the system refuses.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file is not what was written.
    #[error(
        "checkpoint damaged: {path}: {problem}. `supra checkpoints` lists those that there are"
    )]
    Damaged {
        /// The damaged file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The checkpoint is sound but belongs to something else.
    #[error("{path} does not fit this run: {problem}")]
    Foreign {
        /// The checkpoint.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
    /// An object store does not do what it is asked.
    #[error("cannot {action} {path}: {refusal}")]
    Remote {
        /// What was tried.
        action: &'static str,
        /// URL of the object, or of the prefix.
        path: PathBuf,
        /// What came back.
        refusal: Refusal,
    },
    /// A run has begun checkpoints and completed none.
    #[error(
        "{path} has no complete checkpoint yet: {begun} begun, none with a {}; wait for the run's first one, which \
         `supra checkpoints` lists",
        crate::PUBLISHED
    )]
    Incomplete {
        /// The folder of checkpoints.
        path: PathBuf,
        /// Checkpoints without a manifest.
        begun: usize,
    },
    /// No store has such a name.
    #[error(
        "{location:?} names no store of checkpoints: write a directory, file:///directory, s3://bucket/prefix or \
         gs://bucket/prefix"
    )]
    NotAStore {
        /// What was to be opened.
        location: String,
    },
    /// A path leads out of the store.
    #[error("{path:?} is not a plain relative path below {root}")]
    Outside {
        /// The store.
        root: PathBuf,
        /// The path.
        path: String,
    },
    /// Ranks look at different storage.
    #[error(
        "the checkpoint folder {path} is not shared: {problem}. checkpoint.to has to be storage that every worker sees \
         under this path"
    )]
    NotShared {
        /// The checkpoint root.
        path: PathBuf,
        /// Which ranks miss what.
        problem: String,
    },
}

impl StoredError {
    /// Wraps an error of writing `path`.
    pub fn writing(path: &Path, source: io::Error) -> StoredError {
        let path = path.to_owned();
        let source = match source.downcast::<Refusal>() {
            Ok(refusal) => return StoredError::remote("write", path, refusal),
            Err(source) => source,
        };
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => StoredError::RanOut {
                free: store::free_bytes(&path).unwrap_or(0),
                path,
                cause: source,
            },
            io::ErrorKind::ReadOnlyFilesystem
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::NotFound
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::AlreadyExists => StoredError::NotWritable {
                path,
                cause: source,
            },
            _ => StoredError::Io {
                action: "write",
                path,
                source,
            },
        }
    }

    /// Whether another try may succeed without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            StoredError::Full { .. } | StoredError::RanOut { .. } | StoredError::Io { .. } => true,
            StoredError::Remote { refusal, .. } => refusal.is_transient(),
            _ => false,
        }
    }

    /// Wraps what an object store answered. What is not there is damage, as in a directory.
    pub(crate) fn remote(action: &'static str, path: PathBuf, refusal: Refusal) -> StoredError {
        if refusal.is_missing() && action == "read" {
            return StoredError::reading(&path, io::ErrorKind::NotFound.into());
        }
        StoredError::Remote {
            action,
            path,
            refusal,
        }
    }

    /// Wraps an error of reading `path`.
    pub fn reading(path: &Path, source: io::Error) -> StoredError {
        if source.kind() == io::ErrorKind::NotFound {
            return StoredError::Damaged {
                path: path.to_owned(),
                problem: "the file is missing".to_owned(),
            };
        }
        StoredError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        }
    }
}
