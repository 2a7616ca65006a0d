//! Which files one rank writes, and what is in them: its part of every tensor, in the order of the flat buffers.
//!
//! A pure function of the layout, so rank 0, which writes the manifest, knows what is in the files of all others.

use std::collections::BTreeMap;

use safetensors::{Dtype, tensor::Metadata, tensor::TensorInfo};
use supra_checkpoint::{
    EXP_AVG, EXP_AVG_SQ,
    manifest::{Slice, StoredTensor},
};
use tch::Kind;

use crate::optim::{Layout, Part, Run, Section};

/// Most bytes of tensors in one file; a single larger piece has a file of its own. Small enough that threads that write a file
/// each end at about the same time.
const FILE_BYTES: u64 = 256 << 20;

/// A file of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct ShardFile {
    /// Its name in the checkpoint.
    pub name: String,
    /// What is in it, in order.
    pub pieces: Vec<Piece>,
}

/// The part of a tensor that is in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Name of the tensor, and its key in the file.
    pub key: String,
    /// Where its numbers come from.
    pub section: Section,
    /// Which numbers.
    pub run: Run,
    /// First element of the tensor.
    pub start: i64,
    /// Shape of the whole tensor.
    pub shape: Vec<i64>,
    /// Kind of an element as it is stored.
    pub kind: Kind,
}

impl Piece {
    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.run.length as u64 * self.kind.elt_size_in_bytes() as u64
    }

    fn dtype(&self) -> Dtype {
        match self.kind {
            Kind::BFloat16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    /// The shape in the file: the tensor's own if all of it is there.
    fn stored_shape(&self) -> Vec<usize> {
        let whole: i64 = self.shape.iter().product();
        if whole == self.run.length {
            self.shape.iter().map(|&size| size as usize).collect()
        } else {
            vec![self.run.length as usize]
        }
    }
}

/// The files of the rank that writes `part`: masters first, then moments of this kind.
pub fn files(layout: &Layout, part: Part, moments: Kind) -> Vec<ShardFile> {
    files_of_at_most(FILE_BYTES, layout, part, moments)
}

/// Bytes of the tensors in the files of the rank that writes `part`.
pub fn bytes(layout: &Layout, part: Part, moments: Kind) -> u64 {
    let files = files(layout, part, moments);
    let pieces = files.iter().flat_map(|file| &file.pieces);
    pieces.map(Piece::bytes).sum()
}

fn files_of_at_most(limit: u64, layout: &Layout, part: Part, moments: Kind) -> Vec<ShardFile> {
    let section = |prefix, section, kind| pieces(layout, part, prefix, section, kind);
    let masters = section("", Section::Masters, Kind::Float);
    let mut state = section(EXP_AVG, Section::ExpAvg, moments);
    state.extend(section(EXP_AVG_SQ, Section::ExpAvgSq, moments));
    let (rank, world) = (part.index, part.of);
    let mut files = Vec::new();
    for (stem, pieces) in [("model", masters), ("optimizer", state)] {
        for (number, pieces) in (1..).zip(group(pieces, limit)) {
            files.push(ShardFile {
                name: format!("{stem}-rank-{rank:03}-of-{world:03}-{number:05}.safetensors"),
                pieces,
            });
        }
    }
    files
}

/// What the part has of every parameter that it has something of.
fn pieces(layout: &Layout, part: Part, prefix: &str, section: Section, kind: Kind) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for slot in layout.slots() {
        let (range, own) = layout.overlap(part, slot.offset..slot.offset + slot.elements);
        if !range.is_empty() {
            pieces.push(Piece {
                key: format!("{prefix}{}", slot.name),
                section,
                run: Run {
                    all: range.start,
                    own,
                    length: range.end - range.start,
                },
                start: range.start - slot.offset,
                shape: slot.shape.clone(),
                kind,
            });
        }
    }
    pieces
}

/// Cuts pieces, in order, into groups of at most `limit` bytes; a larger piece is alone.
fn group(pieces: Vec<Piece>, limit: u64) -> Vec<Vec<Piece>> {
    let mut groups: Vec<Vec<Piece>> = Vec::new();
    let mut used = 0;
    for piece in pieces {
        let bytes = piece.bytes();
        match groups.last_mut() {
            Some(group) if used + bytes <= limit => {
                used += bytes;
                group.push(piece);
            }
            _ => {
                used = bytes;
                groups.push(vec![piece]);
            }
        }
    }
    groups
}

