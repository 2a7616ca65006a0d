//! The ledger of a run on its way from the coordinator into a checkpoint.

use std::time::Duration;

use supra_checkpoint::Store;
use supra_proto::Token;
use supra_proto::v1::{CheckpointWritten, LedgerRequest};
use tokio::time::sleep;

use crate::unfinished::{Unfinished, Unwritten};
use crate::worker::WorkerOptions;

/// Time before a coordinator that did not give the ledger is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// Where the ledger is to be had, and up to which record.
pub(crate) struct Source {
    coordinator: String,
    token: Option<Token>,
    run: String,
    head: [u8; 32],
}

impl Source {
    /// The ledger of a run up to the record with the hash `head`.
    pub fn new(options: &WorkerOptions, run: String, head: [u8; 32]) -> Source {
        Source {
            coordinator: options.coordinator.clone(),
            token: options.token.clone(),
            run,
            head,
        }
    }

    /// Gets it, and finishes a checkpoint with it.
    ///
    /// # Errors
    ///
    /// The coordinator is away, or the storage refuses.
    pub async fn finish(
        self,
        root: Store,
        unfinished: Box<Unfinished>,
    ) -> Result<CheckpointWritten, Unwritten> {
        let Source {
            coordinator,
            token,
            run,
            head,
        } = self;
        let request = LedgerRequest {
            run,
            head: head.to_vec(),
        };
        let ledger = match supra_proto::ledger(&coordinator, token, request).await {
            Ok(ledger) => ledger,
            Err(error) => {
                let step = unfinished.step;
                tracing::warn!(
                    "the checkpoint of step {step} waits for the ledger, which cannot be had: {error}"
                );
                sleep(PAUSE).await;
                return Err(Unwritten::NoLedger(unfinished));
            }
        };
        let write = move || unfinished.finish(&root, head, &ledger);
        let written = tokio::task::spawn_blocking(write).await;
        let refused = |cause: String| Unwritten::Refused(cause);
        written
            .map_err(|error| refused(error.to_string()))?
            .map_err(|error| refused(error.to_string()))
    }
}
