//! Why a worker could not run.

use std::io;

use supra_proto::ClientError;

/// An error that ends the worker.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The coordinator could not be reached, or did not let the worker speak.
    #[error(transparent)]
    Client(#[from] ClientError),

    /// The data plane has no address.
    #[error("cannot set up the data plane on {address}: {cause}\n  {remedy}")]
    Data {
        /// Address that was tried.
        address: String,
        /// What the system said.
        cause: io::Error,
        /// What to do.
        remedy: &'static str,
    },

    /// A thread or runtime could not be started, or died.
    #[error("the control thread {what}: {cause}")]
    Control {
        /// What it did.
        what: &'static str,
        /// Why.
        cause: String,
    },

    /// The supervisor could not run its child.
    #[error("cannot {what}: {cause}")]
    Supervisor {
        /// What it wanted to do.
        what: String,
        /// What the system said.
        cause: io::Error,
    },
}

impl AgentError {
    /// Whether the same may work a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            AgentError::Client(error) => error.is_transient(),
            AgentError::Data { cause, .. } => cause.kind() == io::ErrorKind::AddrInUse,
            AgentError::Control { .. } | AgentError::Supervisor { .. } => false,
        }
    }

    /// Exit code of a program that ends with this error: 3 = unreachable, 2 = bad input, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            AgentError::Client(error) => error.exit_code(),
            AgentError::Data { .. } => 2,
            AgentError::Control { .. } | AgentError::Supervisor { .. } => 1,
        }
    }
}
