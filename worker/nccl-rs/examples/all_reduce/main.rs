//! Adds a vector over several processes, each with its own GPU.
//!
//! Start one process per rank, all with the same file, on machines that share it:
//!
//! ```text
//! all_reduce 0 2 /shared/id &  all_reduce 1 2 /shared/id
//! ```
//!
//! Several ranks on one machine take its GPUs in order. Two ranks may share one GPU when each has its own
//! `NCCL_HOSTID` in the environment.

mod cuda;

use std::error::Error;
use std::path::Path;
use std::time::Duration;
use std::{env, fs, thread};

use cuda::Cuda;
use nccl::{Comm, DataType, DeviceSliceMut, Library, Op, Stream, UniqueId};

const ELEMENTS: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().collect();
    let [_, rank, world, file] = arguments.as_slice() else {
        return Err("usage: all_reduce RANK WORLD FILE".into());
    };
    let (rank, world): (u32, u32) = (rank.parse()?, world.parse()?);
    // A machine with fewer GPUs than ranks lets them share.
    let cuda = Cuda::open(rank as i32).or_else(|_| Cuda::open(0))?;

    let library = Library::load(None)?;
    println!("rank {rank} of {world}: {library:?}");
    let id = shared_id(&library, rank, Path::new(file))?;
    let mut comm = Comm::start(&library, &id, rank, world)?.wait(PATIENCE)?;

    let buffer = cuda.buffer(&vec![rank as f32 + 1.0; ELEMENTS])?;
    // SAFETY: the buffer lives until after `finalize`, and is read only after the stream's work.
    let mut slice = unsafe { DeviceSliceMut::new(buffer.pointer(), ELEMENTS, DataType::F32) };
    comm.all_reduce_in_place(&mut slice, Op::Sum, Stream::DEFAULT)?;
    cuda.synchronize()?;

    let sum = (world * (world + 1) / 2) as f32;
    let values = buffer.values()?;
    println!("rank {rank}: first value {}, expected {sum}", values[0]);
    comm.finalize()?;
    match values.iter().all(|value| *value == sum) {
        true => Ok(()),
        false => Err("the sum is wrong".into()),
    }
}

/// The id of the communicator: rank 0 writes it to `file`, the others wait for it.
fn shared_id(library: &Library, rank: u32, file: &Path) -> Result<UniqueId, Box<dyn Error>> {
    if rank == 0 {
        let id = library.unique_id()?;
        // Put in place at once, so that nobody reads half of it.
        let unfinished = file.with_extension("new");
        fs::write(&unfinished, id.to_bytes())?;
        fs::rename(&unfinished, file)?;
        return Ok(id);
    }
    loop {
        if let Ok(bytes) = fs::read(file)
            && let Ok(bytes) = <[u8; 128]>::try_from(bytes)
        {
            return Ok(bytes.into());
        }
        thread::sleep(Duration::from_millis(10));
    }
}
