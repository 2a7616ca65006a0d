//! Simulated time: what happens when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use supra_agent::session::Input;
use supra_coordinator::machine::RunNumber;

use super::compute::Work;
use super::network::Item;

/// Microseconds since the simulation began.
pub(super) type Time = u64;

pub(super) const MS: Time = 1_000;
pub(super) const SECOND: Time = 1_000_000;

/// Something that is going to happen.
#[derive(Debug)]
pub(super) enum Event {
    /// Clocks tick.
    WorkerTick(usize),
    CoordinatorTick,
    /// A message arrives at one end of a stream.
    Deliver {
        stream: usize,
        item: Item,
    },
    /// One end of a stream learns that it is broken.
    Noticed {
        stream: usize,
        by_worker: bool,
    },
    /// A stalled direction moves again.
    Unstall {
        stream: usize,
        up: bool,
    },
    /// A stream that stood still for too long is given up.
    KeepAlive {
        stream: usize,
    },
    /// A worker process begins.
    WorkerStarts {
        worker: usize,
    },
    /// A worker tries to attach, or has waited long enough for an answer.
    Attach {
        worker: usize,
        epoch: u32,
    },
    Unanswered {
        stream: usize,
    },
    /// The training loop gets on.
    Work {
        worker: usize,
        epoch: u32,
        job: u64,
        work: Work,
    },
    /// What a worker does beside its session is done.
    Errand {
        worker: usize,
        epoch: u32,
        input: Box<Input>,
    },
    /// A signal asks a worker to end.
    Interrupt {
        worker: usize,
        epoch: u32,
    },
    /// The coordinator begins again.
    CoordinatorStarts,
    /// A checkpoint was read again.
    Verified {
        epoch: u32,
        run: RunNumber,
        attempt: u64,
        path: String,
        manifest_hash: [u8; 32],
    },
    /// The directory of a retired checkpoint is gone.
    Deleted {
        epoch: u32,
        run: RunNumber,
        path: String,
    },
    /// The client looks at its runs.
    Client,
    /// A fault is due.
    Fault(usize),
    /// From here on nothing goes wrong any more.
    Calm,
}

/// The events to come, in order of time and then of their making.
#[derive(Default)]
pub(super) struct Queue {
    order: BinaryHeap<Reverse<(Time, u64)>>,
    events: BTreeMap<u64, Event>,
    made: u64,
}

impl Queue {
    pub fn push(&mut self, at: Time, event: Event) {
        self.made += 1;
        self.order.push(Reverse((at, self.made)));
        self.events.insert(self.made, event);
    }

    pub fn pop(&mut self) -> Option<(Time, Event)> {
        let Reverse((at, number)) = self.order.pop()?;
        Some((at, self.events.remove(&number)?))
    }
}
