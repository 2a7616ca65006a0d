//! Where ranks divide the state: copies of it that outlive a rank.
//!
//! Every few steps each rank copies its part to host memory, and a thread passes the copy on to another rank, beside
//! training, over connections of its own. A snapshot that all ranks have whole is there twice, so the death of one rank costs
//! the steps since then. There are two buffers: the next snapshot is begun only when all ranks have the last one whole,
//! and takes the place of the one before that.

use std::{
    sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel},
    thread::{self, JoinHandle},
};

use supra_agent::{
    Collective, CollectiveError, Held, Job, Link, Part, Snapshot as Name, SnapshotTaken,
};
use supra_recipes::plan::snapshots::every;

use super::{TrainError, Trainer};
use crate::optim::{HostPart, HostRoom, Replica};

/// BLAKE3 of a part.
type Hash = [u8; 32];

/// What one rank has of a state: its own part, and a neighbour's.
pub struct Snapshot {
    /// Generation that trained it, or started from it.
    generation: u64,
    step: u64,
    /// Number of parts.
    of: u32,
    parts: [(HostPart, Hash); 2],
}

impl Snapshot {
    /// Its name.
    pub fn name(&self) -> Name {
        let part = |(part, hash): &(HostPart, Hash)| Part {
            index: part.index(),
            hash: hash.to_vec(),
        };
        Name {
            generation: self.generation,
            step: self.step,
            of: self.of,
            parts: self.parts.iter().map(part).collect(),
        }
    }

    /// Whether it is of the state of this name.
    pub fn is_of(&self, state: &Held) -> bool {
        (self.generation, self.step) == (state.generation, state.step)
    }

    /// The part of this index, if it is here and the memory still holds what was put there.
    pub fn part(&self, index: u32, hash: &Hash) -> Option<&HostPart> {
        let found = |(part, known): &&(HostPart, Hash)| part.index() == index && known == hash;
        let (part, _) = self.parts.iter().find(found)?;
        (part.hash() == *hash).then_some(part)
    }
}

/// A copy that was begun: the rank's own part, and room for the neighbour's.
struct Begun {
    generation: u64,
    step: u64,
    of: u32,
    own: HostPart,
    kept: HostPart,
}

/// The snapshots of one rank in one generation.
pub struct Snapshots {
    generation: u64,
    every: u64,
    /// Step of the one that was begun last, or that the generation started from.
    last: u64,
    /// Whole ones, oldest first; one beside that which is under way, else two at most.
    whole: Vec<Snapshot>,
    under_way: bool,
    thread: Option<JoinHandle<()>>,
    begun: Option<SyncSender<Begun>>,
    done: Receiver<Result<Snapshot, CollectiveError>>,
}

impl Snapshots {
    /// Those of a generation whose state is behind `step`; none where the recipe wants none, or every rank has all of the
    /// state. `before` is what the rank has of older ones: only those that the generation starts from are kept.
    ///
    /// # Errors
    ///
    /// The collective's own, and that there is no room for a thread.
    pub fn start(
        job: &Job,
        aside: Option<Box<dyn Collective>>,
        step: u64,
        before: Vec<Snapshot>,
    ) -> Result<Option<Snapshots>, TrainError> {
        let every = every(&job.recipe, job.world).into();
        let Some(aside) = aside.filter(|_| every > 0) else {
            return Ok(None);
        };
        let state = job.donation.as_ref().map(|donation| &donation.state);
        let kept = |snapshot: &Snapshot| state.is_some_and(|state| snapshot.is_of(state));
        let (begun, queue) = sync_channel(1);
        let (sender, done) = sync_channel(1);
        let link = job.link.clone();
        let thread = thread::Builder::new()
            .name("snapshots".to_owned())
            .spawn(move || pass_on(aside, &link, &queue, &sender))
            .map_err(TrainError::Thread)?;
        Ok(Some(Snapshots {
            generation: job.generation,
            every,
            last: step,
            whole: before.into_iter().filter(kept).collect(),
            under_way: false,
            thread: Some(thread),
            begun: Some(begun),
            done,
        }))
    }

    /// Whether the one that was begun last is whole on this rank.
    ///
    /// # Errors
    ///
    /// It has failed.
    pub fn settled(&mut self) -> Result<bool, TrainError> {
        if self.under_way {
            match self.done.try_recv() {
                Ok(ended) => self.ended(ended)?,
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(CollectiveError::Aborted.into()),
            }
        }
        Ok(!self.under_way)
    }