impl ShardFile {
    /// What comes before the data: the length of the safetensors header, and the header, padded so that the data is aligned
    /// to 8 bytes.
    pub fn head(&self) -> std::io::Result<Vec<u8>> {
        let mut start = 0;
        let infos = self.pieces.iter().map(|piece| {
            let end = start + piece.bytes() as usize;
            let info = TensorInfo {
                dtype: piece.dtype(),
                shape: piece.stored_shape(),
                data_offsets: (start, end),
            };
            start = end;
            (piece.key.clone(), info)
        });
        let format = [("format".to_owned(), "pt".to_owned())].into();
        let metadata =
            Metadata::new(Some(format), infos.collect()).map_err(std::io::Error::other)?;
        let json = serde_json::to_vec(&metadata)?;
        let length = json.len().next_multiple_of(8);
        let mut head = (length as u64).to_le_bytes().to_vec();
        head.extend(json);
        head.resize(8 + length, b' ');
        Ok(head)
    }
}

/// Every tensor of a checkpoint that `world` ranks write.
pub fn tensors(layout: &Layout, world: u32, moments: Kind) -> BTreeMap<String, StoredTensor> {
    let mut tensors: BTreeMap<String, StoredTensor> = BTreeMap::new();
    // Ranks in order have the parts of a tensor in order.
    for rank in 0..world {
        for file in files(layout, Part::of_rank(rank, world), moments) {
            for piece in file.pieces {
                let (start, dtype) = (piece.start, format!("{:?}", piece.dtype()));
                let slice = Slice {
                    file: file.name.clone(),
                    key: piece.key.clone(),
                    start,
                    end: start + piece.run.length,
                };
                let tensor = tensors.entry(piece.key).or_insert_with(|| StoredTensor {
                    shape: piece.shape,
                    dtype,
                    slices: Vec::new(),
                });
                tensor.slices.push(slice);
            }
        }
    }
    tensors
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::ParamSpec;

    fn layout(sizes: &[i64], world: u32) -> Layout {
        let specs: Vec<ParamSpec> = sizes
            .iter()
            .enumerate()
            .map(|(at, &size)| ParamSpec {
                name: format!("layers.{}.{at}", at / 2),
                shape: vec![size],
                decayed: at % 2 == 0,
                new: false,
            })
            .collect();
        Layout::new(&specs, false, world)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn files_of_all_ranks_hold_every_number_once(
            sizes in prop::collection::vec(1..900i64, 1..9),
            world in 1..9u32,
            limit in 1..5000u64,
        ) {
            let layout = layout(&sizes, world);
            let tensors = tensors(&layout, world, Kind::BFloat16);
            prop_assert_eq!(tensors.len(), 3 * sizes.len());
            for (name, tensor) in &tensors {
                let mut covered = 0;
                for slice in &tensor.slices {
                    prop_assert_eq!(slice.start, covered);
                    covered = slice.end;
                }
                prop_assert_eq!(covered, tensor.shape[0], "{}", name);
                let moment = name.starts_with(EXP_AVG) || name.starts_with(EXP_AVG_SQ);
                prop_assert_eq!(&tensor.dtype, if moment { "BF16" } else { "F32" });
            }
            for rank in 0..world {
                let part = Part::of_rank(rank, world);
                let few = files(&layout, part, Kind::Float);
                let many = files_of_at_most(limit, &layout, part, Kind::Float);
                let all = |files: &[ShardFile]| files.iter().flat_map(|file| file.pieces.clone()).collect::<Vec<_>>();
                prop_assert_eq!(all(&few), all(&many));
                for file in &many {
                    let bytes: u64 = file.pieces.iter().map(Piece::bytes).sum();
                    prop_assert!(bytes <= limit || file.pieces.len() == 1);
                    prop_assert_eq!(file.head().unwrap().len() % 8, 0);
                }
            }
        }
    }
}
