//! What the training loop gets, and what it gives back.

use std::path::PathBuf;
use std::sync::Arc;

use supra_proto::v1::{FaultKind, Held};
use supra_recipes::schema::Recipe;

use crate::collective::{Collective, CollectiveError, RingPlan, Solo, TcpRing, Watched};
use crate::link::Link;

/// A place in one generation of a run: everything that the training loop has to know.
pub struct Job {
    /// Id of the run.
    pub run: String,
    /// Number of the generation, from 1.
    pub generation: u64,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// This rank, `0..world`.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// State in memory to start from; none = from `restore`.
    pub donation: Option<Donation>,
    /// Newest checkpoint, to start from unless there is a donation; none = the base.
    pub restore: Option<Restore>,
    /// Directory of the run's checkpoints, absolute.
    pub checkpoint_root: PathBuf,
    /// Step to train to, to see again what it was: then nothing is written. None = to the end of the plan.
    pub until: Option<u64>,
    /// Line to the coordinator.
    pub link: Link,
    pub(crate) plane: DataPlane,
}

/// How a job reaches its peers.
pub(crate) enum DataPlane {
    /// Over the network.
    Ring(Arc<std::net::TcpListener>, RingPlan),
    /// Given, or already taken by [`Job::connect`].
    Ready(Option<Box<dyn Collective>>),
}

/// A journalled checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// Step whose state it holds.
    pub step: u64,
    /// Its directory, absolute.
    pub path: PathBuf,
    /// The same, relative to the checkpoint root.
    pub relative: String,
    /// BLAKE3 of its manifest.
    pub manifest_hash: [u8; 32],
}

/// State that ranks of this generation have in memory, and that all of them start from.
#[derive(Clone, Debug, PartialEq)]
pub struct Donation {
    /// Which one.
    pub state: Held,
    /// Ranks that have it, ascending, at least one; the first gives it to those that do not.
    pub holders: Vec<u32>,
}

/// How the training loop came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The budget is spent and the last checkpoint published.
    Finished,
    /// A stop was asked for; its checkpoint is published.
    Stopped,
    /// Another membership is to go on from the step that the ranks agreed on.
    Regrouped,
    /// The generation became void.
    Voided,
    /// Something broke.
    Fault {
        /// Who has to act.
        kind: FaultKind,
        /// One line: what, where, why, what to do.
        message: String,
    },
    /// A device computes wrong.
    Hardware {
        /// Rank that it belongs to; none when that is not known.
        culprit: Option<u32>,
        /// As of a fault.
        message: String,
    },
}

impl Job {
    /// A job with a collective of its own: for tests, and for training without a coordinator.
    /// Rank and world are those of the collective.
    pub fn local(
        run: impl Into<String>,
        recipe: Recipe,
        restore: Option<Restore>,
        checkpoint_root: PathBuf,
        link: Link,
        collective: Box<dyn Collective>,
    ) -> Job {
        Job {
            run: run.into(),
            generation: 1,
            recipe,
            rank: collective.rank(),
            world: collective.world(),
            donation: None,
            restore,
            checkpoint_root,
            until: None,
            link,
            plane: DataPlane::Ready(Some(collective)),
        }
    }

    /// Connects the ranks. Returns when all of them are there, so call it before anything is read
    /// from the checkpoint: rank 0 publishes one that waits for it before it connects.
    ///
    /// # Errors
    ///
    /// `Timeout` and `Handshake` name the neighbour that is missing or wrong, `Aborted` says that
    /// the generation is void. A second call fails: a collective cannot be had twice.
    pub fn connect(&mut self) -> Result<Box<dyn Collective>, CollectiveError> {
        match std::mem::replace(&mut self.plane, DataPlane::Ready(None)) {
            DataPlane::Ready(Some(collective)) => Ok(collective),
            DataPlane::Ready(None) => Err(CollectiveError::Aborted),
            DataPlane::Ring(..) if self.world == 1 => Ok(Box::new(Solo)),
            DataPlane::Ring(listener, plan) => {
                let ring = TcpRing::connect(&listener, &plan, self.link.abort_handle())?;
                Ok(Box::new(Watched::new(ring, self.link.waiting())))
            }
        }
    }
}
