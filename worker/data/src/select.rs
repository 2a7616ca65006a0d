//! Chooses held-out documents by their hash: a choice that depends on the text alone, not on order or layout.

use std::collections::{BTreeMap, BinaryHeap};

use crate::stream::Chunk;

/// A document that may be held out. Ordered by hash, then by place.
///
/// Equal documents have equal hashes and so stand side by side: they are chosen together, except that the number asked
/// for may run out among them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    hash: [u8; 16],
    file: usize,
    /// Row group and number in it (see [`crate::manifest::Selection`]) of each piece.
    pieces: Vec<(usize, u32)>,
}

/// The candidates with the smallest hashes.
#[derive(Debug, Default)]
pub(crate) struct Smallest {
    limit: usize,
    heap: BinaryHeap<Candidate>,
    /// Documents seen that could be held out.
    eligible: u64,
}

impl Smallest {
    pub(crate) fn new(limit: usize) -> Smallest {
        Smallest {
            limit,
            ..Smallest::default()
        }
    }

    fn push(&mut self, candidate: Candidate) {
        self.heap.push(candidate);
        if self.heap.len() > self.limit {
            self.heap.pop();
        }
    }

    /// Takes over what `other` found.
    pub(crate) fn merge(&mut self, other: Smallest) {
        self.eligible += other.eligible;
        other
            .heap
            .into_iter()
            .for_each(|candidate| self.push(candidate));
    }

    /// Documents seen that could be held out.
    pub(crate) fn eligible(&self) -> u64 {
        self.eligible
    }

    /// For every (file, row group) with chosen documents, their numbers, ascending.
    pub(crate) fn into_places(self) -> BTreeMap<(usize, usize), Vec<u32>> {
        let mut places: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        for candidate in self.heap {
            for (group, number) in candidate.pieces {
                places
                    .entry((candidate.file, group))
                    .or_default()
                    .push(number);
            }
        }
        places
            .values_mut()
            .for_each(|numbers| numbers.sort_unstable());
        places
    }
}

/// Hashes the documents of one file as its stream goes by.
pub(crate) struct Ballot {
    smallest: Smallest,
    file: usize,
    /// Tokens that do not make a document worth holding out: EOT and BOS.
    hollow: [u32; 2],
    group: usize,
    number: u32,
    open: Option<Open>,
}

/// The document that is going by.
struct Open {
    hasher: blake3::Hasher,
    pieces: Vec<(usize, u32)>,
    hollow: bool,
}

impl Ballot {
    pub(crate) fn new(limit: usize, file: usize, hollow: [u32; 2]) -> Ballot {
        Ballot {
            smallest: Smallest::new(limit),
            file,
            hollow,
            group: 0,
            number: 0,
            open: None,
        }
    }

    /// Row group `group` begins; `continues` tells whether it goes on with the open document.
    pub(crate) fn begin_group(&mut self, group: usize, continues: bool) {
        (self.group, self.number) = (group, 0);
        if let Some(open) = self.open.as_mut().filter(|_| continues) {
            open.pieces.push((group, 0));
        }
    }

    pub(crate) fn feed(&mut self, chunk: Chunk<'_>) {
        let ends = chunk
            .starts
            .iter()
            .map(|start| *start as usize)
            .chain([chunk.tokens.len()]);
        let mut first = 0;
        for (nth, end) in ends.enumerate() {
            if nth > 0 {
                self.close();
                self.number += 1;
                let pieces = vec![(self.group, self.number)];
                self.open = Some(Open {
                    hasher: blake3::Hasher::new(),
                    pieces,
                    hollow: true,
                });
            }
            if let Some(open) = &mut self.open {
                let run = &chunk.tokens[first..end];
                open.hasher.update(bytemuck::cast_slice(run));
                open.hollow = open.hollow && run.iter().all(|token| self.hollow.contains(token));
            }
            first = end;
        }
    }

    /// The file ends.
    pub(crate) fn finish(mut self) -> Smallest {
        self.close();
        self.smallest
    }

    fn close(&mut self) {
        let Some(open) = self.open.take().filter(|open| !open.hollow) else {
            return;
        };
        let mut hash = [0; 16];
        hash.copy_from_slice(&open.hasher.finalize().as_bytes()[..16]);
        self.smallest.eligible += 1;
        self.smallest.push(Candidate {
            hash,
            file: self.file,
            pieces: open.pieces,
        });
    }
}
