//! What can go wrong when the ranks write or read a checkpoint, and who has to act.

use std::path::Path;

use supra_agent::FaultKind;
use supra_checkpoint::StoredError;
use thiserror::Error;

use crate::{collective::DeviceCollectiveError, model::ModelError};

/// Why a checkpoint cannot be written or read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// Its files or the place where they are kept.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// The ranks cannot bring together what each of them keeps a part of.
    #[error(transparent)]
    Exchange(#[from] DeviceCollectiveError),
    /// The model's configuration or tokenizer cannot be put beside its weights.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl CheckpointError {
    /// Wraps an error of writing `path`.
    pub(crate) fn writing(path: &Path, source: std::io::Error) -> CheckpointError {
        StoredError::writing(path, source).into()
    }

    /// Wraps an error of putting configuration and tokenizer beside the weights.
    pub(super) fn companions(error: ModelError) -> CheckpointError {
        match error {
            ModelError::Io { path, source, .. } => CheckpointError::writing(&path, source),
            other => CheckpointError::Model(other),
        }
    }

    /// Whether another try may succeed without anybody changing the run.
    pub fn fault_kind(&self) -> FaultKind {
        match self {
            CheckpointError::Exchange(DeviceCollectiveError::Host(_)) => FaultKind::Peer,
            CheckpointError::Exchange(_) | CheckpointError::Model(_) => FaultKind::Transient,
            CheckpointError::Stored(error) if error.is_transient() => FaultKind::Transient,
            CheckpointError::Stored(StoredError::Damaged { .. }) => FaultKind::CheckpointDamaged,
            CheckpointError::Stored(_) => FaultKind::Input,
        }
    }
}
