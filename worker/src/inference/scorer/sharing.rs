//! Which requests read the same tokens first: those are read once, and the state after them is copied.

use std::{ops::Range, sync::Arc};

/// A continuation to be scored after a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What stands before: at least one token. Shared, because the choices of a question have it in common.
    pub context: Arc<[u32]>,
    /// What is scored: at least one token.
    pub continuation: Vec<u32>,
}

impl Request {
    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.context.len() + self.continuation.len()
    }
}

/// Requests with the same context, such as the choices of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Indices of the requests.
    pub members: Vec<usize>,
    /// Number of its family: groups whose contexts begin alike, such as the questions after the same examples.
    pub family: usize,
    /// Tokens that the whole family begins with; 0 if it has nobody else.
    pub header: usize,
    /// Tokens that the members read together, the header included. At least the last token of the context is not among them: what
    /// is scored first comes out of it.
    pub shared: usize,
}

impl Group {
    /// The tokens between header and shared end.
    pub fn own(&self) -> Range<usize> {
        self.header..self.shared
    }
}

/// Fewer tokens than these are not worth a state of their own.
const WORTHWHILE: usize = 32;

/// Puts requests that share contexts together: families side by side, the longest first, so that neighbours are of about the same
/// length and what does not fit into memory shows at once.
pub fn group(requests: &[Request]) -> Vec<Group> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by(|&a, &b| {
        requests[a]
            .context
            .cmp(&requests[b].context)
            .then(a.cmp(&b))
    });
    let mut families: Vec<Vec<Group>> = Vec::new();
    for same in order.chunk_by(|&a, &b| requests[a].context == requests[b].context) {
        let context = &requests[same[0]].context;
        let group = |header| Group {
            members: same.to_vec(),
            family: 0,
            header,
            shared: context.len() - 1,
        };
        let joined = families.last_mut().and_then(|family| {
            let last = family.last()?;
            let before = &requests[last.members[0]].context;
            let common = common_prefix(before, context)
                .min(last.shared)
                .min(context.len() - 1);
            let enough = common >= WORTHWHILE && 2 * common >= before.len().min(context.len());
            enough.then_some((family, common))
        });
        match joined {
            // The header of the first group stands for the family until all of it is known.
            Some((family, common)) => {
                let header = family[0].header.min(common);
                family[0].header = header;
                family.push(group(header));
            }
            None => families.push(vec![group(usize::MAX)]),
        }
    }
    let longest = |group: &Group| {
        let tokens = group
            .members
            .iter()
            .map(|&member| requests[member].tokens());
        tokens.max().unwrap_or(0)
    };
    families.sort_by_key(|family| std::cmp::Reverse(family.iter().map(longest).max()));
    for (number, family) in families.iter_mut().enumerate() {
        let header = if family.len() == 1 {
            0
        } else {
            family[0].header
        };
        family.sort_by_key(|group| std::cmp::Reverse(longest(group)));
        for group in family {
            (group.family, group.header) = (number, header);
            if group.members.len() == 1 {
                // Nobody to share it with: context and continuation are one piece.
                group.shared = header;
            }
        }
    }
    families.concat()
}

/// Members of a group that are scored in one batch.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The group.
    pub group: &'a Group,
    /// Indices of the requests.
    pub members: &'a [usize],
}

