//! Writing a checkpoint: each rank its own part, everything synced. The manifest comes last, and not from here.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use supra_checkpoint::{
    Manifest, PUBLISHED, Store, StoredError, manifest::StoredFile, store::join,
};
use tch::{Device, Kind};
use tempfile::TempDir;

use super::{
    CheckpointError,
    shard::{self, ShardFile},
    side_by_side,
};
use crate::{
    model::{ModelConfig, files::save::copy_companions},
    optim::{Layout, Numbers, Part, Run},
};

/// Room beside the tensors: headers, manifest, tokenizer.
const OVERHEAD_BYTES: u64 = 32 << 20;

/// Elements that are hashed and written at once from host memory: 256 KiB of fp32, which stay in a processor's cache together
/// with what they are put together from.
const PIECE: i64 = 1 << 16;
/// The same from a device, to which every piece is a way.
const DEVICE_PIECE: i64 = 1 << 22;

/// What rank 0 writes beside its part.
#[derive(Clone, Debug)]
pub struct Companions {
    /// The model's configuration.
    pub config: ModelConfig,
    /// Directory whose tokenizer files belong to the model, if there is one.
    pub base: Option<PathBuf>,
}

/// Makes room for the tensors of a checkpoint, `bytes` of them, in `dir`. What another run's crash left there is removed; a
/// published checkpoint never is.
pub fn begin(store: &Store, dir: &str, bytes: u64) -> Result<(), StoredError> {
    store.ensure_room(bytes + OVERHEAD_BYTES)?;
    if store.exists(&join(dir, PUBLISHED))? {
        return Err(StoredError::Foreign {
            path: store.at(dir),
            problem: "it is published already and is never overwritten".to_owned(),
        });
    }
    store.remove_dir(dir)
}

/// Writes and syncs the files of one rank, some of them at the same time, until `stop` says that nobody wants them any more.
/// Returns what is in them, in their order, or nothing after a stop. When writing fails or is stopped, none of them stays.
pub fn shard(
    store: &Store,
    dir: &str,
    files: &[ShardFile],
    numbers: &Numbers,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Option<Vec<StoredFile>>, StoredError> {
    let written: Mutex<BTreeMap<usize, StoredFile>> = Mutex::default();
    let share = || numbers.share();
    let done = side_by_side::each(files, usize::MAX, share, |numbers, index, file| {
        if let Some(stored) = write(store, &join(dir, &file.name), file, numbers, stop)? {
            let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
            written.insert(index, stored);
        }
        Ok(())
    });
    let written = written.into_inner().unwrap_or_else(PoisonError::into_inner);
    if done.is_ok() && written.len() == files.len() {
        store.sync_dir(dir)?;
        store.sync_dir("")?;
        return Ok(Some(written.into_values().collect()));
    }
    // Half a checkpoint is of no use and takes room.
    for file in files {
        let _ = store.remove(&join(dir, &file.name));
    }
    done.map(|()| None)
}

/// Writes and syncs one file. None after a stop.
fn write(
    store: &Store,
    name: &str,
    file: &ShardFile,
    numbers: &Numbers,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Option<StoredFile>, StoredError> {
    if stop() {
        return Ok(None);
    }
    let path = store.at(name);
    let failed = |source: io::Error| StoredError::writing(&path, source);
    let mut out = store.create(name)?;
    out.write_all(&file.head().map_err(failed)?)
        .map_err(failed)?;
    let mut bytes = Vec::new();
    let most = match numbers.device() {
        Device::Cpu => PIECE,
        _ => DEVICE_PIECE,
    };
    for piece in &file.pieces {
        for first in (0..piece.run.length).step_by(most as usize) {
            if stop() {
                return Ok(None);
            }
            let run = Run {
                all: piece.run.all + first,
                own: piece.run.own + first,
                length: most.min(piece.run.length - first),
            };
            numbers.read(piece.section, run, &mut bytes);
            out.write_all(&bytes).map_err(failed)?;
        }
    }
    out.finish().map(Some).map_err(failed)
}

/// Writes what makes the directory a model's: configuration and tokenizer. Returns what is in these files.
pub fn companions(
    store: &Store,
    dir: &str,
    companions: &Companions,
) -> Result<BTreeMap<String, StoredFile>, CheckpointError> {
    let Companions { config, base } = companions;
    let temporary = std::env::temp_dir();
    let folder = TempDir::new().map_err(|source| CheckpointError::writing(&temporary, source))?;
    let folder = folder.path();
    config
        .save(folder)
        .and_then(|()| {
            let base = base.as_deref();
            base.map_or(Ok(()), |base| copy_companions(base, folder))
        })
        .map_err(CheckpointError::companions)?;
    let failed = |source| CheckpointError::writing(folder, source);
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let bytes = fs::read(entry.path()).map_err(failed)?;
        let mut file = store.create(&join(dir, &name))?;
        let path = file.at().to_owned();
        let stored = file.write_all(&bytes).and_then(|()| file.finish());
        files.insert(
            name,
            stored.map_err(|source| CheckpointError::writing(&path, source))?,
        );
    }
    Ok(files)
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
