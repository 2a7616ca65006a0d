//! Reading a checkpoint into a replica: every byte is proved before anything is used.

use std::{collections::BTreeMap, fs, path::Path};

use safetensors::{Dtype, SafeTensors};
use supra_checkpoint::{EXP_AVG, EXP_AVG_SQ, Manifest, StoredError, manifest::Slice, verify};
use tch::{Kind, Tensor};

use crate::optim::{Replica, Section};

/// Reads masters, moments and update counter into a replica, one file at a time. Every file is hashed before its content
/// is looked at, and it is an error unless all of them are right and together cover every parameter exactly once. After an
/// error the replica is of no use.
pub fn replica(dir: &Path, manifest: &Manifest, replica: &mut Replica) -> Result<(), StoredError> {
    let mut pieces = Pieces::new(dir, manifest, replica)?;
    for (name, stored) in &manifest.files {
        let path = dir.join(name);
        if !pieces.by_file.contains_key(name.as_str()) {
            verify::file(&path, stored)?;
            continue;
        }
        let bytes = fs::read(&path).map_err(|source| StoredError::reading(&path, source))?;
        verify::size(&path, stored, bytes.len() as u64)?;
        verify::hash(&path, stored, blake3::hash(&bytes))?;
        pieces.load(name, &path, &bytes, replica)?;
    }
    replica.updates = manifest.updates;
    pieces.finish(dir)
}

/// A slice on its way into a replica.
struct Piece<'a> {
    slice: &'a Slice,
    section: Section,
    /// Where the slice begins in a flat buffer.
    offset: i64,
}

/// What is still to be read.
struct Pieces<'a> {
    by_file: BTreeMap<&'a str, Vec<Piece<'a>>>,
}

impl<'a> Pieces<'a> {
    /// Plans the copies and checks that the checkpoint holds exactly the tensors of the replica.
    fn new(
        dir: &Path,
        manifest: &'a Manifest,
        replica: &Replica,
    ) -> Result<Pieces<'a>, StoredError> {
        let slots = replica.layout().slots();
        let foreign = |problem| StoredError::Foreign {
            path: dir.to_owned(),
            problem,
        };
        let mut pieces: BTreeMap<&str, Vec<Piece>> = BTreeMap::new();
        for (section, prefix) in Section::ALL.into_iter().zip(["", EXP_AVG, EXP_AVG_SQ]) {
            for slot in slots {
                let key = format!("{prefix}{}", slot.name);
                let Some(tensor) = manifest.tensors.get(&key) else {
                    return Err(foreign(format!("it has no tensor {key}")));
                };
                if tensor.shape != slot.shape || tensor.dtype != "F32" {
                    let (dtype, shape) = (&tensor.dtype, &tensor.shape);
                    return Err(foreign(format!(
                        "{key} is {dtype} {shape:?}, the model needs F32 {:?}",
                        slot.shape
                    )));
                }
                let mut covered = 0;
                for slice in &tensor.slices {
                    if slice.start != covered || slice.end < slice.start {
                        return Err(foreign(format!(
                            "the slices of {key} leave a gap or overlap at {covered}"
                        )));
                    }
                    covered = slice.end;
                    let piece = Piece {
                        slice,
                        section,
                        offset: slot.offset + slice.start,
                    };
                    pieces.entry(&slice.file).or_default().push(piece);
                }
                if covered != slot.elements {
                    return Err(foreign(format!(
                        "{key} has {covered} of {} elements",
                        slot.elements
                    )));
                }
            }
        }
        let wanted = 3 * slots.len();
        if manifest.tensors.len() != wanted {
            return Err(foreign(format!(
                "it has {} tensors, the model needs {wanted}",
                manifest.tensors.len()
            )));
        }
        if let Some(file) = pieces
            .keys()
            .find(|file| !manifest.files.contains_key(**file))
        {
            return Err(foreign(format!(
                "it keeps tensors in {file}, of which it has no hash"
            )));
        }
        Ok(Pieces { by_file: pieces })
    }

    /// Hands the slices of one file, whose bytes are proved, to the replica.
    fn load(
        &mut self,
        name: &str,
        path: &Path,
        bytes: &[u8],
        replica: &mut Replica,
    ) -> Result<(), StoredError> {
        let damaged = |problem| StoredError::Damaged {
            path: path.to_owned(),
            problem,
        };
        let file = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
        for piece in self.by_file.remove(name).unwrap_or_default() {
            let Slice {
                key, start, end, ..
            } = piece.slice;
            let view = file
                .tensor(key)
                .map_err(|error| damaged(format!("{key}: {error}")))?;
            let elements = end - start;
            if view.dtype() != Dtype::F32 || view.data().len() as i64 != 4 * elements {
                return Err(damaged(format!("{key} is not {elements} elements of F32")));
            }
            let data = Tensor::from_data_size(view.data(), &[elements], Kind::Float);
            replica.load(piece.section, piece.offset, &data);
        }
        Ok(())
    }

    fn finish(self, dir: &Path) -> Result<(), StoredError> {
        match self.by_file.keys().next() {
            None => Ok(()),
            Some(file) => Err(StoredError::Damaged {
                path: dir.join(file),
                problem: "it was not read".to_owned(),
            }),
        }
    }
}
