//! Communicators on a GPU.

use std::thread;
use std::time::{Duration, Instant};

use bytemuck::Pod;
use half::{bf16, f16};
use nccl::{Comm, DataType, DeviceSlice, DeviceSliceMut, Error, Library, Op, Stream};

use crate::cuda::{Buffer, Cuda};
use crate::ranks::{Rank, Ranks};

const LIMIT: Duration = Duration::from_secs(60);

/// NCCL and a GPU, or none with a word about it.
fn machine() -> Option<(Library, Cuda)> {
    let library = crate::library()?;
    match Cuda::open(0) {
        Ok(cuda) => Some((library, cuda)),
        Err(error) => {
            println!("skipped: no GPU ({error})");
            None
        }
    }
}

fn read<T: Pod>(buffer: &Buffer<'_, T>, elements: usize, data_type: DataType) -> DeviceSlice {
    // SAFETY: the tests keep their buffers until the GPU is done, and use one stream.
    unsafe { DeviceSlice::new(buffer.pointer(), elements, data_type) }
}

fn write<T: Pod>(buffer: &Buffer<'_, T>, elements: usize, data_type: DataType) -> DeviceSliceMut {
    // SAFETY: as in `read`.
    unsafe { DeviceSliceMut::new(buffer.pointer(), elements, data_type) }
}

/// The sum over all ranks of `of(1), of(2), of(3)` on each.
fn sum<T: Pod>(cuda: &Cuda, comm: &mut Comm, data_type: DataType, of: fn(u8) -> T) -> Vec<T> {
    let buffer = cuda.buffer(&[of(1), of(2), of(3)]).unwrap();
    comm.all_reduce_in_place(&mut write(&buffer, 3, data_type), Op::Sum, Stream::DEFAULT)
        .unwrap();
    buffer.values().unwrap()
}

#[test]
fn two_ranks_exchange_what_they_should() {
    let Some((library, cuda)) = machine() else {
        return;
    };
    let Some(here) = Rank::here() else {
        Ranks::start("gpu::two_ranks_exchange_what_they_should", 2).join();
        return;
    };
    let mut comm = here.begin(&library).wait(LIMIT).unwrap();
    assert_eq!((comm.rank(), comm.world()), (here.rank, 2));
    reductions(&cuda, &mut comm);
    types(&cuda, &mut comm);
    movements(&cuda, &mut comm);
    misfits(&cuda, &mut comm);
    comm.async_error().unwrap();
    comm.finalize().unwrap();
}

fn reductions(cuda: &Cuda, comm: &mut Comm) {
    let mine = 2.0 + comm.rank() as f32;
    for (op, expected) in [
        (Op::Sum, 5.0),
        (Op::Product, 6.0),
        (Op::Max, 3.0),
        (Op::Min, 2.0),
        (Op::Average, 2.5),
    ] {
        let (from, to) = (
            cuda.buffer(&[mine; 5]).unwrap(),
            cuda.buffer(&[0f32; 5]).unwrap(),
        );
        let mut receive = write(&to, 5, DataType::F32);
        comm.all_reduce(
            read(&from, 5, DataType::F32),
            &mut receive,
            op,
            Stream::DEFAULT,
        )
        .unwrap();
        assert_eq!(to.values().unwrap(), [expected; 5], "{op:?}");
        assert_eq!(from.values().unwrap(), [mine; 5]);
    }
    let mine = comm.rank() as usize;
    let whole = cuda.buffer(&[1f32, 2.0, 3.0, 4.0]).unwrap();
    comm.reduce_scatter_in_place(
        &mut write(&whole, 4, DataType::F32),
        Op::Sum,
        Stream::DEFAULT,
    )
    .unwrap();
    let part = [[2f32, 4.0], [6.0, 8.0]][mine];
    assert_eq!(whole.values().unwrap()[2 * mine..][..2], part);
    let scattered = cuda.buffer(&[0f32; 2]).unwrap();
    let whole = cuda.buffer(&[1f32, 2.0, 3.0, 4.0]).unwrap();
    let mut receive = write(&scattered, 2, DataType::F32);
    comm.reduce_scatter(
        read(&whole, 4, DataType::F32),
        &mut receive,
        Op::Sum,
        Stream::DEFAULT,
    )
    .unwrap();
    assert_eq!(scattered.values().unwrap(), part);
}

