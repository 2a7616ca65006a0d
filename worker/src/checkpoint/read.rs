//! Reading a checkpoint: every byte is proved before anything is used.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    path::Path,
};

use safetensors::{Dtype, SafeTensors};
use tch::{Kind, Tensor};

use super::{
    CheckpointError, EXP_AVG, EXP_AVG_SQ, MANIFEST, Manifest,
    manifest::{Slice, StoredFile},
};
use crate::optim::{Replica, Section};

/// Reads the manifest of a published checkpoint; with `hash`, only the one that has this BLAKE3.
pub fn manifest(dir: &Path, hash: Option<&[u8; 32]>) -> Result<Manifest, CheckpointError> {
    let path = dir.join(MANIFEST);
    let bytes = fs::read(&path).map_err(|source| CheckpointError::reading(&path, source))?;
    let found = blake3::hash(&bytes);
    if hash.is_some_and(|hash| found.as_bytes() != hash) {
        let problem = format!(
            "its BLAKE3 is {}, which is not the one that the coordinator has journalled",
            found.to_hex()
        );
        return Err(CheckpointError::Damaged { path, problem });
    }
    Manifest::parse(&bytes, &path)
}

/// BLAKE3 of the manifest of a published checkpoint, for whoever has it from nobody else.
pub fn manifest_hash(dir: &Path) -> Result<[u8; 32], CheckpointError> {
    let path = dir.join(MANIFEST);
    let bytes = fs::read(&path).map_err(|source| CheckpointError::reading(&path, source))?;
    Ok(*blake3::hash(&bytes).as_bytes())
}

/// Reads masters, moments and update counter into a replica, one file at a time. Every file is hashed before its content
/// is looked at, and it is an error unless all of them are right and together cover every parameter exactly once. After an
/// error the replica is of no use.
pub fn replica(
    dir: &Path,
    manifest: &Manifest,
    replica: &mut Replica,
) -> Result<(), CheckpointError> {
    let mut pieces = Pieces::new(dir, manifest, replica)?;
    for (name, stored) in &manifest.files {
        let path = dir.join(name);
        if !pieces.by_file.contains_key(name.as_str()) {
            verify(&path, stored)?;
            continue;
        }
        let bytes = fs::read(&path).map_err(|source| CheckpointError::reading(&path, source))?;
        check_size(&path, stored, bytes.len() as u64)?;
        check_hash(&path, stored, blake3::hash(&bytes))?;
        pieces.load(name, &path, &bytes, replica)?;
    }
    replica.updates = manifest.updates;
    pieces.finish(dir)
}

/// Proves every file of a checkpoint but the optimizer's, which a model does not need.
pub fn verify_model(dir: &Path, manifest: &Manifest) -> Result<(), CheckpointError> {
    let is_moment = |key: &str| key.starts_with(EXP_AVG) || key.starts_with(EXP_AVG_SQ);
    let moments = manifest.tensors.iter().filter(|(key, _)| is_moment(key));
    let skipped: BTreeSet<&str> = moments
        .flat_map(|(_, tensor)| &tensor.slices)
        .map(|slice| slice.file.as_str())
        .collect();
    let mut files = manifest
        .files
        .iter()
        .filter(|(name, _)| !skipped.contains(name.as_str()));
    files.try_for_each(|(name, stored)| verify(&dir.join(name), stored))
}

/// Streams a file through BLAKE3 and compares.
fn verify(path: &Path, stored: &StoredFile) -> Result<(), CheckpointError> {
    let failed = |source| CheckpointError::reading(path, source);
    let mut file = File::open(path).map_err(failed)?;
    check_size(path, stored, file.metadata().map_err(failed)?.len())?;
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut file, &mut hasher).map_err(failed)?;
    check_hash(path, stored, hasher.finalize())
}

fn check_size(path: &Path, stored: &StoredFile, bytes: u64) -> Result<(), CheckpointError> {
    if bytes == stored.bytes {
        return Ok(());
    }
    let problem = format!("it has {bytes} bytes, {} were written", stored.bytes);
    Err(CheckpointError::Damaged {
        path: path.to_owned(),
        problem,
    })
}

fn check_hash(path: &Path, stored: &StoredFile, hash: blake3::Hash) -> Result<(), CheckpointError> {
    if hash.to_hex().as_str() == stored.blake3 {
        return Ok(());
    }
    let problem = format!(
        "its BLAKE3 is {}, it was written as {}",
        hash.to_hex(),
        stored.blake3
    );
    Err(CheckpointError::Damaged {
        path: path.to_owned(),
        problem,
    })
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
    ) -> Result<Pieces<'a>, CheckpointError> {
        let slots = replica.layout().slots();
        let foreign = |problem| CheckpointError::Foreign {
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
    ) -> Result<(), CheckpointError> {
        let damaged = |problem| CheckpointError::Damaged {
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

    fn finish(self, dir: &Path) -> Result<(), CheckpointError> {
        match self.by_file.keys().next() {
            None => Ok(()),
            Some(file) => Err(CheckpointError::Damaged {
                path: dir.join(file),
                problem: "it was not read".to_owned(),
            }),
        }
    }
}
