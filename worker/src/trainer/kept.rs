//! State that outlives its generation in this process, so that the next one need not read it from anywhere.

use supra_agent::{Donation, Held, Job, collective::Solo};

use super::{TrainError, start::Room};
use crate::{
    collective::DeviceCollective,
    kernels::Kernels,
    optim::{Part, Replica},
};

/// The whole state behind a step: one that no update was begun on and not ended.
pub struct Kept {
    run: String,
    /// The last one that trained it, or started from it.
    generation: u64,
    step: u64,
    replica: Replica,
    hash: [u8; 32],
}

impl Kept {
    /// Keeps what a job has trained up to `step`. None when that is a part, or its device no longer works.
    pub fn new(job: &Job, step: u64, replica: Replica, kernels: &dyn Kernels) -> Option<Kept> {
        if replica.part() != Part::WHOLE {
            return None;
        }
        let hash = replica.hash(kernels, &mut Solo).ok()?;
        Some(Kept {
            run: job.run.clone(),
            generation: job.generation,
            step,
            replica,
            hash,
        })
    }

    /// Its name.
    pub fn held(&self) -> Held {
        Held {
            run: self.run.clone(),
            generation: self.generation,
            step: self.step,
            replica_hash: self.hash.to_vec(),
        }
    }

    /// A generation that is to start from this state has it as its own, even if it comes to nothing.
    pub fn enter(&mut self, job: &Job) {
        if job.donation.as_ref().is_some_and(|it| self.is(&it.state)) {
            self.generation = job.generation;
        }
    }

    /// Whether this is that state, whichever generation calls it its own: the hash tells.
    fn is(&self, state: &Held) -> bool {
        self.run == state.run && self.step == state.step && self.hash[..] == state.replica_hash[..]
    }
}

/// What the ranks of `job` start from by its `donation`: what this rank keeps, or what it gets from one that does. While
/// that goes wrong this rank still has what it keeps.
///
/// # Errors
///
/// That this rank does not keep what it was said to keep; the collective's own.
pub fn start(
    job: &Job,
    donation: &Donation,
    kept: &mut Option<Kept>,
    room: Room,
    collective: &mut dyn DeviceCollective,
) -> Result<Replica, TrainError> {
    let Donation { state, holders } = donation;
    let root = holders[0];
    if !holders.contains(&job.rank) {
        // There is no room for two.
        *kept = None;
        let mut replica = room.empty();
        replica.take_over(root, collective)?;
        return Ok(replica);
    }
    let Some(mine) = kept.as_ref().filter(|kept| kept.is(state)) else {
        return Err(TrainError::NotKept {
            rank: job.rank,
            asked: Box::new(state.clone()),
            found: kept.as_ref().map(|kept| Box::new(kept.held())),
        });
    };
    if holders.len() < job.world as usize {
        mine.replica.hand_over(root, collective)?;
    }
    let mine = kept.take().expect("invariant: it was there just now");
    Ok(mine.replica.into_layout(room.layout, room.part))
}
