//! Where the next generation of a run starts: from a state that workers still have in memory, or from the newest
//! checkpoint. A plain decision.

use supra_proto::v1::Held;

use super::state::Run;
use super::steps::Unapplied;
use crate::ledger::{self, HASH_BYTES};

/// A worker's name, and the state that it says it holds.
pub(crate) type Holder<'a> = (&'a str, &'a Held);

/// The newest state in memory that the run can go on from; none when that is its newest checkpoint, or the base.
///
/// # Errors
/// Two workers hold different states of the same step: one of them is wrong, and nobody knows which.
pub(crate) fn newest<'a>(
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
