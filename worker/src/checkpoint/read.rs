//! Reading a checkpoint, whatever wrote it and whoever reads: each rank takes the byte ranges that hold its part, some at the
//! same time, and every byte is proved before it is used.

use std::{collections::BTreeMap, ops::Range, path::PathBuf, sync::Arc};

use safetensors::tensor::Metadata;
use supra_checkpoint::{
    EXP_AVG, EXP_AVG_SQ, Manifest, Store, StoredError, header,
    manifest::{Slice, StoredFile},
    store::join,
    tree::GROUP,
    verify,
};
use tch::Kind;

use super::{CheckpointError, side_by_side};
use crate::{
    collective::DeviceCollective,
    optim::{Numbers, Replica, Run, Section, Slot, Staging},
};

/// Reads masters, moments and update counter into a replica; all ranks of `collective` together. It is an error unless the
/// checkpoint covers every parameter exactly once and every byte of this rank's part is right. After an error the replica is of
/// no use.
pub fn replica(
    store: &Store,
    dir: &str,
    manifest: &Manifest,
    replica: &mut Replica,
    collective: &mut dyn DeviceCollective,
) -> Result<(), CheckpointError> {
    part(store, dir, manifest, replica)?;
    replica.updates = manifest.updates;
    // Of the parameters, too, each rank has read its part.
    Ok(replica.gather_parameters(collective)?)
}

/// Reads what this rank keeps, and checks the files that hold no tensors.
pub fn part(
    store: &Store,
    dir: &str,
    manifest: &Manifest,
    replica: &Replica,
) -> Result<(), StoredError> {
    let wanted = wanted(store.at(dir), manifest, replica)?;
    let holds_tensors = |name: &str| {
        let mut slices = manifest.tensors.values().flat_map(|tensor| &tensor.slices);
        slices.any(|slice| slice.file == name)
    };
    for (name, stored) in &manifest.files {
        if !holds_tensors(name) {
            verify::file(store, &join(dir, name), stored)?;
        }
    }
    let mut groups = Vec::new();
    for (name, pieces) in wanted {
        let file = Source::open(store, join(dir, name), &manifest.files[name])?;
        groups.extend(file.groups(pieces)?);
    }
    load(&groups, &replica.numbers(replica.part()))
}

/// What this rank wants of a file.
struct Piece<'a> {
    slice: &'a Slice,
    section: Section,
    kind: Kind,
    /// First of the slice's elements that are wanted.
    skip: i64,
    /// Where they belong.
    run: Run,
}

/// What this rank wants of each file; the checkpoint holds exactly the tensors of the replica.
fn wanted<'a>(
    dir: PathBuf,
    manifest: &'a Manifest,
    replica: &Replica,
) -> Result<BTreeMap<&'a str, Vec<Piece<'a>>>, StoredError> {
    let slots = replica.layout().slots();
    let foreign = |problem| StoredError::Foreign {
        path: dir.clone(),
        problem,
    };
    let mut wanted: BTreeMap<&str, Vec<Piece>> = BTreeMap::new();
    for (section, prefix) in Section::ALL.into_iter().zip(["", EXP_AVG, EXP_AVG_SQ]) {
        for slot in slots {
            let key = format!("{prefix}{}", slot.name);
            for piece in pieces(&key, section, slot, manifest, replica).map_err(foreign)? {
                let file = piece.slice.file.as_str();
                if !manifest.files.contains_key(file) {
                    return Err(foreign(format!(
                        "it keeps tensors in {file}, of which it has no hash"
                    )));
                }
                wanted.entry(file).or_default().push(piece);
            }
        }
    }
    let (found, needed) = (manifest.tensors.len(), Section::ALL.len() * slots.len());
    if found != needed {
        return Err(foreign(format!(
            "it has {found} tensors, the model needs {needed}"
        )));
    }
    Ok(wanted)
}

/// What this rank wants of a tensor, whose slices have to cover it.
fn pieces<'a>(
    key: &str,
    section: Section,
    slot: &Slot,
    manifest: &'a Manifest,
    replica: &Replica,
) -> Result<Vec<Piece<'a>>, String> {
    let Some(tensor) = manifest.tensors.get(key) else {
        return Err(format!("it has no tensor {key}"));
    };
    let kind = match (tensor.dtype.as_str(), section) {
        ("F32", _) => Some(Kind::Float),
        ("BF16", Section::ExpAvg | Section::ExpAvgSq) => Some(Kind::BFloat16),
        _ => None,
    };
    let Some(kind) = kind.filter(|_| tensor.shape == slot.shape) else {
        let (dtype, shape) = (&tensor.dtype, &tensor.shape);
        return Err(format!(
            "{key} is {dtype} {shape:?}, the model needs F32 {:?}",
            slot.shape
        ));
    };
    let (mut covered, mut pieces) = (0, Vec::new());
    for slice in &tensor.slices {
        if slice.start != covered || slice.end < slice.start || slice.end > slot.elements {
            return Err(format!(
                "the slices of {key} leave a gap or overlap at {covered}"
            ));
        }
        covered = slice.end;
        let here = slot.offset + slice.start..slot.offset + slice.end;
        let (range, own) = replica.layout().overlap(replica.part(), here.clone());
        if !range.is_empty() {
            pieces.push(Piece {
                slice,
                section,
                kind,
                skip: range.start - here.start,
                run: Run {
                    all: range.start,
                    own,
                    length: range.end - range.start,
                },
            });
        }
    }
    if covered != slot.elements {
        return Err(format!("{key} has {covered} of {} elements", slot.elements));
    }
    Ok(pieces)
}

