//! Communicators: their start, their use, their end, and how another thread ends them.

use std::ffi::c_int;
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::group::Group;
use crate::library::Library;
use crate::memory::{DeviceSlice, DeviceSliceMut, Stream};
use crate::operation::Op;
use crate::symbols::{RawComm, RawConfig, RawResult, SUCCESS, Symbols};
use crate::unique_id::UniqueId;

/// First and longest pause between two looks at work in the background.
const PAUSES: (Duration, Duration) = (Duration::from_micros(20), Duration::from_millis(2));

/// A rank of a communicator.
///
/// Dropping one that is not [`finalize`](Self::finalize)d aborts it and waits for no peer. It may be
/// sent to another thread, but calls on it are made one after the other; only an [`AbortHandle`]
/// works beside them.
#[derive(Debug)]
pub struct Comm {
    owner: Owner,
    rank: u32,
    world: u32,
    limit: Duration,
}

/// A communicator whose ranks are looking for each other in the background.
#[derive(Debug)]
pub struct Starting {
    owner: Owner,
    rank: u32,
    world: u32,
}

/// Ends a communicator from any thread. Clones are the same handle; it keeps nothing alive.
#[derive(Clone, Debug)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

/// What the owner of a communicator and its abort handles share.
pub(crate) struct Shared {
    pub(crate) library: Library,
    /// None once it is destroyed or aborted. Whoever uses the pointer holds the lock: NCCL frees it.
    comm: Mutex<Option<Pointer>>,
    /// Set before the lock is taken, so that nobody who waits for NCCL goes on waiting.
    aborted: AtomicBool,
}

/// The communicator in NCCL's memory.
struct Pointer(RawComm);

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the lock around this sees to.
// It sets and restores the CUDA device of the calling thread by itself.
unsafe impl Send for Pointer {}

/// Aborts the communicator on drop, unless it has come to a better end.
#[derive(Debug)]
struct Owner(Arc<Shared>);

impl Comm {
    /// Starts to connect the ranks of `id`: every rank calls this once, with its own `rank` and the same
    /// `world`. Returns at once; [`Starting::wait`] waits for the others.
    ///
    /// The calling thread's current CUDA device becomes the communicator's.
    ///
    /// # Errors
    ///
    /// `NoSuchRank`; NCCL's own, for example that there is no GPU.
    pub fn start(
        library: &Library,
        id: &UniqueId,
        rank: u32,
        world: u32,
    ) -> Result<Starting, Error> {
        const CALL: &str = "ncclCommInitRankConfig";
        let (Ok(raw_rank), Ok(raw_world)) = (c_int::try_from(rank), c_int::try_from(world)) else {
            return Err(Error::NoSuchRank {
                call: CALL,
                rank,
                world,
            });
        };
        if rank >= world {
            return Err(Error::NoSuchRank {
                call: CALL,
                rank,
                world,
            });
        }
        let mut config = RawConfig::non_blocking();
        let mut comm: RawComm = ptr::null_mut();
        // SAFETY: NCCL writes a pointer to `comm`, and copies the configuration before it returns.
        let result = unsafe {
            (library.symbols.comm_init_rank_config)(
                &mut comm,
                raw_world,
                id.raw(),
                raw_rank,
                &mut config,
            )
        };
        let owner = Owner(Arc::new(Shared {
            library: library.clone(),
            comm: Mutex::new((!comm.is_null()).then_some(Pointer(comm))),
            aborted: AtomicBool::new(false),
        }));
        owner.0.check(CALL, result)?;
        Ok(Starting { owner, rank, world })
    }

    /// This rank, `0..world`.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Number of ranks.
    pub fn world(&self) -> u32 {
        self.world
    }

    /// A handle by which another thread can end this communicator.
    pub fn abort_handle(&self) -> AbortHandle {
        self.owner.abort_handle()
    }

    /// [`AbortHandle::abort`].
    pub fn abort(&self) {
        self.owner.0.abort();
    }

