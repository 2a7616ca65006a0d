//! Whether a checkpoint is what was written: every byte is proved before anything is used.

use std::{collections::BTreeSet, path::Path};

use crate::{
    EXP_AVG, EXP_AVG_SQ, LEDGER, Manifest, PUBLISHED, Store, StoredError, manifest::StoredFile,
    store::join,
};

/// Bytes of a file that are in memory at once: some pieces of an object store.
const PIECE: u64 = 64 << 20;

/// Reads the manifest of the published checkpoint in `dir`; with `hash`, only the one that has this BLAKE3.
pub fn manifest(
    store: &Store,
    dir: &str,
    hash: Option<&[u8; 32]>,
) -> Result<Manifest, StoredError> {
    let name = join(dir, PUBLISHED);
    let bytes = store.read_all(&name)?;
    let path = store.at(&name);
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
pub fn manifest_hash(store: &Store, dir: &str) -> Result<[u8; 32], StoredError> {
    let bytes = store.read_all(&join(dir, PUBLISHED))?;
    Ok(*blake3::hash(&bytes).as_bytes())
}

/// Proves every file of a checkpoint but the optimizer's and the ledger, which a model does not need.
pub fn model(store: &Store, dir: &str, manifest: &Manifest) -> Result<(), StoredError> {
    let mut files = model_files(manifest);
    files.try_for_each(|(name, stored)| file(store, &join(dir, name), stored))
}

/// The files of a checkpoint that hold neither moments nor the ledger.
pub(crate) fn model_files(manifest: &Manifest) -> impl Iterator<Item = (&String, &StoredFile)> {
    let is_moment = |key: &str| key.starts_with(EXP_AVG) || key.starts_with(EXP_AVG_SQ);
    let moments = manifest.tensors.iter().filter(|(key, _)| is_moment(key));
    let skipped: BTreeSet<&str> = moments
        .flat_map(|(_, tensor)| &tensor.slices)
        .map(|slice| slice.file.as_str())
        .chain([LEDGER])
        .collect();
    let files = manifest.files.iter();
    files.filter(move |(name, _)| !skipped.contains(name.as_str()))
}

/// Streams a file through BLAKE3 and compares.
pub fn file(store: &Store, name: &str, stored: &StoredFile) -> Result<(), StoredError> {
    stream(store, name, stored, |_| Ok(()))
}

/// Puts a group of a file into `bytes`, which is as long; proved when this returns.
pub fn group(
    store: &Store,
    name: &str,
    stored: &StoredFile,
    index: u64,
    bytes: &mut [u8],
) -> Result<(), StoredError> {
    let range = stored.group(index);
    let mut proof = stored.proof(index);
    store.read_along(name, range.start, bytes, &mut |piece| proof.update(piece))?;
    if proof.holds() {
        return Ok(());
    }
    Err(StoredError::Damaged {
        path: store.at(name),
        problem: format!(
            "its bytes {} to {} are not what was written",
            range.start, range.end
        ),
    })
}

/// The same as [`file`], and hands the bytes on, which are proved when it returns and not before.
pub(crate) fn stream(
    store: &Store,
    name: &str,
    stored: &StoredFile,
    mut take: impl FnMut(&[u8]) -> Result<(), StoredError>,
) -> Result<(), StoredError> {
    let (path, bytes) = (store.at(name), store.size(name)?);
    size(&path, stored, bytes)?;
    let mut piece = vec![0; bytes.min(PIECE) as usize];
    let mut hasher = blake3::Hasher::new();
    while hasher.count() < bytes {
        let rest = (bytes - hasher.count()).min(PIECE) as usize;
        store.read_into(name, hasher.count(), &mut piece[..rest])?;
        hasher.update(&piece[..rest]);
        take(&piece[..rest])?;
    }
    hash(&path, stored, hasher.finalize())
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
