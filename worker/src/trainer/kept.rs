//! State that outlives its generation in this process, so that the next one need not read it from anywhere.

use supra_agent::{Donation, Held, Job, collective::Solo};

use super::{TrainError, snapshots::Snapshot, start::Room};
use crate::{
    collective::DeviceCollective,
    kernels::Kernels,
    optim::{Layout, Part, Replica},
};

/// The state behind a step: one that no update was begun on and not ended.
pub enum Kept {
    /// All of it, on the device.
    Whole(Box<Whole>),
    /// Parts of it, in host memory.
    Parts(Parts),
}

/// The whole state behind a step.
pub struct Whole {
    run: String,
    /// The last one that trained it, or started from it.
    generation: u64,
    step: u64,
    replica: Replica,
    hash: [u8; 32],
}

/// Snapshots of the states of a run.
pub struct Parts {
    run: String,
    snapshots: Vec<Snapshot>,
}

impl Kept {
    /// Keeps what a job has trained up to `step`. None when that is a part, or its device no longer works.
    pub fn whole(job: &Job, step: u64, replica: Replica, kernels: &dyn Kernels) -> Option<Kept> {
        if replica.part() != Part::WHOLE {
            return None;
        }
        let hash = replica.hash(kernels, &mut Solo).ok()?;
        Some(Kept::Whole(Box::new(Whole {
            run: job.run.clone(),
            generation: job.generation,
            step,
            replica,
            hash,
        })))
    }

    /// Keeps the snapshots of a job, if there are any.
    pub fn parts(job: &Job, snapshots: Vec<Snapshot>) -> Option<Kept> {
        let run = job.run.clone();
        (!snapshots.is_empty()).then_some(Kept::Parts(Parts { run, snapshots }))
    }

    fn into_whole(self) -> Option<Box<Whole>> {
        match self {
            Kept::Whole(whole) => Some(whole),
            Kept::Parts(_) => None,
        }
    }

    /// The snapshots, where they are what is kept.
    pub fn into_snapshots(self) -> Vec<Snapshot> {
        match self {
            Kept::Whole(_) => Vec::new(),
            Kept::Parts(parts) => parts.snapshots,
        }
    }

    /// Its name.
    pub fn held(&self) -> Held {
        match self {
            Kept::Whole(whole) => Held {
                run: whole.run.clone(),
                generation: whole.generation,
                step: whole.step,
                replica_hash: whole.hash.to_vec(),
                snapshots: Vec::new(),
            },
            Kept::Parts(parts) => Held {
                run: parts.run.clone(),
                snapshots: parts.snapshots.iter().map(Snapshot::name).collect(),
                ..Held::default()
            },
        }
    }

    /// A generation that is to start from this state has it as its own, even if it comes to nothing.
    pub fn enter(&mut self, job: &Job) {
        if let (Kept::Whole(whole), Some(donation)) = (self, &job.donation)
            && whole.is(&donation.state)
        {
            whole.generation = job.generation;
        }
    }

    /// The whole state of this name, if it is that.
    fn is(&self, state: &Held) -> bool {
        matches!(self, Kept::Whole(whole) if whole.is(state))
    }
}

impl Whole {
    /// Whether this is that state, whichever generation calls it its own: the hash tells.
    fn is(&self, state: &Held) -> bool {
        self.run == state.run && self.step == state.step && self.hash[..] == state.replica_hash[..]
    }
}

/// What the ranks of `job` start from by its `donation`: what this rank keeps, or what it gets from those that do. While
/// that goes wrong this rank still has what it keeps. `before` is how a state was laid out for so many ranks.
///
/// # Errors
///
/// That this rank does not keep what it was said to keep; the collective's own.
pub fn start(
    job: &Job,
    donation: &Donation,
    kept: &mut Option<Kept>,
    room: Room,
    before: impl FnOnce(u32) -> Layout,
    collective: &mut dyn DeviceCollective,
) -> Result<Replica, TrainError> {
    let Donation {
        state,
        holders,
        parts,
    } = donation;
    if !parts.is_empty() {
        let layout = before(parts.len() as u32);
        return start_from_parts(job, donation, kept, room, &layout, collective);
    }
    let root = holders[0];
    if !holders.contains(&job.rank) {
        // There is no room for two.
        *kept = None;
        let mut replica = room.empty();
        replica.take_over(root, collective)?;
        return Ok(replica);
    }
    let Some(Kept::Whole(mine)) = kept.as_ref().filter(|kept| kept.is(state)) else {
        return Err(not_kept(job, state, kept.as_ref()));
    };
    if holders.len() < job.world as usize {
        mine.replica.hand_over(root, collective)?;
    }
    let mine = kept.take().and_then(Kept::into_whole);
    let mine = mine.expect("invariant: it was there just now");
    Ok(mine.replica.into_layout(room.layout, room.part))
}

/// What the ranks of `job` start from where none has all of it: each gives the parts that it was asked for.
fn start_from_parts(
    job: &Job,
    donation: &Donation,
    kept: &mut Option<Kept>,
    room: Room,
    before: &Layout,
    collective: &mut dyn DeviceCollective,
) -> Result<Replica, TrainError> {
    let Donation { state, parts, .. } = donation;
    if matches!(kept, Some(Kept::Whole(_))) {
        // There is no room for two.
        *kept = None;
    }
    let held = |index: u32| {
        let Some(Kept::Parts(mine)) = kept.as_ref() else {
            return None;
        };
        let hash = &parts.get(index as usize)?.hash;
        let of = |snapshot: &&Snapshot| mine.run == state.run && snapshot.is_of(state);
        let snapshots = mine.snapshots.iter().filter(of);
        snapshots
            .filter_map(|snapshot| snapshot.part(index, hash))
            .next()
    };
    let asked = (0..).zip(parts).filter(|(_, part)| part.rank == job.rank);
    let mine: Option<Vec<_>> = asked
        .map(|(index, _)| Some((index, held(index)?)))
        .collect();
    let Some(mine) = mine else {
        return Err(not_kept(job, state, kept.as_ref()));
    };
    let given = |index| {
        let found = mine.iter().find(|(known, _)| *known == index);
        found.map(|(_, part)| *part)
    };
    let holders: Vec<u32> = parts.iter().map(|part| part.rank).collect();
    let mut replica = room.empty();
    replica.take_parts(before, &holders, given, collective)?;
    Ok(replica)
}

fn not_kept(job: &Job, asked: &Held, found: Option<&Kept>) -> TrainError {
    TrainError::NotKept {
        rank: job.rank,
        asked: Box::new(asked.clone()),
        found: found.map(|kept| Box::new(kept.held())),
    }
}
