//! The worker without libtorch: everything between the coordinator and the training loop.
//!
//! A worker is three layers, each in its own module:
//!
//! * [`supervisor`]: `supra-worker run` re-executes itself and restarts the child that computes;
//! * [`session`]: what the worker does with every message, as a state machine without I/O, and the
//!   control thread around it, which [`run_worker`] starts;
//! * [`collective`]: how the ranks of one generation add their gradients.
//!
//! The training loop is a function from a [`Job`] to an [`Outcome`]. It sees the coordinator only
//! through its [`Link`] and the other ranks only through a [`collective::Collective`].

#![forbid(unsafe_code)]

mod address;
mod advertise;
mod chaos;
pub mod collective;
mod control;
mod error;
mod job;
mod ledger;
mod limits;
mod line;
pub mod link;
mod place;
pub mod session;
pub mod supervisor;
mod unfinished;
mod unpublished;
mod worker;

pub use advertise::{Advertise, BadAdvertise};
pub use collective::{Collective, CollectiveError};
pub use error::AgentError;
pub use job::{Donation, Job, Outcome, PartHolder, Restore};
pub use link::{Link, Voided};
pub use place::Place;
pub use supra_proto::v1::{
    CheckpointWritten, Evaluated, FaultKind, Formed, Gates, Held, LayerGates, Part, Phase,
    Snapshot, SnapshotTaken, StepReport,
};
pub use unfinished::{Unfinished, Unwritten};
pub use worker::{Exit, Timing, WorkerOptions, run_worker};
