//! Operations, one at a time or fused into one.

use std::ffi::c_int;

use crate::comm::Shared;
use crate::error::Error;
use crate::memory::{DeviceSlice, DeviceSliceMut, Stream};
use crate::operation::Op;
use crate::symbols::{RawComm, RawResult, Symbols};

/// Operations that NCCL starts together, at the end of [`Comm::group`](crate::Comm::group).
///
/// Every rank of the communicator has to call the same operations with the same sizes, types and
/// reductions in the same order; sends and receives have to match in pairs.
#[derive(Debug)]
pub struct Group<'a> {
    shared: &'a Shared,
    comm: RawComm,
    rank: u32,
    world: u32,
    /// The call that errors behind the end of the group are told of.
    last: &'static str,
    open: bool,
}

impl<'a> Group<'a> {
    /// Begins a group on this thread. The caller holds the lock on `comm` for as long as it lives.
    pub(crate) fn begin(
        shared: &'a Shared,
        comm: RawComm,
        rank: u32,
        world: u32,
    ) -> Result<Group<'a>, Error> {
        // SAFETY: the function takes nothing; every start has its end, in `end` or on drop.
        let result = unsafe { (shared.library.symbols.group_start)() };
        shared.check("ncclGroupStart", result)?;
        Ok(Group {
            shared,
            comm,
            rank,
            world,
            last: "ncclGroupEnd",
            open: true,
        })
    }

    /// Starts what was called; gives back the name of the last call.
    pub(crate) fn end(mut self) -> Result<&'static str, Error> {
        let result = self.close();
        self.shared.check(self.last, result)?;
        Ok(self.last)
    }

    fn close(&mut self) -> RawResult {
        self.open = false;
        // SAFETY: this thread has begun the group, since a `Group` cannot be sent to another one.
        unsafe { (self.shared.library.symbols.group_end)() }
    }

    /// Replaces `receive` on every rank by the reduction of the `send` of all ranks: same length,
    /// and same bits, everywhere.
    ///
    /// # Errors
    ///
    /// `Mismatch` when lengths or types differ; NCCL's own errors; `Aborted`. So for all operations.
    pub fn all_reduce(
        &mut self,
        send: DeviceSlice,
        receive: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclAllReduce";
        self.fit(CALL, send, receive, 1, 1)?;
        // SAFETY: pointers and stream hold what their makers promised, the buffers are equally long,
        // and the communicator is alive behind its lock. So for all operations.
        self.call(CALL, |symbols, comm| unsafe {
            (symbols.all_reduce)(
                send.pointer,
                receive.pointer,
                send.elements,
                send.data_type.raw(),
                op.raw(),
                comm,
                stream.0,
            )
        })
    }

    /// [`all_reduce`](Self::all_reduce) of `buffer` onto itself.
    pub fn all_reduce_in_place(
        &mut self,
        buffer: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        self.all_reduce(buffer.as_slice(), buffer, op, stream)
    }

    /// Cuts `send` into as many equal parts as there are ranks and replaces `receive` by the reduction
    /// of this rank's part over all ranks.
    pub fn reduce_scatter(
        &mut self,
        send: DeviceSlice,
        receive: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclReduceScatter";
        self.fit(CALL, send, receive, 1, self.world)?;
        // SAFETY: as in `all_reduce`; `send` is `world` times as long as `receive`.
        self.call(CALL, |symbols, comm| unsafe {
            (symbols.reduce_scatter)(
                send.pointer,
                receive.pointer,
                receive.elements,
                send.data_type.raw(),
                op.raw(),
                comm,
                stream.0,
            )
        })
    }

    /// [`reduce_scatter`](Self::reduce_scatter) of `buffer` onto this rank's own part of it. What the
    /// other parts hold afterwards is not said.
    pub fn reduce_scatter_in_place(
        &mut self,
        buffer: &mut DeviceSliceMut,
        op: Op,
        stream: Stream,
    ) -> Result<(), Error> {
        let mut mine = buffer.part(self.rank, self.world);
        self.reduce_scatter(buffer.as_slice(), &mut mine, op, stream)
    }

    /// Replaces `receive` by the `send` of all ranks, in rank order.
    pub fn all_gather(
        &mut self,
        send: DeviceSlice,
        receive: &mut DeviceSliceMut,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclAllGather";
        self.fit(CALL, send, receive, self.world, 1)?;
        // SAFETY: as in `all_reduce`; `receive` is `world` times as long as `send`.
        self.call(CALL, |symbols, comm| unsafe {
            (symbols.all_gather)(
                send.pointer,
                receive.pointer,
                send.elements,
                send.data_type.raw(),
                comm,
                stream.0,
            )
        })
    }

    /// [`all_gather`](Self::all_gather) where each rank's part lies in its place of `buffer` already.
    pub fn all_gather_in_place(
        &mut self,
        buffer: &mut DeviceSliceMut,
        stream: Stream,
    ) -> Result<(), Error> {
        let mine = buffer.part(self.rank, self.world).as_slice();
        self.all_gather(mine, buffer, stream)
    }

    /// Replaces `buffer` by that of rank `root`.
    pub fn broadcast(
        &mut self,
        buffer: &mut DeviceSliceMut,
        root: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclBroadcast";
        let root = self.peer(CALL, root)?;
        // SAFETY: as in `all_reduce`; NCCL knows an operation in place by its equal pointers.
        self.call(CALL, |symbols, comm| unsafe {
            (symbols.broadcast)(
                buffer.pointer,
                buffer.pointer,
                buffer.elements,
                buffer.data_type.raw(),
                root,
                comm,
                stream.0,
            )
        })
    }

    /// Sends `send` to rank `to`, which receives as many elements of the same type.
    pub fn send(&mut self, send: DeviceSlice, to: u32, stream: Stream) -> Result<(), Error> {
        const CALL: &str = "ncclSend";
        let to = self.peer(CALL, to)?;
        // SAFETY: as in `all_reduce`.
        self.call(CALL, |symbols, comm| unsafe {
            (symbols.send)(
                send.pointer,
                send.elements,
                send.data_type.raw(),
                to,
                comm,
                stream.0,
            )
        })
    }

    /// Replaces `receive` by what rank `from` sends.
    pub fn recv(
        &mut self,
        receive: &mut DeviceSliceMut,
        from: u32,
        stream: Stream,
    ) -> Result<(), Error> {
        const CALL: &str = "ncclRecv";
        let from = self.peer(CALL, from)?;
        // SAFETY: as in `all_reduce`.
        self.call(CALL, |symbols, comm| unsafe {
            (symbols.recv)(
                receive.pointer,
                receive.elements,
                receive.data_type.raw(),
                from,
                comm,
                stream.0,
            )
        })
    }

    fn call(
        &mut self,
        name: &'static str,
        enqueue: impl FnOnce(&Symbols, RawComm) -> RawResult,
    ) -> Result<(), Error> {
        self.last = name;
        let result = enqueue(&self.shared.library.symbols, self.comm);
        self.shared.check(name, result)
    }

    /// Whether `sends` times `send` is as long as `receives` times `receive`, of the same type.
    fn fit(
        &self,
        call: &'static str,
        send: DeviceSlice,
        receive: &DeviceSliceMut,
        sends: u32,
        receives: u32,
    ) -> Result<(), Error> {
        let sent = send.elements.checked_mul(sends as usize);
        let received = receive.elements.checked_mul(receives as usize);
        if sent.is_some() && sent == received && send.data_type == receive.data_type {
            return Ok(());
        }
        Err(Error::Mismatch {
            call,
            send: send.elements,
            send_type: send.data_type,
            receive: receive.elements,
            receive_type: receive.data_type,
            world: self.world,
        })
    }

    fn peer(&self, call: &'static str, rank: u32) -> Result<c_int, Error> {
        match c_int::try_from(rank) {
            Ok(peer) if rank < self.world => Ok(peer),
            _ => Err(Error::NoSuchRank {
                call,
                rank,
                world: self.world,
            }),
        }
    }
}

impl Drop for Group<'_> {
    /// Only a panic leaves a group open: NCCL counts groups per thread and must see it end.
    fn drop(&mut self) {
        if self.open {
            self.close();
        }
    }
}
