//! What a worker has said in its last place: for a coordinator that died before all of it was written down, or that was away.

use std::collections::VecDeque;
use std::time::Duration;

use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{self, Formed};

use crate::place::Place;

/// Messages that are kept while there is a coordinator. It writes down what all ranks have reported within a second, or 256
/// steps, and lets no rank be more than 4096 steps ahead of another. Without a coordinator everything is kept, which
/// `coordinator.away` bounds.
const KEPT: usize = 4096 + 1024;

/// A place, from when the training loop gets it until the next one is assigned.
#[derive(Debug)]
pub(super) struct Standing {
    job: u64,
    place: v1::Place,
    /// How long the worker goes on without a coordinator.
    away: Duration,
    /// Reports on steps, what was measured behind them, and the checkpoint that waits for the ledger's head, in order.
    said: VecDeque<Up>,
    /// How it left.
    farewell: Vec<Up>,
}

impl Standing {
    pub fn new(job: u64, place: &Place) -> Standing {
        Standing {
            job,
            place: v1::Place {
                run: place.run.clone(),
                generation: place.generation,
                rank: place.rank,
                formed: None,
                from: place.donation.as_ref().map(|it| it.state.clone()),
                left: false,
                step_seconds: 0.0,
            },
            away: place.recipe.coordinator.away.duration(),
            said: VecDeque::new(),
            farewell: Vec::new(),
        }
    }

    /// It is the place of this job.
    pub fn is(&self, job: u64) -> bool {
        self.job == job
    }

    /// How long the worker goes on without a coordinator; not at all before its generation trains.
    pub fn patience(&self) -> Duration {
        self.place
            .formed
            .as_ref()
            .map_or(Duration::ZERO, |_| self.away)
    }

    /// The place, once a coordinator may take it up again.
    pub fn place(&self) -> Option<&v1::Place> {
        self.place.formed.as_ref().map(|_| &self.place)
    }

    pub fn formed(&mut self, formed: Formed) {
        self.place.formed = Some(formed);
    }

    /// Keeps what is said; `heard` while there is a coordinator.
    pub fn say(&mut self, body: Up, heard: bool) {
        if let Up::Step(report) = &body {
            self.place.step_seconds = report.seconds;
        }
        self.said.push_back(body);
        while heard && self.said.len() > KEPT {
            self.said.pop_front();
        }
    }

    /// A checkpoint no longer waits for the ledger's head.
    pub fn has_head(&mut self, step: u64) {
        self.said
            .retain(|body| !matches!(body, Up::CheckpointBegun(begun) if begun.step == step));
    }

    /// The worker has left.
    pub fn leave(&mut self, farewell: Vec<Up>) {
        self.place.left = true;
        self.farewell = farewell;
    }

    /// Messages that may have to be said again.
    pub fn len(&self) -> usize {
        self.said.len() + self.farewell.len()
    }

    /// What is to be said again to a coordinator that knows of all steps up to `known`.
    pub fn repeat(&self, known: u64) -> impl Iterator<Item = &Up> {
        let news = move |body: &&Up| !matches!(body, Up::Step(report) if report.step <= known);
        self.said.iter().filter(news)
    }

    /// How it left, to be said last; nothing while it has not.
    pub fn farewell(&self) -> &[Up] {
        &self.farewell
    }
}