/// A file whose header is proved.
struct Source<'a> {
    store: &'a Store,
    name: String,
    /// Path or URL, for messages.
    path: PathBuf,
    stored: &'a StoredFile,
    header: Metadata,
    /// Byte at which the data begins.
    data: u64,
}

/// A group of a file, and what it holds of what is wanted.
struct Group<'a> {
    file: Arc<Source<'a>>,
    index: u64,
    /// Ranges of the file's bytes, with their kind and where they belong.
    parts: Vec<(Range<u64>, Section, Kind, Run)>,
}

impl<'a> Source<'a> {
    fn open(
        store: &'a Store,
        name: String,
        stored: &'a StoredFile,
    ) -> Result<Source<'a>, StoredError> {
        let path = store.at(&name);
        verify::size(&path, stored, store.size(&name)?)?;
        let first = stored.group(0);
        let mut first = vec![0; (first.end - first.start) as usize];
        verify::group(store, &name, stored, 0, &mut first)?;
        let (data, header) =
            header::read(&mut first.as_slice(), stored.bytes).map_err(|error| {
                StoredError::Damaged {
                    path: path.clone(),
                    problem: error.to_string(),
                }
            })?;
        Ok(Source {
            store,
            name,
            path,
            stored,
            header,
            data,
        })
    }

    /// The groups that hold these pieces.
    fn groups(self, pieces: Vec<Piece>) -> Result<Vec<Group<'a>>, StoredError> {
        let size = self.stored.group_bytes();
        let mut groups: BTreeMap<u64, Vec<_>> = BTreeMap::new();
        for piece in pieces {
            let bytes = self.bytes_of(&piece)?;
            let element = piece.kind.elt_size_in_bytes() as u64;
            for index in bytes.start / size..bytes.end.div_ceil(size) {
                let group = self.stored.group(index);
                let range = bytes.start.max(group.start)..bytes.end.min(group.end);
                let first = ((range.start - bytes.start) / element) as i64;
                let run = Run {
                    all: piece.run.all + first,
                    own: piece.run.own + first,
                    length: ((range.end - range.start) / element) as i64,
                };
                let part = (range, piece.section, piece.kind, run);
                groups.entry(index).or_default().push(part);
            }
        }
        let file = Arc::new(self);
        let groups = groups.into_iter().map(|(index, parts)| Group {
            file: file.clone(),
            index,
            parts,
        });
        Ok(groups.collect())
    }

    /// Where a piece lies in the file.
    fn bytes_of(&self, piece: &Piece) -> Result<Range<u64>, StoredError> {
        let Slice {
            key, start, end, ..
        } = piece.slice;
        let element = piece.kind.elt_size_in_bytes() as i64;
        let expected = (end - start) * element;
        let info = self.header.info(key);
        let whole = info.filter(|info| {
            let (first, last) = info.data_offsets;
            (last - first) as i64 == expected
                && self.data + last as u64 <= self.stored.bytes
                && (self.data + first as u64).is_multiple_of(element as u64)
        });
        let Some(info) = whole else {
            return Err(StoredError::Damaged {
                path: self.path.clone(),
                problem: format!("{key} is not {} elements of {:?}", end - start, piece.kind),
            });
        };
        let first = self.data + (info.data_offsets.0 as i64 + piece.skip * element) as u64;
        Ok(first..first + (piece.run.length * element) as u64)
    }
}

/// Reads, proves and takes groups, some at the same time.
fn load(groups: &[Group], numbers: &Numbers) -> Result<(), StoredError> {
    // Files of older formats are groups themselves, and as large as they like.
    let largest = groups.iter().map(Group::bytes).max().unwrap_or_default();
    let at_most = if largest > GROUP { 1 } else { usize::MAX };
    let state = || (numbers.share(), Staging::new(largest, numbers.device()));
    side_by_side::each(groups, at_most, state, |(numbers, staging), _, group| {
        group.load(numbers, staging)
    })
}

impl Group<'_> {
    fn bytes(&self) -> u64 {
        let range = self.file.stored.group(self.index);
        range.end - range.start
    }

    fn load(&self, numbers: &Numbers, staging: &mut Staging) -> Result<(), StoredError> {
        let Source {
            store,
            name,
            stored,
            ..
        } = self.file.as_ref();
        let bytes = staging.bytes_mut(self.bytes());
        verify::group(store, name, stored, self.index, bytes)?;
        let start = stored.group(self.index).start;
        for (range, section, kind, run) in &self.parts {
            numbers.write(
                *section,
                *run,
                &staging.values(range.start - start, run.length, *kind),
            );
        }
        Ok(())
    }
}