/// Cuts groups into batches that fit into `slots`, of which there are at least two: one for each member, one for the header of each
/// family. A question's choices stay together unless there are too many for any batch.
pub fn batches<'a>(groups: &'a [Group], slots: usize) -> Vec<Vec<Part<'a>>> {
    let mut batches: Vec<Vec<Part<'a>>> = Vec::new();
    let mut batch: Vec<Part<'a>> = Vec::new();
    let mut free = slots;
    for group in groups {
        let mut members = group.members.as_slice();
        while !members.is_empty() {
            let header = usize::from(group.header > 0);
            let known = batch
                .last()
                .is_some_and(|last| last.group.family == group.family);
            let mut needed = if known { 0 } else { header };
            let too_many = header + members.len() > slots;
            if free < needed + members.len() && !(too_many && free > needed) {
                batches.push(std::mem::take(&mut batch));
                (free, needed) = (slots, header);
            }
            free -= needed;
            let (now, later) = members.split_at(members.len().min(free));
            free -= now.len();
            members = later;
            batch.push(Part {
                group,
                members: now,
            });
        }
    }
    batches.push(batch);
    batches.retain(|batch| !batch.is_empty());
    batches
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(context: &[u32], continuation: &[u32]) -> Request {
        Request {
            context: context.into(),
            continuation: continuation.to_vec(),
        }
    }

    #[test]
    fn choices_share_their_question_and_questions_their_examples() {
        let examples: Vec<u32> = (0..40).collect();
        let question = |end: &[u32]| [&examples[..], end].concat();
        let requests = [
            request(&[9, 9], &[1]),
            request(&question(&[50, 51, 52]), &[1]),
            request(&question(&[60]), &[2]),
            request(&question(&[50, 51, 52]), &[2, 3]),
        ];
        let groups = group(&requests);
        let shape: Vec<_> = groups
            .iter()
            .map(|group| (group.members.clone(), group.family, group.own()))
            .collect();
        assert_eq!(
            shape,
            [
                (vec![1, 3], 0, 40..42),
                (vec![2], 0, 40..40),
                (vec![0], 1, 0..0)
            ]
        );
    }

    fn group_of(family: usize, header: usize, members: &[usize]) -> Group {
        Group {
            members: members.to_vec(),
            family,
            header,
            shared: header,
        }
    }

    fn shape(groups: &[Group], slots: usize) -> Vec<Vec<Vec<usize>>> {
        batches(groups, slots)
            .iter()
            .map(|batch| batch.iter().map(|part| part.members.to_vec()).collect())
            .collect()
    }

    #[test]
    fn batches_fit_into_the_slots() {
        let questions = [
            group_of(0, 40, &[0, 1]),
            group_of(0, 40, &[2, 3]),
            group_of(1, 0, &[4, 5]),
            group_of(2, 0, &[6]),
        ];
        // One slot is the header's.
        assert_eq!(
            shape(&questions, 5),
            [vec![vec![0, 1], vec![2, 3]], vec![vec![4, 5], vec![6]]]
        );
        assert_eq!(
            shape(&questions, 4),
            [
                vec![vec![0, 1]],
                vec![vec![2, 3]],
                vec![vec![4, 5], vec![6]]
            ]
        );
        // Too many choices for the slots are cut.
        assert_eq!(
            shape(&questions, 2),
            [
                vec![vec![0]],
                vec![vec![1]],
                vec![vec![2]],
                vec![vec![3]],
                vec![vec![4, 5]],
                vec![vec![6]]
            ]
        );
        assert!(shape(&[], 2).is_empty());
    }

    proptest! {
        #[test]
        fn every_request_is_read_as_it_is(
            parts in prop::collection::vec((0u32..3, 0usize..3, 0u32..3, 1usize..4), 1..24)
        ) {
            // Contexts out of few long stretches, so that they share a lot in many ways.
            let requests: Vec<Request> = parts
                .iter()
                .map(|&(stretch, length, end, continuation)| {
                    let context: Vec<u32> = (0..1 + 35 * length as u32).map(|i| i * (1 + stretch)).chain([end]).collect();
                    request(&context, &vec![7; continuation])
                })
                .collect();
            let groups = group(&requests);
            let mut seen: Vec<usize> = groups.iter().flat_map(|group| group.members.clone()).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..requests.len()).collect::<Vec<_>>());
            for pair in groups.windows(2) {
                prop_assert!(pair[0].family == pair[1].family || pair[0].family + 1 == pair[1].family);
            }
            for group in &groups {
                let first = &requests[group.members[0]].context;
                prop_assert!(group.header <= group.shared && group.shared < first.len());
                for &member in &group.members {
                    prop_assert_eq!(&requests[member].context, first);
                }
                for other in groups.iter().filter(|other| other.family == group.family) {
                    prop_assert_eq!(other.header, group.header);
                    prop_assert_eq!(&requests[other.members[0]].context[..group.header], &first[..group.header]);
                }
            }
        }
    }
}
