//! Reads a run out of its checkpoints for a client.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use supra_proto::v1::AdoptRequest;
use tonic::Status;

use crate::adopt::{self, AdoptError};
use crate::machine::Adoption;

/// Ends the reading when nobody waits for it any more.
#[derive(Default)]
struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is to be adopted; `known` are the ids of runs that need not be.
///
/// # Errors
/// As [`adopt::read`].
pub(super) async fn read(
    request: AdoptRequest,
    known: BTreeSet<String>,
) -> Result<Adoption, Status> {
    let waiting = Waiting::default();
    let gone = waiting.0.clone();
    let AdoptRequest { url, strict } = request;
    let read = move || {
        let mut go_on = |_| !gone.load(Ordering::Relaxed);
        adopt::read(&url, strict, &known, &mut go_on)
    };
    let adoption = tokio::task::spawn_blocking(read).await;
    let adoption = adoption.map_err(|error| Status::internal(error.to_string()))?;
    adoption.map_err(|error| {
        let message = error.to_string();
        match error {
            AdoptError::Input(_) => Status::invalid_argument(message),
            AdoptError::Known(_) => Status::already_exists(message),
            AdoptError::Broken(_) => Status::data_loss(message),
            AdoptError::Storage(_) => Status::internal(message),
            AdoptError::Stopped => Status::cancelled(message),
        }
    })
}
