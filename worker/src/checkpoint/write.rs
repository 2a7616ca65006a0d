//! Writing a checkpoint: each rank its own part, everything synced. The manifest comes last, and not from here.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
    sync::{Mutex, PoisonError},
    thread,
};

use supra_checkpoint::{
    Manifest, PUBLISHED, StoredError, manifest::StoredFile, store, tree::TreeHasher,
};
use tch::Kind;

use super::{
    CheckpointError,
    shard::{self, ShardFile},
};
use crate::{
    model::{ModelConfig, files::save::copy_companions},
    optim::{Layout, Numbers, Part, Run},
};

/// Room beside the tensors: headers, manifest, tokenizer.
const OVERHEAD_BYTES: u64 = 32 << 20;

/// Elements that are hashed and written at once: 1 MiB of fp32, so that they stay in a processor's cache.
const PIECE: i64 = 1 << 18;

/// Files that a rank writes at the same time, at most.
const THREADS: usize = 8;

/// What rank 0 writes beside its part.
pub struct Companions<'a> {
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// Directory whose tokenizer files belong to the model, if there is one.
    pub base: Option<&'a Path>,
}

/// Makes the directory of a checkpoint, for whose tensors there is room. What another run's crash left under this name is
/// replaced; a published checkpoint never is.
pub fn begin(root: &Path, relative: &str, bytes: u64) -> Result<(), StoredError> {
    let dir = root.join(relative);
    let failed = |source| StoredError::writing(&dir, source);
    store::ensure_room(root, bytes + OVERHEAD_BYTES)?;
    if dir.join(PUBLISHED).exists() {
        let problem = "it is published already and is never overwritten".to_owned();
        return Err(StoredError::Foreign { path: dir, problem });
    }
    if dir.is_dir() {
        fs::remove_dir_all(&dir).map_err(failed)?;
    }
    fs::create_dir_all(&dir).map_err(failed)?;
    store::sync_directory(root)
}

/// Writes and syncs the files of one rank, some of them at the same time, until `stop` says that nobody wants them any more.
/// Returns what is in them, in their order, or nothing after a stop. When writing fails or is stopped, none of them stays.
pub fn shard(
    dir: &Path,
    files: &[ShardFile],
    numbers: &Numbers,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Option<Vec<StoredFile>>, StoredError> {
    let written: Mutex<BTreeMap<usize, StoredFile>> = Mutex::default();
    let failed: Mutex<Option<StoredError>> = Mutex::default();
    let ahead = Mutex::new(files.iter().enumerate());
    let next = || {
        let mut ahead = ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let over = stop()
            || failed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .is_some();
        if over { None } else { ahead.next() }
    };
    let work = |numbers: Numbers| {
        while let Some((index, file)) = next() {
            match write(dir, file, &numbers, stop) {
                Ok(Some(stored)) => {
                    let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
                    written.insert(index, stored);
                }
                Ok(None) => return,
                Err(error) => {
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    failed.get_or_insert(error);
                    return;
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads(files.len()) {
            let numbers = numbers.share();
            scope.spawn(|| work(numbers));
        }
        work(numbers.share());
    });
    let written = written.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failed.is_none() && written.len() == files.len() {
        store::sync_directory(dir)?;
        return Ok(Some(written.into_values().collect()));
    }
    // Half a checkpoint is of no use and takes room.
    for file in files {
        let _ = fs::remove_file(dir.join(&file.name));
    }
    failed.map_or(Ok(None), Err)
}

/// Threads that work on so many files.
pub fn threads(files: usize) -> usize {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    files.min(threads).min(THREADS)
}

/// Writes and syncs one file. None after a stop.
fn write(
    dir: &Path,
    file: &ShardFile,
    numbers: &Numbers,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Option<StoredFile>, StoredError> {
    let path = dir.join(&file.name);
    let failed = |source: io::Error| StoredError::writing(&path, source);
    let mut out = File::create_new(&path).map_err(failed)?;
    let mut hasher = TreeHasher::default();
    let mut put = |bytes: &[u8]| {
        hasher.update(bytes);
        out.write_all(bytes).map_err(failed)
    };
    put(&file.head().map_err(failed)?)?;
    let mut bytes = Vec::new();
    for piece in &file.pieces {
        for first in (0..piece.run.length).step_by(PIECE as usize) {
            if stop() {
                return Ok(None);
            }
            let run = Run {
                all: piece.run.all + first,
                own: piece.run.own + first,
                length: PIECE.min(piece.run.length - first),
            };
            numbers.read(piece.section, run, &mut bytes);
            put(&bytes)?;
        }
    }
    out.sync_all().map_err(failed)?;
    Ok(Some(hasher.finish()))
}

/// Writes and syncs what makes the directory a model's: configuration and tokenizer. Returns what is in these files.
pub fn companions(
    dir: &Path,
    companions: &Companions,
) -> Result<BTreeMap<String, StoredFile>, CheckpointError> {
    let Companions { config, base } = companions;
    config
        .save(dir)
        .and_then(|()| base.map_or(Ok(()), |base| copy_companions(base, dir)))
        .map_err(CheckpointError::companions)?;
    let mut files = BTreeMap::new();
    let entries = fs::read_dir(dir).map_err(|source| StoredError::writing(dir, source))?;
    for entry in entries {
        let path = entry
            .map_err(|source| StoredError::writing(dir, source))?
            .path();
        // Those are the ranks' parts.
        if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            continue;
        }
        let stored = adopt(&path).map_err(|source| StoredError::writing(&path, source))?;
        let name = path.file_name().unwrap_or_default();
        files.insert(name.to_string_lossy().into_owned(), stored);
    }
    store::sync_directory(dir)?;
    Ok(files)
}

/// Syncs a small file that is there, and says what is in it.
fn adopt(path: &Path) -> io::Result<StoredFile> {
    File::open(path)?.sync_all()?;
    let mut hasher = TreeHasher::default();
    hasher.update(&fs::read(path)?);
    Ok(hasher.finish())
}

/// The files and tensors of a checkpoint whose parts, in the order of the ranks, hold what `parts` says.
pub fn fill(
    manifest: &mut Manifest,
    layout: &Layout,
    moments: Kind,
    parts: Vec<Vec<StoredFile>>,
    companions: BTreeMap<String, StoredFile>,
) {
    manifest.files = companions;
    for (rank, stored) in (0..).zip(parts) {
        let files = shard::files(layout, Part::of_rank(rank, manifest.world), moments);
        let names = files.into_iter().map(|file| file.name);
        manifest.files.extend(names.zip(stored));
    }
    manifest.tensors = shard::tensors(layout, manifest.world, moments);
}