fn types(cuda: &Cuda, comm: &mut Comm) {
    assert_eq!(sum(cuda, comm, DataType::I8, |x| x as i8), [2, 4, 6]);
    assert_eq!(sum(cuda, comm, DataType::U8, |x| x), [2, 4, 6]);
    let wide = |x| -(i32::from(x) << 20);
    assert_eq!(
        sum(cuda, comm, DataType::I32, wide),
        [-2 << 20, -4 << 20, -6 << 20]
    );
    assert_eq!(
        sum(cuda, comm, DataType::U32, |x| u32::MAX / 8 * u32::from(x))[0],
        u32::MAX / 8 * 2
    );
    assert_eq!(
        sum(cuda, comm, DataType::I64, |x| -(i64::from(x) << 40))[0],
        -2 << 40
    );
    assert_eq!(
        sum(cuda, comm, DataType::U64, |x| u64::from(x) << 60)[2],
        6 << 60
    );
    assert_eq!(
        sum(cuda, comm, DataType::F64, |x| f64::from(x) * 1e-300)[0],
        2e-300
    );
    let half = |x| f16::from_f32(f32::from(x) / 4.0);
    assert_eq!(sum(cuda, comm, DataType::F16, half)[2], f16::from_f32(1.5));
    let brain = |x| bf16::from_f32(f32::from(x) * 1e30);
    assert_eq!(
        sum(cuda, comm, DataType::Bf16, brain)[0],
        bf16::from_f32(2e30)
    );
}

fn movements(cuda: &Cuda, comm: &mut Comm) {
    let rank = comm.rank();
    let mine = [rank as f32, 10.0 + rank as f32];
    let (from, to) = (
        cuda.buffer(&mine).unwrap(),
        cuda.buffer(&[-1f32; 4]).unwrap(),
    );
    let mut receive = write(&to, 4, DataType::F32);
    comm.all_gather(read(&from, 2, DataType::F32), &mut receive, Stream::DEFAULT)
        .unwrap();
    assert_eq!(to.values().unwrap(), [0.0, 10.0, 1.0, 11.0]);

    let mut places = [-1f32; 4];
    places[2 * rank as usize..][..2].copy_from_slice(&mine);
    let places = cuda.buffer(&places).unwrap();
    comm.all_gather_in_place(&mut write(&places, 4, DataType::F32), Stream::DEFAULT)
        .unwrap();
    assert_eq!(places.values().unwrap(), [0.0, 10.0, 1.0, 11.0]);

    comm.broadcast(&mut write(&from, 2, DataType::F32), 1, Stream::DEFAULT)
        .unwrap();
    assert_eq!(from.values().unwrap(), [1.0, 11.0]);

    // Both send first: without a group they would wait for each other.
    let (from, to) = (
        cuda.buffer(&mine).unwrap(),
        cuda.buffer(&[-1f32; 2]).unwrap(),
    );
    comm.group(|group| {
        group.send(read(&from, 2, DataType::F32), 1 - rank, Stream::DEFAULT)?;
        group.recv(&mut write(&to, 2, DataType::F32), 1 - rank, Stream::DEFAULT)
    })
    .unwrap();
    let theirs = 1.0 - rank as f32;
    assert_eq!(to.values().unwrap(), [theirs, 10.0 + theirs]);
}

/// What does not fit is refused before NCCL sees it, and the communicator goes on.
fn misfits(cuda: &Cuda, comm: &mut Comm) {
    let buffer = cuda.buffer(&[0f32; 5]).unwrap();
    let mut five = write(&buffer, 5, DataType::F32);
    let odd = comm.all_gather_in_place(&mut five, Stream::DEFAULT);
    assert!(matches!(odd, Err(Error::Mismatch { .. })), "{odd:?}");
    let four = read(&buffer, 4, DataType::F32);
    let short = comm.all_reduce(four, &mut five, Op::Sum, Stream::DEFAULT);
    assert!(matches!(short, Err(Error::Mismatch { .. })), "{short:?}");
    let nobody = comm.broadcast(&mut five, 2, Stream::DEFAULT);
    assert!(
        matches!(nobody, Err(Error::NoSuchRank { .. })),
        "{nobody:?}"
    );
    assert_eq!(sum(cuda, comm, DataType::F32, f32::from), [2.0, 4.0, 6.0]);
}

