//! What a checkpoint costs: for how long training stands still, and how fast files are written and read beside plain ones.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use supra_agent::collective::Solo;
use supra_checkpoint::{
    Manifest, Store,
    store::{directory_name, join},
};
use tch::{Device, Kind};
use tempfile::TempDir;

use crate::{
    checkpoint::{CheckpointError, read, shard, side_by_side, write},
    device::Place,
    kernels::{KernelError, Kernels},
    model::ModelConfig,
    optim::{HostPart, HostRoom, Kinds, Layout, Numbers, Part, Replica},
};

/// Where plain files are.
const PLAIN: &str = "plain";
/// Bytes of one plain write.
const WRITE: usize = 1 << 20;
/// Bytes of one plain read.
const READ: usize = 16 << 20;
/// How often each of writing and reading is measured.
const ROUNDS: usize = 3;

/// The benchmark.
#[derive(Clone, Debug)]
pub struct CheckpointBench {
    /// Whose state it is.
    pub config: ModelConfig,
    /// What the model computes in.
    pub precision: Kind,
    /// What the moments are kept in.
    pub moments: Kind,
    /// Ranks that write together: the part of one of them is copied, written and read.
    pub ranks: u32,
    /// Where its files are measured, one after the other.
    pub directories: Vec<PathBuf>,
}

/// What came out; medians, seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Parameters of the model.
    pub parameters: i64,
    /// Bytes of its part of the state.
    pub state_bytes: u64,
    /// Getting the host memory for a copy of it, once.
    pub room: f64,
    /// What the training loop waits for when a checkpoint begins.
    pub stall: f64,
    /// The copy to host memory alone.
    pub copy: f64,
    /// Of each directory.
    pub files: Vec<Files>,
}

