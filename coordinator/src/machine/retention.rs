//! Which checkpoints are kept, and why. A plain decision: one may go only when a newer one is verified, so that whatever is deleted,
//! the newest that is known to be whole stays.

use std::fmt::{self, Display};

use super::state::Run;

/// Why a checkpoint is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// A user has given it a name.
    Named,
    /// It is among the newest.
    Newest,
    /// It is the first at or after this many tokens.
    Every(u64),
    /// It is the newest that is verified.
    Verified,
    /// No newer one is verified yet.
    Unverified,
}

impl Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kept::Named => f.write_str("named"),
            Kept::Newest => f.write_str("newest"),
            Kept::Every(tokens) => write!(f, "first at or after {tokens} tokens"),
            Kept::Verified => f.write_str("newest that is verified"),
            Kept::Unverified => f.write_str("until a newer one is verified"),
        }
    }
}

/// Why each checkpoint of a run is kept, in their order, when `keep` of the newest are, and of every `keep_every` tokens the first
/// (0 = none). None for those that may go.
pub(crate) fn reasons(run: &Run, keep: u32, keep_every: u64) -> Vec<Option<Kept>> {
    let firsts = firsts(run, keep_every);
    let (mut published, mut verified) = (0, false);
    let newest_first = run.checkpoints.iter().zip(firsts).rev();
    let mut reasons: Vec<Option<Kept>> = newest_first
        .map(|(checkpoint, first)| {
            // One that is not published is of use only as the newest of all.
            let newest = published < if checkpoint.published { keep.max(1) } else { 1 };
            published += u32::from(checkpoint.published);
            let newer = verified;
            verified |= checkpoint.verified;
            match (first, newer) {
                _ if !checkpoint.name.is_empty() => Some(Kept::Named),
                _ if newest => Some(Kept::Newest),
                (Some(tokens), _) => Some(Kept::Every(tokens)),
                (None, false) if checkpoint.verified => Some(Kept::Verified),
                (None, false) => Some(Kept::Unverified),
                (None, true) => None,
            }
        })
        .collect();
    reasons.reverse();
    reasons
}

/// Paths of the checkpoints that may go, oldest first.
pub(crate) fn removable(run: &Run, keep: u32, keep_every: u64) -> Vec<String> {
    let reasons = reasons(run, keep, keep_every).into_iter();
    let with = run.checkpoints.iter().zip(reasons);
    with.filter(|(_, reason)| reason.is_none())
        .map(|(checkpoint, _)| checkpoint.path.clone())
        .collect()
}

/// For each checkpoint, the multiple of `every` tokens that it is the first to reach, of those that are published. A checkpoint
/// between two that are kept for this reason reaches none, so deleting it changes no answer.
fn firsts(run: &Run, every: u64) -> Vec<Option<u64>> {
    let mut reached = 0;
    let checkpoints = run.checkpoints.iter();
    checkpoints
        .map(|checkpoint| {
            let multiple = checkpoint.tokens.checked_div(every)?;
            let first = checkpoint.published && multiple > reached;
            if first {
                reached = multiple;
            }
            first.then_some(multiple * every)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::rig::Rig;
    use super::super::state::Checkpoint;
    use super::*;

    fn checkpoint(step: u64) -> Checkpoint {
        Checkpoint {
            step,
            tokens: 10 * step,
            generation: 1,
            path: format!("step-{step}"),
            bytes: 1,
            manifest_hash: [0; 32],
            published: true,
            world: 1,
            at: 0,
            verified: true,
            name: String::new(),
        }
    }

    fn run(checkpoints: Vec<Checkpoint>) -> Run {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        Run {
            checkpoints,
            ..rig.run().clone()
        }
    }

    #[test]
    fn the_newest_stay_and_older_ones_go() {
        let run = run((1..=4).map(checkpoint).collect());
        assert_eq!(removable(&run, 2, 0), ["step-1", "step-2"]);
        assert_eq!(removable(&run, 0, 0).len(), 3, "never the last one");
        assert_eq!(removable(&run, 9, 0).len(), 0);
    }

    #[test]
    fn nothing_older_than_the_newest_verified_stays_for_want_of_proof() {
        let mut checkpoints: Vec<_> = (1..=4).map(checkpoint).collect();
        for known in &mut checkpoints[1..] {
            known.verified = false;
        }
        let run = run(checkpoints);
        let reasons = reasons(&run, 1, 0);
        assert_eq!(
            reasons,
            [
                Some(Kept::Verified),
                Some(Kept::Unverified),
                Some(Kept::Unverified),
                Some(Kept::Newest)
            ]
        );
    }

    #[test]
    fn named_ones_and_the_first_after_each_multiple_stay_for_ever() {
        let mut checkpoints: Vec<_> = (1..=8).map(checkpoint).collect();
        checkpoints[0].name = "best".into();
        let run = run(checkpoints);
        // 30, 60: the steps 3 and 6.
        assert_eq!(
            removable(&run, 1, 30),
            ["step-2", "step-4", "step-5", "step-7"]
        );
        assert_eq!(reasons(&run, 1, 25)[2], Some(Kept::Every(25)));
    }

    #[test]
    fn an_unpublished_one_counts_for_nothing_but_is_kept_as_the_newest() {
        let mut checkpoints: Vec<_> = (1..=4).map(checkpoint).collect();
        checkpoints[1].published = false;
        checkpoints[3].published = false;
        checkpoints[3].verified = false;
        let run = run(checkpoints);
        assert_eq!(removable(&run, 1, 0), ["step-1", "step-2"]);
    }

    proptest! {
        /// Checkpoints come one by one, some are verified, and what may go goes at once: what remains is what the whole
        /// history would have kept, and the newest verified one is never lost.
        #[test]
        fn deleting_early_changes_no_later_answer(
            verified in prop::collection::vec(any::<bool>(), 1..30), keep in 1u32..4, every in 0u64..60,
        ) {
            let mut kept = run(Vec::new());
            let mut newest = None;
            for (step, verified) in (1..).zip(verified) {
                kept.checkpoints.push(Checkpoint { verified, ..checkpoint(step) });
                newest = if verified { Some(step) } else { newest };
                let gone = removable(&kept, keep, every);
                kept.checkpoints.retain(|known| !gone.contains(&known.path));
                let there: Vec<u64> = kept.checkpoints.iter().map(|known| known.step).collect();
                prop_assert!(newest.is_none_or(|newest| there.contains(&newest)));
                let last: Vec<u64> = (step.saturating_sub(u64::from(keep) - 1).max(1)..=step).collect();
                prop_assert!(there.ends_with(&last));
                for multiple in 1..=(10 * step).checked_div(every).unwrap_or(0) {
                    let first = (multiple * every).div_ceil(10);
                    prop_assert!(there.contains(&first), "{multiple} of {every}: {there:?}");
                }
            }
        }
    }
}
