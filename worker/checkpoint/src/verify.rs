//! Whether a checkpoint is what was written: every byte is proved before anything is used.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::Path,
};

use crate::{EXP_AVG, EXP_AVG_SQ, Manifest, PUBLISHED, StoredError, manifest::StoredFile};

/// Reads the manifest of a published checkpoint; with `hash`, only the one that has this BLAKE3.
pub fn manifest(dir: &Path, hash: Option<&[u8; 32]>) -> Result<Manifest, StoredError> {
    let path = dir.join(PUBLISHED);
    let bytes = fs::read(&path).map_err(|source| StoredError::reading(&path, source))?;
    let found = blake3::hash(&bytes);
    if hash.is_some_and(|hash| found.as_bytes() != hash) {
        let problem = format!(
            "its BLAKE3 is {}, which is not the one that the coordinator has journalled",
            found.to_hex()
        );
        return Err(StoredError::Damaged { path, problem });
    }
    Manifest::parse(&bytes, &path)
}

/// BLAKE3 of the manifest of a published checkpoint, for whoever has it from nobody else.
pub fn manifest_hash(dir: &Path) -> Result<[u8; 32], StoredError> {
    let path = dir.join(PUBLISHED);
    let bytes = fs::read(&path).map_err(|source| StoredError::reading(&path, source))?;
    Ok(*blake3::hash(&bytes).as_bytes())
}

/// Proves every file of a checkpoint but the optimizer's, which a model does not need.
pub fn model(dir: &Path, manifest: &Manifest) -> Result<(), StoredError> {
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
    files.try_for_each(|(name, stored)| file(&dir.join(name), stored))
}

/// Streams a file through BLAKE3 and compares.
pub fn file(path: &Path, stored: &StoredFile) -> Result<(), StoredError> {
    let failed = |source| StoredError::reading(path, source);
    let mut opened = File::open(path).map_err(failed)?;
    size(path, stored, opened.metadata().map_err(failed)?.len())?;
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut opened, &mut hasher).map_err(failed)?;
    hash(path, stored, hasher.finalize())
}

/// Whether a file has the length that was written.
pub fn size(path: &Path, stored: &StoredFile, bytes: u64) -> Result<(), StoredError> {
    if bytes == stored.bytes {
        return Ok(());
    }
    let problem = format!("it has {bytes} bytes, {} were written", stored.bytes);
    Err(StoredError::Damaged {
        path: path.to_owned(),
        problem,
    })
}

/// Whether the hash of a file is that of what was written.
pub fn hash(path: &Path, stored: &StoredFile, hash: blake3::Hash) -> Result<(), StoredError> {
    if hash.to_hex().as_str() == stored.blake3 {
        return Ok(());
    }
    let problem = format!(
        "its BLAKE3 is {}, it was written as {}",
        hash.to_hex(),
        stored.blake3
    );
    Err(StoredError::Damaged {
        path: path.to_owned(),
        problem,
    })
}
