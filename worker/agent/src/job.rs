//! What the training loop gets, and what it gives back.

use std::sync::Arc;

use supra_checkpoint::Store;
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
    /// Its text, as the run has it: the ledger was opened for its hash.
    pub recipe_text: String,
    /// This rank, `0..world`.
    pub rank: u32,
    /// Number of ranks.
    pub world: u32,
    /// State in memory to start from; none = from `restore`.
    pub donation: Option<Donation>,
    /// Newest checkpoint, to start from unless there is a donation; none = the base.
    pub restore: Option<Restore>,
    /// Where the run's checkpoints are.
    pub checkpoint_root: Store,
    /// Step to train to, to see again what it was: then nothing is written. None = to the end of the plan.
    pub until: Option<u64>,
    /// Line to the coordinator.
    pub link: Link,
    pub(crate) plane: DataPlane,
    pub(crate) aside: DataPlane,
    /// Where the other ranks reach this one.
    pub(crate) address: String,
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
    /// Where it is kept.
    pub store: Store,
    /// Its directory, relative to the store.
    pub path: String,
    /// BLAKE3 of its manifest.
    pub manifest_hash: [u8; 32],
}

/// State that ranks of this generation have in memory, and that all of them start from.
#[derive(Clone, Debug, PartialEq)]
pub struct Donation {
    /// Which one.
    pub state: Held,
    /// Ranks that have it, ascending, at least one; the first gives it to those that do not. None when it is in parts.
    pub holders: Vec<u32>,
    /// Who gives each part of it to all, in the order of the parts; none when ranks have all of it.
    pub parts: Vec<PartHolder>,
}

/// A rank that gives a part of a state to all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartHolder {
    /// Which rank.
    pub rank: u32,
    /// Hash of the part.
    pub hash: [u8; 32],
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
        checkpoint_root: Store,
        link: Link,
        collective: Box<dyn Collective>,
    ) -> Job {
        Job {
            run: run.into(),
            generation: 1,
            recipe_text: recipe.to_yaml(),
            recipe,
            rank: collective.rank(),
            world: collective.world(),
            donation: None,
            restore,
            checkpoint_root,
            until: None,
            link,
            plane: DataPlane::Ready(Some(collective)),
            aside: DataPlane::Ready(None),
            address: String::new(),
        }
    }

    /// The same with a second collective, for [`Job::connect_aside`].
    pub fn with_aside(mut self, collective: Box<dyn Collective>) -> Job {
        self.aside = DataPlane::Ready(Some(collective));
        self
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

    /// Connects the ranks a second time, over connections of their own, for what goes on beside training: none where no
    /// second collective was given. Its ranks are in an order in which neighbours are on different hosts, where they can be.
    /// All ranks call it together, with the collective that [`connect`](Self::connect) gave them.
    ///
    /// # Errors
    ///
    /// As [`connect`](Self::connect).
    pub fn connect_aside(
        &mut self,
        host: &mut dyn Collective,
    ) -> Result<Option<Box<dyn Collective>>, CollectiveError> {
        let (listener, plan) = match std::mem::replace(&mut self.aside, DataPlane::Ready(None)) {
            DataPlane::Ready(given) => return Ok(given),
            DataPlane::Ring(listener, plan) => (listener, plan),
        };
        let addresses = host.all_gather(self.address.as_bytes())?;
        let addresses: Vec<String> = addresses
            .iter()
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .collect();
        let plan = plan.apart(&addresses);
        let ring = TcpRing::connect(&listener, &plan, self.link.abort_handle())?;
        Ok(Some(Box::new(ring)))
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::link;

    const RECIPE: &str = "\
name: t
base: { path: /base }
data: { train: /data }
budget: { tokens: 20B }
";

    /// Two ranks on each of two hosts.
    fn jobs() -> Vec<Job> {
        let listeners = [1, 1, 2, 2].map(|host| TcpListener::bind((format!("127.0.0.{host}"), 0)));
        let listeners = listeners.map(|listener| Arc::new(listener.unwrap()));
        let addresses = listeners
            .each_ref()
            .map(|listener| listener.local_addr().unwrap().to_string());
        let job = |(rank, listener): (u32, Arc<TcpListener>)| {
            let (link, control, _reports) = link::pair();
            // Nobody voids the generation.
            std::mem::forget(control);
            let plan = RingPlan {
                generation: 1,
                rank,
                world: 4,
                next_address: addresses[(rank as usize + 1) % 4].clone(),
                key: [7; 32],
                patience: Duration::from_secs(20),
            };
            let recipe = Recipe::parse(RECIPE, "t.yaml").unwrap();
            let store = Store::open("/").unwrap();
            let job = Job::local("run", recipe, None, store, link, Box::new(Solo));
            Job {
                rank,
                world: 4,
                plane: DataPlane::Ring(listener.clone(), plan.clone()),
                aside: DataPlane::Ring(listener, plan),
                address: addresses[rank as usize].clone(),
                ..job
            }
        };
        (0..).zip(listeners).map(job).collect()
    }

    #[test]
    fn the_second_ring_of_the_same_ranks_goes_from_host_to_host() {
        let threads = jobs().into_iter().map(|mut job| {
            thread::spawn(move || {
                let mut host = job.connect().unwrap();
                let mut aside = job.connect_aside(host.as_mut()).unwrap().unwrap();
                let (mut before, mut before_aside) = ([9], [9]);
                let mine = [job.rank as u8];
                aside.pass(&mine, &mut before_aside).unwrap();
                host.pass(&mine, &mut before).unwrap();
                assert!(job.connect_aside(host.as_mut()).unwrap().is_none(), "once");
                (before[0], before_aside[0])
            })
        });
        let threads: Vec<_> = threads.collect();
        let before: Vec<_> = threads.into_iter().map(|it| it.join().unwrap()).collect();
        assert_eq!(before, [(3, 3), (0, 2), (1, 0), (2, 1)]);
    }
}
