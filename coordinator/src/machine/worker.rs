//! An attached worker as the machine sees it.

use std::time::Duration;

use supra_proto::v1::{self, Held, Phase, Place};

/// Number of a worker's stream, new for each.
pub type Conn = u64;

/// No stream: they are counted from 1.
pub(crate) const NO_CONN: Conn = 0;

/// One attached worker.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub hello: v1::Hello,
    /// Where its stream comes from.
    pub peer: String,
    /// When it was last heard of.
    pub heard: Duration,
    /// What its last heartbeat said.
    pub phase: Phase,
    pub step: u64,
    /// For how long it has waited for other ranks in an exchange.
    pub waited: Duration,
    /// State that it has in memory, by what it said last; none while it has a place.
    pub held: Option<Held>,
    /// Place in a generation that is over, which it has not left yet.
    pub place: Option<Box<Place>>,
}

impl Worker {
    pub fn new(mut hello: v1::Hello, peer: String, now: Duration) -> Self {
        Worker {
            held: hello.held.take(),
            place: hello.place.take(),
            hello,
            peer,
            heard: now,
            phase: Phase::Idle,
            step: 0,
            waited: Duration::ZERO,
        }
    }

    /// What it is doing, for one-line reasons.
    pub fn doing(&self) -> String {
        match self.phase {
            Phase::Training => format!("training step {}", self.step),
            Phase::Checkpointing => format!("writing the checkpoint of step {}", self.step),
            Phase::Evaluating => format!("evaluating the state behind step {}", self.step),
            other => phase_name(other).to_owned(),
        }
    }
}

/// The phase as clients see it.
pub(crate) fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified | Phase::Idle => "idle",
        Phase::Forming => "forming",
        Phase::Loading => "loading",
        Phase::Training => "training",
        Phase::Checkpointing => "checkpointing",
        Phase::Evaluating => "evaluating",
        Phase::Leaving => "leaving",
    }
}
