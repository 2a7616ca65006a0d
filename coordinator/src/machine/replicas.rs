//! The canary: whether the replicas of a generation are still the same. Where they are not, which ranks differ, and from which
//! block on.

use std::collections::BTreeMap;

use supra_proto::v1::StepReport;

use super::agreement::Said;
use crate::ledger;

/// The hash that all replicas have, in hexadecimal digits; empty when none was due.
///
/// # Errors
/// They differ: names the ranks that have something else than most, or all when there is no majority, and the first block in
/// which they differ.
pub(crate) fn same(said: &[Said<StepReport>]) -> Result<String, String> {
    let mut groups: BTreeMap<&[u8], Vec<Said<StepReport>>> = BTreeMap::new();
    for one in said {
        groups.entry(&one.2.replica_hash).or_default().push(*one);
    }
    let mut groups: Vec<(&[u8], Vec<Said<StepReport>>)> = groups.into_iter().collect();
    // The largest first; among equal ones that of the lowest rank.
    groups.sort_by_key(|(_, group)| (usize::MAX - group.len(), group[0].0));
    let Some(((hash, most), others)) = groups.split_first() else {
        return Err("no rank reported".into());
    };
    if others.is_empty() {
        return Ok(ledger::hex(hash));
    }
    let others: Vec<Said<StepReport>> =
        others.iter().flat_map(|(_, group)| group.clone()).collect();
    let place = others
        .iter()
        .map(|(_, _, other)| first_difference(most[0].2, other))
        .min()
        .unwrap_or(Place::Unknown);
    let who = if 2 * most.len() > said.len() {
        let have = if others.len() == 1 { "has" } else { "have" };
        format!(
            "{} {have} other parameters or optimizer state than {}",
            names(&others),
            names(most)
        )
    } else {
        let mut all = said.to_vec();
        all.sort_by_key(|(rank, _, _)| *rank);
        format!(
            "{} have different parameters or optimizer state, and no majority says which are right",
            names(&all)
        )
    };
    Err(format!(
        "the replicas differ, first in {place}: {who}. A device or its memory is at fault; `supra resume` goes on from the \
         newest checkpoint"
    ))
}

/// Where two replicas differ first, in the model's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Embedding,
    /// From 0.
    Block(usize),
    /// The last norm and the output layer.
    Head,
    /// No bucket does: the counter of updates.
    Updates,
    /// A rank has sent no hashes of buckets.
    Unknown,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Embedding => f.write_str("the embedding"),
            Place::Block(number) => write!(f, "block {number}"),
            Place::Head => f.write_str("the head"),
            Place::Updates => f.write_str("the number of updates"),
            Place::Unknown => f.write_str("a block that was not reported"),
        }
    }
}

fn first_difference(left: &StepReport, right: &StepReport) -> Place {
    let (left, right) = (&left.bucket_hashes, &right.bucket_hashes);
    if left.is_empty() || left.len() != right.len() {
        return Place::Unknown;
    }
    match left
        .iter()
        .zip(right)
        .position(|(left, right)| left != right)
    {
        None => Place::Updates,
        Some(0) => Place::Embedding,
        Some(bucket) if bucket + 1 == left.len() => Place::Head,
        Some(bucket) => Place::Block(bucket - 1),
    }
}

/// `rank 0 (a), rank 1 (b) and rank 3 (d)`; many are cut short.
fn names(said: &[Said<StepReport>]) -> String {
    const SHOWN: usize = 4;
    let named = |(rank, name, _): &Said<StepReport>| format!("rank {rank} ({name})");
    let mut names: Vec<String> = said.iter().take(SHOWN).map(named).collect();
    if said.len() > SHOWN {
        names.push(format!("{} more", said.len() - SHOWN));
    }
    match names.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ranks with these hashes of buckets say.
    fn said(buckets: &[&[u64]]) -> Result<String, String> {
        let reports: Vec<StepReport> = buckets
            .iter()
            .map(|buckets| StepReport {
                replica_hash: buckets.iter().flat_map(|it| it.to_le_bytes()).collect(),
                bucket_hashes: buckets.to_vec(),
                ..StepReport::default()
            })
            .collect();
        let names = ["a", "b", "c", "d", "e", "f", "g"];
        let ranks = reports.iter().enumerate();
        let said: Vec<_> = ranks
            .map(|(rank, report)| (rank, names[rank], report))
            .collect();
        same(&said)
    }

    #[test]
    fn equal_replicas_have_one_hash() {
        assert_eq!(said(&[&[1], &[1]]), Ok("0100000000000000".into()));
        assert_eq!(said(&[&[], &[]]), Ok(String::new()), "none was due");
    }

    #[test]
    fn the_rank_that_differs_from_most_is_named_with_its_first_block() {
        let right: &[u64] = &[1, 2, 3, 4, 5];
        let error = said(&[right, right, &[1, 2, 3, 9, 9], right]).unwrap_err();
        assert!(
            error.starts_with(
                "the replicas differ, first in block 2: rank 2 (c) has other parameters or optimizer state than \
                 rank 0 (a), rank 1 (b) and rank 3 (d)"
            ),
            "{error}"
        );
        let error = said(&[&[9, 2, 3, 4, 5], right, right, &[1, 2, 3, 4, 9], right]).unwrap_err();
        assert!(
            error.contains("in the embedding: rank 0 (a) and rank 3 (d) have other"),
            "{error}"
        );
    }

    #[test]
    fn of_two_ranks_nobody_knows_which_is_right() {
        let error = said(&[&[1, 2, 3], &[1, 2, 9]]).unwrap_err();
        assert!(
            error.contains("first in the head: rank 0 (a) and rank 1 (b) have different"),
            "{error}"
        );
    }

    #[test]
    fn a_difference_that_no_bucket_has_is_that_of_the_updates() {
        let one = StepReport {
            replica_hash: vec![1],
            bucket_hashes: vec![1, 2, 3],
            ..StepReport::default()
        };
        let other = StepReport {
            replica_hash: vec![2],
            ..one.clone()
        };
        let error = same(&[(0, "a", &one), (1, "b", &other)]).unwrap_err();
        assert!(error.contains("first in the number of updates"), "{error}");
        let silent = StepReport {
            bucket_hashes: Vec::new(),
            ..other
        };
        let error = same(&[(0, "a", &one), (1, "b", &silent)]).unwrap_err();
        assert!(error.contains("that was not reported"), "{error}");
    }

    #[test]
    fn of_many_ranks_only_some_are_named() {
        let most: &[u64] = &[1, 1, 1];
        let error = said(&[most, most, most, most, most, most, &[1, 2, 1]]).unwrap_err();
        assert!(error.contains("rank 3 (d) and 2 more"), "{error}");
        assert!(error.contains("rank 6 (g) has"), "{error}");
    }
}