    /// What went wrong in the background since the last call, such as a lost peer. Work that goes on
    /// is no error. Cheap enough to be asked often.
    ///
    /// # Errors
    ///
    /// NCCL's own; `Aborted`.
    pub fn async_error(&self) -> Result<(), Error> {
        self.owner.0.done("ncclCommGetAsyncError").map(drop)
    }

    /// Starts all operations that `operations` calls as one. Sends and receives that wait for each other
    /// have to be in one group.
    ///
    /// When `operations` fails, what it had called before is started all the same: NCCL has no way
    /// back. Abort or drop the communicator then. An [`AbortHandle`] used inside waits for ever.
    ///
    /// # Errors
    ///
    /// Those of `operations`, else those of starting; `Timeout` when NCCL cannot start the work within
    /// the limit given to [`Starting::wait`]; `Aborted`.
    pub fn group<T>(
        &mut self,
        operations: impl FnOnce(&mut Group<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let shared = &self.owner.0;
        let (value, last) = {
            let locked = shared.lock();
            let comm = shared.pointer("ncclGroupStart", &locked)?;
            let mut group = Group::begin(shared, comm, self.rank, self.world)?;
            let value = operations(&mut group);
            let ended = group.end();
            (value?, ended?)
        };
        shared.settle(last, self.limit)?;
        Ok(value)
    }

    /// [`Group::all_reduce`] alone.
    pub fn all_reduce(
        &mut self,
        send: DeviceSlice,
        receive: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.all_reduce(send, receive, op, stream))
    }

    /// [`Group::all_reduce_in_place`] alone.
    pub fn all_reduce_in_place(
        &mut self,
        buffer: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.all_reduce_in_place(buffer, op, stream))
    }

    /// [`Group::reduce_scatter`] alone.
    pub fn reduce_scatter(
        &mut self,
        send: DeviceSlice,
        receive: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.reduce_scatter(send, receive, op, stream))
    }

    /// [`Group::reduce_scatter_in_place`] alone.
    pub fn reduce_scatter_in_place(
        &mut self,
        buffer: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.reduce_scatter_in_place(buffer, op, stream))
    }

    /// [`Group::all_gather`] alone.
    pub fn all_gather(
        &mut self,
        send: DeviceSlice,
        receive: &mut DeviceSliceMut,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.all_gather(send, receive, stream))
    }

    /// [`Group::all_gather_in_place`] alone.
    pub fn all_gather_in_place(
        &mut self,
        buffer: &mut DeviceSliceMut,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.all_gather_in_place(buffer, stream))
    }

    /// [`Group::broadcast`] alone.
    pub fn broadcast(
        &mut self,
        buffer: &mut DeviceSliceMut,
        root: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.broadcast(buffer, root, stream))
    }

    /// [`Group::send`] alone.
    pub fn send(&mut self, send: DeviceSlice, to: u32, stream: Stream) -> Result<(), Error> {
        self.group(|group| group.send(send, to, stream))
    }

    /// [`Group::recv`] alone.
    pub fn recv(
        &mut self,
        receive: &mut DeviceSliceMut,
        from: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        self.group(|group| group.recv(receive, from, stream))
    }

    /// Waits until everything enqueued is done and all ranks have called this, then frees the
    /// communicator.
    ///
    /// # Errors
    ///
    /// `Timeout` after the limit given to [`Starting::wait`], NCCL's own, `Aborted`. The communicator is
    /// freed all the same, by an abort.
    pub fn finalize(self) -> Result<(), Error> {
        const CALL: &str = "ncclCommFinalize";
        let shared = &self.owner.0;
        // SAFETY: the communicator is alive behind its lock.
        shared.call(CALL, |symbols, comm| unsafe {
            (symbols.comm_finalize)(comm)
        })?;
        shared.settle(CALL, self.limit)?;
        shared.destroy()
    }
}

impl Starting {
    /// A handle by which another thread can end this communicator, now and later.
    pub fn abort_handle(&self) -> AbortHandle {
        self.owner.abort_handle()
    }

