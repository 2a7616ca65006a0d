//! Ranks on GPUs: tensors go over NCCL, small things over the agent's collective.

use std::{thread, time::Duration};

use nccl::{Comm, DataType, DeviceSliceMut, Library, Op, Stream};
use supra_agent::{Collective, CollectiveError, collective::AbortHandle};
use tch::{Device, Kind, Tensor};

use super::{DeviceCollective, DeviceCollectiveError, check};
use crate::device;

/// How long the ranks' GPUs may take to connect, and what NCCL does in the background of a later call.
const PATIENCE: Duration = Duration::from_secs(60);

/// A rank on a GPU that has peers.
pub struct Nccl {
    comm: Comm,
    host: Box<dyn Collective>,
    device: Device,
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
        })
    }

    /// The tensor for NCCL, if it is one that can be exchanged.
    #[allow(unsafe_code)]
    fn slice(
        &self,
        flat: &mut Tensor,
        parts: bool,
    ) -> Result<DeviceSliceMut, DeviceCollectiveError> {
        let data_type = match check(flat, self.device, self.comm.world(), parts)? {
            Kind::Float => DataType::F32,
            _ => DataType::Bf16,
        };
        // SAFETY: pointer, length and type are those of a contiguous tensor on this communicator's device. libtorch
        // works on the legacy default stream, and so do all operations here. Whoever uses this memory next, also after
        // libtorch has freed the tensor and given it to another one, comes later on that stream.
        Ok(unsafe { DeviceSliceMut::new(flat.data_ptr(), flat.numel(), data_type) })
    }
}

impl DeviceCollective for Nccl {
    fn host(&mut self) -> &mut dyn Collective {
        self.host.as_mut()
    }

    fn all_reduce(&mut self, flat: &mut Tensor) -> Result<(), DeviceCollectiveError> {
        let mut flat = self.slice(flat, false)?;
        Ok(self
            .comm
            .all_reduce_in_place(&mut flat, Op::Sum, Stream::DEFAULT)?)
    }

    fn reduce_scatter(&mut self, flat: &mut Tensor) -> Result<(), DeviceCollectiveError> {
        let mut flat = self.slice(flat, true)?;
        Ok(self
            .comm
            .reduce_scatter_in_place(&mut flat, Op::Sum, Stream::DEFAULT)?)
    }

    fn all_gather(&mut self, flat: &mut Tensor) -> Result<(), DeviceCollectiveError> {
        let mut flat = self.slice(flat, true)?;
        Ok(self.comm.all_gather_in_place(&mut flat, Stream::DEFAULT)?)
    }

    fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError> {
        Ok(self.comm.finalize()?)
    }
}
