//! Ranks on GPUs: tensors go over NCCL, small things over the agent's collective.

use std::{thread, time::Duration};

use nccl::{Comm, DataType, DeviceSliceMut, Library, Op, Stream};
use supra_agent::{Collective, CollectiveError, Link, collective::Waiting};
use supra_recipes::schema::Reduction;
use tch::{Device, Kind, Tensor};

use super::{DeviceCollective, DeviceCollectiveError, Operation, Pending, check, ordered::Ordered};
use crate::{
    device,
    kernels::cuda::{Queue, SideStream},
};

/// How long the ranks' GPUs may take to connect, and what NCCL does in the background of a later call.
const PATIENCE: Duration = Duration::from_secs(60);

/// A rank on a GPU that has peers.
pub struct Nccl {
    // Before the stream, which ends only when what it carries has ended: dropping this aborts that.
    comm: Comm,
    side: SideStream,
    /// Who adds, if not NCCL.
    ordered: Option<Ordered>,
    host: Box<dyn Collective>,
    device: Device,
    waiting: Waiting,
}

impl Nccl {
    /// Connects the GPUs of all ranks of `host`. A void of `link`'s generation ends this, and every operation later.
    ///
    /// # Errors
    ///
    /// NCCL's own; `Timeout` after a minute; the agent's; that the GPU refuses a stream or a kernel.
    pub fn connect(
        mut host: Box<dyn Collective>,
        library: &Library,
        index: usize,
        reduction: Reduction,
        link: &Link,
    ) -> Result<Nccl, DeviceCollectiveError> {
        let mut id = Vec::new();
        if host.rank() == 0 {
            id.extend(library.unique_id()?.to_bytes());
        }
        host.broadcast(0, &mut id)?;
        let id: [u8; 128] = id.try_into().map_err(|id: Vec<u8>| CollectiveError::Peer {
            rank: 0,
            address: "in this generation".to_owned(),
            cause: format!(
                "sent an id of {} bytes for NCCL, where 128 were due",
                id.len()
            ),
        })?;
        let device = Device::Cuda(index);
        device::make_current(device)?;
        let side = SideStream::open(index)?;
        let ordered = match reduction {
            Reduction::Nccl => None,
            Reduction::Ordered => Some(Ordered::new(index)?),
        };
        let starting = Comm::start(library, &id.into(), host.rank(), host.world())?;
        let ending = starting.abort_handle();
        // NCCL takes half a second for it, and has been seen to hang: the thread that aborts must not wait. If this
        // process has no room for a thread, the generation's own time limit ends it.
        link.abort_handle().on_abort(move || {
            thread::Builder::new()
                .name("nccl abort".to_owned())
                .spawn(move || ending.abort())
                .ok();
        });
        Ok(Nccl {
            comm: starting.wait(PATIENCE)?,
            side,
            ordered,
            host,
            device,
            waiting: link.waiting(),
        })
    }
}

/// The memory of a tensor that ranks on `device` can exchange in so many parts.
#[allow(unsafe_code)]
pub(super) fn slice(
    flat: &Tensor,
    device: Device,
    parts: u32,
) -> Result<DeviceSliceMut, DeviceCollectiveError> {
    let data_type = match check(flat, device, parts)? {
        Kind::Float => DataType::F32,
        _ => DataType::Bf16,
    };
    // SAFETY: pointer, length and type are those of a contiguous tensor. It goes into operations of the side stream only,
    // which keeps the tensor until the default stream, that of all other work, waits for them.
    Ok(unsafe { DeviceSliceMut::new(flat.data_ptr(), flat.numel(), data_type) })
}

/// The stream for NCCL.
#[allow(unsafe_code)]
pub(super) fn stream(queue: &Queue) -> Stream {
    // SAFETY: it is the side stream, of the communicator's GPU, which outlives the communicator and is destroyed empty.
    unsafe { Stream::from_raw(queue.raw()) }
}

impl DeviceCollective for Nccl {
    fn host(&mut self) -> &mut dyn Collective {
        self.host.as_mut()
    }

    fn start(
        &mut self,
        operation: Operation,
        flat: &Tensor,
    ) -> Result<Pending, DeviceCollectiveError> {
        let comm = &mut self.comm;
        let mut slice = slice(flat, self.device, operation.parts(comm.world()))?;
        if matches!(
            operation,
            Operation::AllGather | Operation::Broadcast { .. }
        ) {
            let number = self.side.start(flat, |queue| {
                let stream = stream(queue);
                match operation {
                    Operation::Broadcast { root } => comm.broadcast(&mut slice, root, stream)?,
                    _ => comm.all_gather_in_place(&mut slice, stream)?,
                }
                Ok::<_, DeviceCollectiveError>(())
            })?;
            return Ok(Pending::new(number));
        }
        if let Some(ordered) = &mut self.ordered {
            ordered.make_room(flat, comm.world(), &self.side)?;
        }
        let ordered = self.ordered.as_ref();
        let number = self.side.start(flat, |queue| {
            let stream = stream(queue);
            match (ordered, operation) {
                (Some(ordered), Operation::AllReduce) => {
                    ordered.reduce_scatter(comm, flat, queue)?;
                    comm.all_gather_in_place(&mut slice, stream)?;
                }
                (Some(ordered), _) => ordered.reduce_scatter(comm, flat, queue)?,
                (None, Operation::AllReduce) => {
                    comm.all_reduce_in_place(&mut slice, Op::Sum, stream)?;
                }
                (None, _) => comm.reduce_scatter_in_place(&mut slice, Op::Sum, stream)?,
            }
            Ok::<_, DeviceCollectiveError>(())
        })?;
        Ok(Pending::new(number))
    }

    fn wait(&mut self, pending: Pending) -> Result<(), DeviceCollectiveError> {
        Ok(self.side.wait(pending.number())?)
    }

    fn settle(&mut self, pending: Pending) -> Result<(), DeviceCollectiveError> {
        let waiting = &self.waiting;
        Ok(self.side.settle(pending.number(), || waiting.begin())?)
    }

    fn stalled(&mut self) -> Result<Duration, DeviceCollectiveError> {
        Ok(self.side.stalled()?)
    }

    fn forget_waits(&mut self) {
        self.side.forget_waits();
    }

    fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError> {
        Ok(self.comm.finalize()?)
    }
}
