//! Where the next generation of a run starts: from a state that workers still have in memory, or from the newest
//! checkpoint. A plain decision.

use supra_proto::v1::{Held, StartFromHeld};

use super::snapshots::{self, Divided};
use super::state::Run;
use super::steps::Unapplied;
use crate::ledger::{self, HASH_BYTES};

/// A worker's name, and the state that it says it holds.
pub(crate) type Holder<'a> = (&'a str, &'a Held);

/// Where a generation starts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Start {
    /// From the newest checkpoint, or the base.
    Durable,
    /// From a state that workers have all of.
    Whole(Held),
    /// From one that they have in parts.
    Divided(Divided),
}

impl Start {
    /// Step of the state in memory; none when it is not there.
    pub fn step(&self) -> Option<u64> {
        match self {
            Start::Durable => None,
            Start::Whole(held) => Some(held.step),
            Start::Divided(parts) => Some(parts.step),
        }
    }

    /// The name of that state.
    pub fn state(&self, run: &Run) -> Option<Held> {
        match self {
            Start::Durable => None,
            Start::Whole(held) => Some(held.clone()),
            Start::Divided(parts) => Some(parts.state(run)),
        }
    }

    /// Whether a worker of this name, which holds this, has to hand something over.
    pub fn needs(&self, name: &str, holds: Option<&Held>) -> bool {
        match self {
            Start::Durable => false,
            Start::Whole(held) => holds == Some(held),
            Start::Divided(parts) => parts.needs(name),
        }
    }

    /// What the ranks are told of it. `holders` are those that it needs, `members` their names in rank order.
    pub fn assigned(&self, state: Held, holders: Vec<u32>, members: &[String]) -> StartFromHeld {
        let (holders, parts) = match self {
            Start::Divided(parts) => (Vec::new(), parts.holders(members)),
            Start::Durable | Start::Whole(_) => (holders, Vec::new()),
        };
        StartFromHeld {
            state: Some(state),
            holders,
            parts,
        }
    }
}

/// Where the run goes on: from the newest state in memory, unless nothing there is newer than the newest checkpoint.
///
/// # Errors
/// As [`newest`] and [`snapshots::newest`].
pub(crate) fn start(
    run: &Run,
    unapplied: Option<&Unapplied>,
    holders: &[Holder],
) -> Result<Start, String> {
    let whole = newest(run, unapplied, holders)?;
    let divided = snapshots::newest(run, unapplied, holders)?;
    Ok(match (whole, divided) {
        (Some(whole), Some(parts)) if whole.step < parts.step => Start::Divided(parts),
        (Some(whole), _) => Start::Whole(whole.clone()),
        (None, Some(parts)) => Start::Divided(parts),
        (None, None) => Start::Durable,
    })
}

/// The newest state in memory that the run can go on from; none when that is its newest checkpoint, or the base.
///
/// # Errors
/// Two workers hold different states of the same step: one of them is wrong, and nobody knows which.
fn newest<'a>(
    run: &Run,
    unapplied: Option<&Unapplied>,
    holders: &[Holder<'a>],
) -> Result<Option<&'a Held>, String> {
    let usable = || {
        let holders = holders.iter().copied();
        holders.filter(|(_, held)| usable(run, unapplied, held))
    };
    let Some((first, newest)) = usable().max_by_key(|(_, held)| held.step) else {
        return Ok(None);
    };
    let differs = |held: &Held| held.step == newest.step && !same(held, newest);
    if let Some((other, held)) = usable().find(|(_, held)| differs(held)) {
        return Err(format!(
            "{} and {} hold different parameters behind step {}: hashes {} and {}; \
             `supra resume` goes on from the newest checkpoint",
            who(run, other),
            who(run, first),
            newest.step,
            ledger::hex(&held.replica_hash),
            ledger::hex(&newest.replica_hash),
        ));
    }
    Ok(Some(newest))
}

/// Two workers hold the same state. The same one may go by two generations: that which trained it, and a later one that
/// started from it and did not come further.
pub(crate) fn same(left: &Held, right: &Held) -> bool {
    (left.step, &left.replica_hash) == (right.step, &right.replica_hash)
}

/// The state is behind the last applied step, or behind a later one that can still be applied; and it comes from the
/// generations that the ledger accounts for.
pub(crate) fn usable(run: &Run, unapplied: Option<&Unapplied>, held: &Held) -> bool {
    if held.run != run.id || held.replica_hash.len() != HASH_BYTES {
        return false;
    }
    if held.step == run.step {
        return (run.lineage..=run.generation).contains(&held.generation);
    }
    unapplied.is_some_and(|unapplied| {
        let (mut steps, number) = (unapplied.steps.iter(), held.generation);
        unapplied.run == run.number
            && unapplied.generation == number
            && steps.any(|(entry, _)| entry.step == held.step)
    })
}

/// The worker with its last rank, for people.
fn who(run: &Run, name: &str) -> String {
    match run.members.iter().position(|member| member == name) {
        Some(rank) => format!("rank {rank} ({name})"),
        None => format!("worker {name}"),
    }
}
