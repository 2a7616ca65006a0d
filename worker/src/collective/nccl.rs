//! Ranks on GPUs: tensors go over NCCL, small things over the agent's collective.

use std::{thread, time::Duration};

use nccl::{Comm, DataType, DeviceSliceMut, Library, Op, Stream};
use supra_agent::{Collective, CollectiveError, collective::AbortHandle};
use supra_recipes::schema::Reduction;
use tch::{Device, Kind, Tensor};

use super::{DeviceCollective, DeviceCollectiveError, check, ordered};
use crate::device;

/// How long the ranks' GPUs may take to connect, and what NCCL does in the background of a later call.
const PATIENCE: Duration = Duration::from_secs(60);

/// A rank on a GPU that has peers.
pub struct Nccl {
    comm: Comm,
    host: Box<dyn Collective>,
    device: Device,
    reduction: Reduction,
}

impl Nccl {
    /// Connects the GPUs of all ranks of `host`. `abort` ends this, and every operation later.
    ///
    /// # Errors
    ///
    /// NCCL's own; `Timeout` after a minute; the agent's.
    pub fn connect(
        mut host: Box<dyn Collective>,
        library: &Library,
        device: Device,
        reduction: Reduction,
        abort: &AbortHandle,
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
        device::make_current(device)?;
        let starting = Comm::start(library, &id.into(), host.rank(), host.world())?;
        let ending = starting.abort_handle();
        // NCCL takes half a second for it, and has been seen to hang: the thread that aborts must not wait. If this
        // process has no room for a thread, the generation's own time limit ends it.
        abort.on_abort(move || {
            thread::Builder::new()
                .name("nccl abort".to_owned())
                .spawn(move || ending.abort())
                .ok();
        });
        Ok(Nccl {
            comm: starting.wait(PATIENCE)?,
            host,
            device,
            reduction,
        })
    }
}

/// The memory of a tensor that ranks on `device` can exchange.
#[allow(unsafe_code)]
pub(super) fn slice(
    flat: &Tensor,
    device: Device,
    world: u32,
) -> Result<DeviceSliceMut, DeviceCollectiveError> {
    let data_type = match check(flat, device, world)? {
        Kind::Float => DataType::F32,
        _ => DataType::Bf16,
    };
    // SAFETY: pointer, length and type are those of a contiguous tensor. libtorch works on the legacy default stream, and
    // so do all operations of this module. Whoever uses this memory next, also after libtorch has freed the tensor and
    // given it to another one, comes later on that stream.
    Ok(unsafe { DeviceSliceMut::new(flat.data_ptr(), flat.numel(), data_type) })
}

impl DeviceCollective for Nccl {
    fn host(&mut self) -> &mut dyn Collective {
        self.host.as_mut()
    }

    fn all_reduce(&mut self, flat: &mut Tensor) -> Result<(), DeviceCollectiveError> {
        let mut slice = slice(flat, self.device, self.comm.world())?;
        match self.reduction {
            Reduction::Nccl => {
                self.comm
                    .all_reduce_in_place(&mut slice, Op::Sum, Stream::DEFAULT)?;
            }
            Reduction::Ordered => ordered::all_reduce(&mut self.comm, flat)?,
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError> {
        Ok(self.comm.finalize()?)
    }
}
