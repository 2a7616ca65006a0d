//! Names of a checkpoint's manifest before and after publishing, and why it cannot be published.

use std::path::PathBuf;

use crate::StoredError;

/// Manifest of a checkpoint that is complete but not journalled yet.
pub const PENDING: &str = "manifest.pending";

/// Manifest of a checkpoint that readers may trust.
pub const PUBLISHED: &str = "manifest.json";

/// Why a checkpoint could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The store refused.
    #[error("cannot publish the checkpoint: {0}")]
    Store(#[from] StoredError),

    /// The store refused the manifest.
    #[error("cannot write the checkpoint's manifest: {0}")]
    Unfinished(StoredError),

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
}

impl PublishError {
    /// Whether another try may succeed without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            PublishError::Store(error) | PublishError::Unfinished(error) => error.is_transient(),
            PublishError::Changed { .. } => false,
        }
    }
}
