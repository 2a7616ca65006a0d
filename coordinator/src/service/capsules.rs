//! Capsules of runs, packed for clients, and the recipes as they were submitted, which are kept for them.

use std::path::Path;

use supra_proto::v1::CapsulePart;
use tonic::Status;

use crate::capsule::{CapsuleError, gather, submitted};
use crate::journal::Reader;
use crate::machine::RunNumber;

/// Bytes of a message.
const PART: usize = 1 << 20;

/// Keeps a recipe as its author wrote it. Nothing depends on it, so a disk that refuses is only told.
pub(super) async fn keep(state: &Path, run: &str, recipe: String) {
    let path = submitted(state, run);
    let written = tokio::task::spawn_blocking({
        let path = path.clone();
        move || {
            path.parent().map(std::fs::create_dir_all).transpose()?;
            std::fs::write(path, recipe)
        }
    });
    if let Ok(Err(error)) = written.await {
        tracing::warn!(
            "cannot keep the submitted recipe as {}: {error}",
            path.display()
        );
    }
}

/// The bytes of a run's capsule, in parts.
///
/// # Errors
/// It cannot be gathered.
pub(super) async fn pack(state: &Path, run: RunNumber) -> Result<Vec<CapsulePart>, Status> {
    let state = state.to_owned();
    let packed = tokio::task::spawn_blocking(move || {
        let journal = Reader::open(&state)?;
        Ok::<_, CapsuleError>(gather(&state, &journal, run)?.to_bytes())
    });
    let broken = |cause: String| Status::internal(format!("cannot pack the capsule: {cause}"));
    let packed = packed.await.map_err(|error| broken(error.to_string()))?;
    let bytes = packed.map_err(|error| broken(error.to_string()))?;
    let parts = bytes.chunks(PART);
    Ok(parts
        .map(|data| CapsulePart {
            data: data.to_vec(),
        })
        .collect())
}