    /// Whether one should be taken behind `step`, as soon as all ranks have the last one whole.
    pub fn due(&self, step: u64) -> bool {
        step >= self.last + self.every
    }

    /// Begins one of `replica`, which is behind `step` and on which nothing works. All ranks have the last one whole.
    pub fn begin(&mut self, replica: &Replica, step: u64) {
        // This one takes the place of the one before the last.
        let older = (self.whole.len() > 1).then(|| self.whole.remove(0));
        let older = older.map(|older| older.parts.map(|(part, _)| part));
        let room = HostRoom::of(replica, replica.part());
        let [mut own, kept] = older
            .filter(|[own, _]| room.fits(own))
            .unwrap_or_else(|| [(); 2].map(|()| room.allocate()));
        own.copy_from(replica, replica.part());
        let begun = Begun {
            generation: self.generation,
            step,
            of: replica.part().of as u32,
            own,
            kept,
        };
        (self.last, self.under_way) = (step, true);
        if let Some(queue) = &self.begun {
            // A thread that is gone is found out by whoever waits for it.
            queue.send(begun).ok();
        }
    }

    /// Waits until the one that was begun last is whole on this rank.
    ///
    /// # Errors
    ///
    /// It has failed.
    pub fn wait(&mut self) -> Result<(), TrainError> {
        if self.under_way {
            let ended = self.done.recv().map_err(|_| CollectiveError::Aborted)?;
            self.ended(ended)?;
        }
        Ok(())
    }

    fn ended(&mut self, ended: Result<Snapshot, CollectiveError>) -> Result<(), TrainError> {
        self.under_way = false;
        self.whole.push(ended.map_err(TrainError::Snapshot)?);
        Ok(())
    }

    /// Those that are whole. One that is under way is waited for: an abort of the generation ends it.
    pub fn finish(mut self) -> Vec<Snapshot> {
        // What has failed is not whole, and why matters no more.
        self.wait().ok();
        std::mem::take(&mut self.whole)
    }
}

impl Drop for Snapshots {
    fn drop(&mut self) {
        self.begun = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Passes on what was begun, until there is no more of it, or the ring breaks.
fn pass_on(
    mut ring: Box<dyn Collective>,
    link: &Link,
    begun: &Receiver<Begun>,
    done: &SyncSender<Result<Snapshot, CollectiveError>>,
) {
    while let Ok(begun) = begun.recv() {
        let ended = begun.pass(ring.as_mut());
        if let Ok(snapshot) = &ended {
            link.snapshot_taken(snapshot.taken());
        }
        let broken = ended.is_err();
        if done.send(ended).is_err() || broken {
            return;
        }
    }
}

impl Begun {
    fn pass(mut self, ring: &mut dyn Collective) -> Result<Snapshot, CollectiveError> {
        let (own, kept) = self.own.pass(&mut self.kept, ring)?;
        Ok(Snapshot {
            generation: self.generation,
            step: self.step,
            of: self.of,
            parts: [(self.own, own), (self.kept, kept)],
        })
    }
}

impl Snapshot {
    fn taken(&self) -> SnapshotTaken {
        let [own, kept] = self.parts.each_ref().map(|(part, hash)| Part {
            index: part.index(),
            hash: hash.to_vec(),
        });
        SnapshotTaken {
            step: self.step,
            own: Some(own),
            kept: Some(kept),
        }
    }
}

impl Trainer<'_> {
    /// Whether the snapshot that this rank has begun last is whole.
    pub(super) fn settled(&mut self) -> Result<bool, TrainError> {
        self.snapshots.as_mut().map_or(Ok(true), Snapshots::settled)
    }

    pub(super) fn snapshot_due(&self) -> bool {
        let snapshots = self.snapshots.as_ref();
        snapshots.is_some_and(|snapshots| snapshots.due(self.step))
    }

    /// Begins a snapshot of the step just done; all ranks have the last one whole.
    pub(super) fn snapshot(&mut self) -> Result<(), TrainError> {
        if let Some(snapshots) = &mut self.snapshots {
            self.exchange.all_gathered()?;
            snapshots.begin(&self.replica, self.step);
        }
        Ok(())
    }

    /// Leaves a snapshot of the step just done, whole on all ranks, for another membership to go on from.
    pub(super) fn snapshot_for_the_next(&mut self) -> Result<(), TrainError> {
        for begins in [true, false] {
            if let Some(snapshots) = &mut self.snapshots {
                snapshots.wait()?;
                self.exchange.host().barrier()?;
            }
            if begins {
                self.snapshot()?;
            }
        }
        Ok(())
    }
}