    /// Waits until all ranks are connected. `limit` is for this, and later for the part of every call
    /// that NCCL does in the background; how long the GPU takes is not limited.
    ///
    /// # Errors
    ///
    /// `Timeout`, most likely because a rank is missing; NCCL's own; `Aborted`.
    pub fn wait(self, limit: Duration) -> Result<Comm, Error> {
        self.owner.0.settle("ncclCommInitRankConfig", limit)?;
        Ok(Comm {
            owner: self.owner,
            rank: self.rank,
            world: self.world,
            limit,
        })
    }
}

impl AbortHandle {
    /// Ends the communicator: its work on the GPU stops, so that the streams go on, and every call on it
    /// returns [`Error::Aborted`]. What the work leaves in its buffers is not said. Takes about half a
    /// second. Repeats do nothing, nor does the abort of a communicator that was finalized.
    ///
    /// NCCL has been seen to hang here. A program that has to end in any case watches the thread that
    /// calls this.
    pub fn abort(&self) {
        self.shared.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Pointer>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pointer(&self, call: &'static str, locked: &Option<Pointer>) -> Result<RawComm, Error> {
        match locked {
            Some(Pointer(comm)) if !self.aborted() => Ok(*comm),
            _ => Err(Error::Aborted { call }),
        }
    }

    fn aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }

    /// NCCL's error; `Aborted` when it is the doing of an abort.
    pub(crate) fn check(&self, call: &'static str, result: RawResult) -> Result<(), Error> {
        match self.library.check(call, result) {
            Err(_) if self.aborted() => Err(Error::Aborted { call }),
            checked => checked,
        }
    }

    /// Calls NCCL with the communicator.
    fn call(
        &self,
        name: &'static str,
        function: impl FnOnce(&Symbols, RawComm) -> RawResult,
    ) -> Result<(), Error> {
        let locked = self.lock();
        let comm = self.pointer(name, &locked)?;
        self.check(name, function(&self.library.symbols, comm))
    }

    /// Whether nothing goes on in the background; `call` is what errors are told of.
    fn done(&self, call: &'static str) -> Result<bool, Error> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive behind its lock; the function writes one result.
        self.call(call, |symbols, comm| unsafe {
            (symbols.comm_get_async_error)(comm, &mut state)
        })?;
        self.check(call, state)?;
        Ok(state == SUCCESS)
    }

    /// Waits for the background part of `call`.
    fn settle(&self, call: &'static str, limit: Duration) -> Result<(), Error> {
        let start = Instant::now();
        let (mut pause, longest) = PAUSES;
        while !self.done(call)? {
            if start.elapsed() >= limit {
                return Err(Error::Timeout { call, after: limit });
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(longest);
        }
        Ok(())
    }

    fn destroy(&self) -> Result<(), Error> {
        const CALL: &str = "ncclCommDestroy";
        let Some(Pointer(comm)) = self.lock().take() else {
            return Err(Error::Aborted { call: CALL });
        };
        // SAFETY: the pointer was taken from behind the lock: nobody else has it, nobody uses it again.
        let result = unsafe { (self.library.symbols.comm_destroy)(comm) };
        self.check(CALL, result)
    }

    fn abort(&self) {
        self.aborted.store(true, Ordering::SeqCst);
        // The lock is held meanwhile: a repeat returns when the abort is done.
        let mut locked = self.lock();
        if let Some(Pointer(comm)) = locked.take() {
            // SAFETY: the pointer was taken from behind the lock: nobody else has it, nobody uses it
            // again. That NCCL cannot end it well changes nothing: it is given up.
            let _ = unsafe { (self.library.symbols.comm_abort)(comm) };
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("library", &self.library)
            .field("aborted", &self.aborted())
            .finish_non_exhaustive()
    }
}

impl Owner {
    fn abort_handle(&self) -> AbortHandle {
        AbortHandle {
            shared: Arc::clone(&self.0),
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.abort();
    }
}
