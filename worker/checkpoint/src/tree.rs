//! BLAKE3 of a file in groups: hashes of 16 MiB each, of which the file's own hash follows, as BLAKE3 is a tree.
//!
//! So a reader that wants a part of a file proves the groups that hold it and reads no others, and threads can hash one file.
//! [Source: the BLAKE3 paper, section 2.1, "Tree structure"]

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use std::ops::Range;

use crate::manifest::StoredFile;

/// Bytes of a group; the last one of a file may be shorter. A power of two, so that groups are subtrees.
pub const GROUP: u64 = 16 << 20;

/// Hashes a file that is written from its beginning to its end.
#[derive(Debug, Default)]
pub struct TreeHasher {
    /// Of the group in hand.
    hasher: blake3::Hasher,
    groups: Vec<ChainingValue>,
    bytes: u64,
}

impl TreeHasher {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            // A full group ends when there is more: a file of one group has no subtrees.
            if self.hasher.count() == GROUP {
                self.groups.push(self.hasher.finalize_non_root());
                self.hasher = blake3::Hasher::new();
                self.hasher.set_input_offset(self.bytes);
            }
            let room = (GROUP - self.hasher.count()) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.hasher.update(now);
            self.bytes += now.len() as u64;
            bytes = later;
        }
    }

    /// How many it took.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was written.
    pub fn finish(mut self) -> StoredFile {
        let blake3 = if self.groups.is_empty() {
            self.hasher.finalize()
        } else {
            self.groups.push(self.hasher.finalize_non_root());
            root(&self.groups, self.bytes)
        };
        StoredFile {
            bytes: self.bytes,
            blake3: blake3.to_hex().to_string(),
            groups: self.groups.iter().map(hex).collect(),
        }
    }
}

impl StoredFile {
    /// Whether the groups, if there are any, are those of the file's hash.
    pub fn is_consistent(&self) -> bool {
        if self.groups.is_empty() {
            return true;
        }
        let groups: Option<Vec<ChainingValue>> = self.groups.iter().map(|hex| unhex(hex)).collect();
        groups.is_some_and(|groups| {
            self.bytes.div_ceil(GROUP) == groups.len() as u64
                && groups.len() > 1
                && root(&groups, self.bytes).to_hex().as_str() == self.blake3
        })
    }

    /// Bytes that are proved together: a group, or all of a file that has none.
    pub fn group_bytes(&self) -> u64 {
        match self.groups.len() {
            0 => self.bytes.max(1),
            _ => GROUP,
        }
    }

    /// The bytes of a group.
    pub fn group(&self, index: u64) -> Range<u64> {
        let size = self.group_bytes();
        (index * size).min(self.bytes)..((index + 1) * size).min(self.bytes)
    }

    /// Begins to prove a group; its bytes come in order.
    pub fn proof(&self, index: u64) -> GroupProof<'_> {
        let mut hasher = blake3::Hasher::new();
        if (index as usize) < self.groups.len() {
            hasher.set_input_offset(self.group(index).start);
        }
        GroupProof {
            file: self,
            index,
            hasher,
        }
    }
}

/// Bytes of a group on their way to whoever wants them.
pub struct GroupProof<'a> {
    file: &'a StoredFile,
    index: u64,
    hasher: blake3::Hasher,
}

impl GroupProof<'_> {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// Whether these were the bytes that were written as this group.
    pub fn holds(&self) -> bool {
        let GroupProof {
            file,
            index,
            hasher,
        } = self;
        let range = file.group(*index);
        if hasher.count() != range.end - range.start {
            return false;
        }
        match file.groups.get(*index as usize) {
            Some(written) => hex(&hasher.finalize_non_root()) == *written,
            None => {
                file.groups.is_empty()
                    && *index == 0
                    && hasher.finalize().to_hex().as_str() == file.blake3
            }
        }
    }
}

/// The hash of a file of more than one group.
fn root(groups: &[ChainingValue], bytes: u64) -> blake3::Hash {
    let (left, right) = halves(groups, bytes);
    merge_subtrees_root(&left, &right, Mode::Hash)
}

fn subtree(groups: &[ChainingValue], bytes: u64) -> ChainingValue {
    match groups {
        [group] => *group,
        _ => {
            let (left, right) = halves(groups, bytes);
            merge_subtrees_non_root(&left, &right, Mode::Hash)
        }
    }
}

fn halves(groups: &[ChainingValue], bytes: u64) -> (ChainingValue, ChainingValue) {
    let left = left_subtree_len(bytes);
    let (before, behind) = groups.split_at((left / GROUP) as usize);
    (subtree(before, left), subtree(behind, bytes - left))
}

fn hex(group: &ChainingValue) -> String {
    blake3::Hash::from_bytes(*group).to_hex().to_string()
}

fn unhex(group: &str) -> Option<ChainingValue> {
    Some(*blake3::Hash::from_hex(group).ok()?.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 9] = [
        0,
        1,
        GROUP - 1,
        GROUP,
        GROUP + 1,
        2 * GROUP,
        2 * GROUP + 5,
        3 * GROUP,
        5 * GROUP + 1023,
    ];

    fn content(bytes: u64) -> Vec<u8> {
        (0..bytes)
            .map(|at| (at * 31 + (at >> 11) + (at >> 24)) as u8)
            .collect()
    }

    fn stored(content: &[u8]) -> StoredFile {
        let mut hasher = TreeHasher::default();
        // In pieces that have nothing to do with groups.
        content
            .chunks(5_000_011)
            .for_each(|piece| hasher.update(piece));
        hasher.finish()
    }

    fn proves(stored: &StoredFile, index: u64, bytes: &[u8]) -> bool {
        let mut proof = stored.proof(index);
        bytes
            .chunks(3_000_017)
            .for_each(|piece| proof.update(piece));
        proof.holds()
    }

    #[test]
    fn the_hash_is_that_of_the_whole_file_and_each_group_proves_itself() {
        let all = content(*SIZES.iter().max().unwrap());
        for bytes in SIZES {
            let content = &all[..bytes as usize];
            let stored = stored(content);
            assert_eq!(
                stored.blake3,
                blake3::hash(content).to_hex().as_str(),
                "{bytes}"
            );
            assert_eq!(stored.bytes, bytes);
            assert!(stored.is_consistent(), "{bytes}");
            let groups = bytes.div_ceil(stored.group_bytes());
            for index in 0..groups {
                let range = stored.group(index);
                let group = &content[range.start as usize..range.end as usize];
                assert!(proves(&stored, index, group), "group {index} of {bytes}");
                assert!(!proves(&stored, index + 1, group), "at another place");
                let mut other = group.to_vec();
                other[group.len() / 2] ^= 4;
                assert!(!proves(&stored, index, &other), "a flipped bit");
                assert!(!proves(&stored, index, &group[1..]), "too short");
            }
        }
    }

    #[test]
    fn groups_of_another_file_are_found_out() {
        let good = stored(&content(2 * GROUP + 5));
        let mut swapped = good.clone();
        swapped.groups.swap(0, 1);
        let mut short = good.clone();
        short.groups.pop();
        let mut longer = good.clone();
        longer.bytes += GROUP;
        let mut garbage = good.clone();
        garbage.groups[1] = "no hash".to_owned();
        for bad in [swapped, short, longer, garbage] {
            assert!(!bad.is_consistent());
        }
    }
}