#[test]
fn a_rank_that_does_not_come_is_a_timeout() {
    let Some((library, _cuda)) = machine() else {
        return;
    };
    let id = library.unique_id().unwrap();
    let start = Instant::now();
    let starting = Comm::start(&library, &id, 0, 2).unwrap();
    let error = starting.wait(Duration::from_secs(1)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "dropping it hung"
    );
}

#[test]
fn an_abort_ends_the_wait_for_the_others() {
    let Some((library, _cuda)) = machine() else {
        return;
    };
    let id = library.unique_id().unwrap();
    let starting = Comm::start(&library, &id, 0, 2).unwrap();
    let abort = starting.abort_handle();
    let start = Instant::now();
    let aborting = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        abort.abort();
        abort.abort();
    });
    let error = starting.wait(LIMIT).unwrap_err();
    assert!(matches!(error, Error::Aborted { .. }), "{error}");
    aborting.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn an_abort_frees_the_stream_of_a_killed_peer() {
    let name = "gpu::an_abort_frees_the_stream_of_a_killed_peer";
    let Some((library, cuda)) = machine() else {
        return;
    };
    let Some(here) = Rank::here() else {
        let mut ranks = Ranks::start(name, 2);
        ranks.board.hear("enqueued");
        ranks.kill(1);
        ranks.board.say("killed", b"");
        ranks.join();
        return;
    };
    let mut comm = here.begin(&library).wait(LIMIT).unwrap();
    assert_eq!(
        sum(&cuda, &mut comm, DataType::F32, f32::from),
        [2.0, 4.0, 6.0]
    );
    if here.rank == 1 {
        thread::sleep(LIMIT);
        return;
    }
    let buffer = cuda.buffer(&vec![1f32; 1 << 20]).unwrap();
    let mut slice = write(&buffer, 1 << 20, DataType::F32);
    comm.all_reduce_in_place(&mut slice, Op::Sum, Stream::DEFAULT)
        .unwrap();
    here.board.say("enqueued", b"");
    here.board.hear("killed");
    let abort = comm.abort_handle();
    let start = Instant::now();
    let aborting = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        abort.abort();
    });
    cuda.synchronize().unwrap();
    let freed = start.elapsed();
    assert!(freed > Duration::from_millis(200), "it was not blocked");
    assert!(freed < Duration::from_secs(5), "freed after {freed:?}");
    aborting.join().unwrap();
    let after = comm.all_reduce_in_place(&mut slice, Op::Sum, Stream::DEFAULT);
    assert!(matches!(after, Err(Error::Aborted { .. })), "{after:?}");
    drop(comm);

    let id = library.unique_id().unwrap();
    let mut alone = Comm::start(&library, &id, 0, 1)
        .unwrap()
        .wait(LIMIT)
        .unwrap();
    assert_eq!(
        sum(&cuda, &mut alone, DataType::F32, f32::from),
        [1.0, 2.0, 3.0]
    );
    alone.finalize().unwrap();
}

#[test]
fn a_dropped_communicator_waits_for_nobody() {
    let Some((library, cuda)) = machine() else {
        return;
    };
    let Some(here) = Rank::here() else {
        Ranks::start("gpu::a_dropped_communicator_waits_for_nobody", 2).join();
        return;
    };
    let mut comm = here.begin(&library).wait(LIMIT).unwrap();
    assert_eq!(
        sum(&cuda, &mut comm, DataType::F32, f32::from),
        [2.0, 4.0, 6.0]
    );
    if here.rank == 1 {
        // Rank 0 drops its communicator while this one is alive and does not answer.
        here.board.hear("dropped");
        return;
    }
    let start = Instant::now();
    drop(comm);
    here.board.say("dropped", b"");
    assert!(start.elapsed() < Duration::from_secs(10));
}
