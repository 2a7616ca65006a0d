//! The control thread.

use std::sync::mpsc::SyncSender;

use tokio::sync::mpsc;

use crate::address::DataAddress;
use crate::error::AgentError;
use crate::job::Job;
use crate::link::Tagged;
use crate::worker::{Exit, WorkerOptions};

/// Everything that the control thread owns.
pub(crate) struct Controller {
    options: WorkerOptions,
}

impl Controller {
    pub fn new(
        options: WorkerOptions,
        _data: DataAddress,
        _jobs: SyncSender<Job>,
        _reports_in: mpsc::Sender<Tagged>,
        _reports: mpsc::Receiver<Tagged>,
    ) -> Controller {
        Controller { options }
    }
}

/// Runs until the worker ends.
pub(crate) fn run(controller: Controller) -> Result<Exit, AgentError> {
    Ok(Exit::Refused(controller.options.coordinator))
}