/// What the files of one rank cost in a directory; medians, seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    /// Where they were.
    pub directory: PathBuf,
    /// Bytes of a rank's files.
    pub bytes: u64,
    /// Writing them: gathered from the copy, hashed, written, synced.
    pub write: f64,
    /// As many bytes by as many threads, from one buffer, synced.
    pub raw_write: f64,
    /// Reading them: proved, and taken by a replica on the device.
    pub read: f64,
    /// As many bytes by as many threads, into one buffer.
    pub raw_read: f64,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointBenchError {
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The plain files.
    #[error("plain files in {directory}: {source}")]
    Plain {
        /// Where they are.
        directory: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl CheckpointBench {
    /// Measures.
    ///
    /// # Errors
    /// The directory cannot be written, or the device does not work.
    pub fn run(
        &self,
        place: &Place,
        kernels: &dyn Kernels,
    ) -> Result<Measured, CheckpointBenchError> {
        let part = Part::of_rank(0, self.ranks);
        let replica = self.replica(place, part);
        let room = HostRoom::of(&replica, part);
        let (mut copy, room_seconds) = timed(place, || room.allocate());
        let (stall, copying) = stalls(place, &replica, &mut copy, part, kernels)?;
        let files = self.directories.iter();
        let files = files.map(|directory| self.files(place, directory, &replica, &copy.numbers()));
        Ok(Measured {
            parameters: replica.layout().numbers(),
            state_bytes: room.bytes(),
            room: room_seconds,
            stall,
            copy: copying,
            files: files.collect::<Result<_, _>>()?,
        })
    }

    fn replica(&self, place: &Place, part: Part) -> Replica {
        let layout = Layout::new(&self.config.params(), false, part.of as u32);
        let kinds = Kinds {
            parameters: self.precision,
            moments: self.moments,
        };
        let replica = Replica::new(layout, part, kinds, place.device);
        // Not zeros: a file system may know how to leave those out.
        for (flat, _) in replica.flats() {
            let ones = flat.shallow_clone().view_dtype(Kind::Int16);
            let _ = ones.shallow_clone().random_to_(1 << 14);
        }
        replica
    }

    /// What the files of one rank cost, beside plain ones.
    fn files(
        &self,
        place: &Place,
        directory: &Path,
        replica: &Replica,
        copy: &Numbers,
    ) -> Result<Files, CheckpointBenchError> {
        let part = replica.part();
        let files = shard::files(replica.layout(), part, self.moments);
        let bytes = shard::bytes(replica.layout(), part, self.moments);
        let sizes: Vec<u64> = files
            .iter()
            .map(|file| file.pieces.iter().map(shard::Piece::bytes).sum())
            .collect();
        let store = open(directory)?;
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..ROUNDS {
            let relative = directory_name(0, 0);
            write::begin(&store, &relative, bytes).map_err(CheckpointError::from)?;
            let write = || write::shard(&store, &relative, &files, copy, &|| false);
            let (stored, seconds) = timed(place, write);
            times[0].push(seconds);
            let stored = stored.map_err(CheckpointError::from)?.unwrap_or_default();
            let mut manifest = self.manifest();
            write::fill(
                &mut manifest,
                replica.layout(),
                self.moments,
                vec![stored],
                BTreeMap::new(),
            );
            // Readers are to see the disk, where there is one.
            let names = files.iter().map(|file| join(&relative, &file.name));
            names.for_each(|name| store.forget(&name));
            let read = || read::part(&store, &relative, &manifest, replica);
            let (done, seconds) = timed(place, read);
            done.map_err(CheckpointError::from)?;
            times[2].push(seconds);
            store.remove_dir(&relative).map_err(CheckpointError::from)?;
            let (raw_write, raw_read) = plain(directory, &store, &sizes)?;
            times[1].push(raw_write);
            times[3].push(raw_read);
        }
        let [write, raw_write, read, raw_read] = times.map(median);
        Ok(Files {
            directory: directory.to_owned(),
            bytes,
            write,
            raw_write,
            read,
            raw_read,
        })
    }

    /// A manifest of nothing: only files and tensors are read.
    fn manifest(&self) -> Manifest {
        Manifest {
            world: self.ranks,
            ..Manifest::default()
        }
    }
}

/// Medians of what a checkpoint costs the training loop, and of the copy alone; seconds.
fn stalls(
    place: &Place,
    replica: &Replica,
    copy: &mut HostPart,
    part: Part,
    kernels: &dyn Kernels,
) -> Result<(f64, f64), CheckpointBenchError> {
    // Where it is hardly matters: nothing but a directory is made.
    let temporary = std::env::temp_dir();
    let folder = TempDir::new().map_err(|source| CheckpointError::writing(&temporary, source))?;
    let store = open(folder.path())?;
    let (mut stalls, mut copies) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS as u64 {
        let (begun, seconds) = timed(place, || -> Result<(), CheckpointBenchError> {
            replica
                .prints(kernels, &mut Solo)
                .map_err(CheckpointError::from)?;
            let relative = directory_name(round, 0);
            write::begin(&store, &relative, 0).map_err(CheckpointError::from)?;
            copy.copy_from(replica, part);
            Ok(())
        });
        begun?;
        stalls.push(seconds);
        copies.push(timed(place, || copy.copy_from(replica, part)).1);
    }
    Ok((median(stalls), median(copies)))
}

fn open(directory: &Path) -> Result<Store, CheckpointError> {
    Ok(Store::open(&directory.to_string_lossy())?)
}

/// Seconds of writing and of reading plain files of these sizes.
fn plain(
    directory: &Path,
    store: &Store,
    sizes: &[u64],
) -> Result<(f64, f64), CheckpointBenchError> {
    let dir = directory.join(PLAIN);
    let failed = |source| CheckpointBenchError::Plain {
        directory: dir.clone(),
        source,
    };
    fs::create_dir_all(&dir).map_err(failed)?;
    let clock = Instant::now();
    side_by_side::each(
        sizes,
        usize::MAX,
        || (),
        |(), index, size| write_plain(&dir.join(index.to_string()), *size),
    )
    .map_err(failed)?;
    let written = clock.elapsed().as_secs_f64();
    for index in 0..sizes.len() {
        store.forget(&join(PLAIN, &index.to_string()));
    }
    let clock = Instant::now();
    side_by_side::each(
        sizes,
        usize::MAX,
        || (),
        |(), index, _| read_plain(&dir.join(index.to_string())),
    )
    .map_err(failed)?;
    let read = clock.elapsed().as_secs_f64();
    fs::remove_dir_all(&dir).map_err(failed)?;
    Ok((written, read))
}

fn write_plain(path: &Path, size: u64) -> io::Result<()> {
    let buffer = vec![0x5a; WRITE];
    let mut file = File::create_new(path)?;
    let mut left = size as usize;
    while left > 0 {
        let now = left.min(WRITE);
        file.write_all(&buffer[..now])?;
        left -= now;
    }
    file.sync_all()
}

fn read_plain(path: &Path) -> io::Result<()> {
    let mut buffer = vec![0; READ];
    let mut file = File::open(path)?;
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

/// What `work` comes to, and the seconds that it takes, on the device too.
fn timed<T>(place: &Place, mut work: impl FnMut() -> T) -> (T, f64) {
    let wait = || {
        if let Device::Cuda(index) = place.device {
            tch::Cuda::synchronize(index as i64);
        }
    };
    wait();
    let clock = Instant::now();
    let result = work();
    wait();
    (result, clock.elapsed().as_secs_f64())
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
