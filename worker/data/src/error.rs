//! What can be wrong with data: every error names the file, the place in it, the cause and what to do.

use std::io;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use supra_recipes::PlanError;

/// Anything that stops reading or writing data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused.
    #[error("cannot {action} {}", .path.display())]
    Io {
        /// What was tried: "read", "create", ...
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file that is not parquet, or damaged parquet.
    #[error("{}: {place}cannot be read as parquet; {remedy}", .path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Where in it, ending in ": ", or nothing.
        place: String,
        /// What the parquet reader says.
        #[source]
        source: ParquetError,
        /// What to do.
        remedy: &'static str,
    },
    /// Token parquet that cannot be written.
    #[error("{}: cannot be written", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the parquet writer says.
        #[source]
        source: ParquetError,
    },
    /// A file whose content cannot be used.
    #[error("{}: {cause}; {remedy}", .path.display())]
    Content {
        /// The file or directory.
        path: PathBuf,
        /// Where in it and what is wrong there.
        cause: String,
        /// What to do.
        remedy: String,
    },
    /// A file that is not what the manifest says.
    #[error("{}: {cause}; the dataset changed after it was indexed: restore it, or run `supra data index` again", .path.display())]
    Changed {
        /// The file or directory.
        path: PathBuf,
        /// What differs.
        cause: String,
    },
    /// JSON that does not parse.
    #[error("{}: is not {what}", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What it should be: "a dataset manifest", ...
        what: &'static str,
        /// Line, column and reason.
        #[source]
        source: serde_json::Error,
    },
    /// A tokenizer that does not load or fails on a text.
    #[error("{}: {action}", .path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What failed.
        action: String,
        /// What the tokenizer library says.
        #[source]
        source: tokenizers::Error,
    },
    /// A request that cannot be met.
    #[error("{0}")]
    Request(String),
    /// A budget that the dataset cannot serve.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl DataError {
    /// For `map_err`: the operating system refused `action` on `path`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataError {
        move |source| DataError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Content of `path` that cannot be used.
    pub(crate) fn content(
        path: &Path,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> DataError {
        DataError::Content {
            path: path.to_owned(),
            cause: cause.into(),
            remedy: remedy.into(),
        }
    }

    /// `path` differs from the manifest.
    pub(crate) fn changed(path: &Path, cause: impl Into<String>) -> DataError {
        DataError::Changed {
            path: path.to_owned(),
            cause: cause.into(),
        }
    }
}
