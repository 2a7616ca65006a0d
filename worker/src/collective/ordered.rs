//! Sums between GPUs in rank order: NCCL only carries the values.
//!
//! Every rank gets its part of the tensor from all others and adds in fp32, in the order of ranks; so the bits depend on
//! the number of ranks and on nothing else. It moves as much as a ring does, but needs room for what the others send.

use nccl::{Comm, DeviceSliceMut};
use tch::{Device, Kind, Tensor};

use super::{
    DeviceCollectiveError,
    nccl::{slice, stream},
};
use crate::kernels::cuda::{Queue, RankSum, SideStream};

/// Adds what other ranks send.
pub struct Ordered {
    sum: RankSum,
    device: Device,
    /// What the others have of this rank's part, in the order of ranks.
    room: Tensor,
}

impl Ordered {
    /// On the GPU with this index.
    pub fn new(index: usize) -> Result<Ordered, DeviceCollectiveError> {
        let device = Device::Cuda(index);
        Ok(Ordered {
            sum: RankSum::new(index)?,
            device,
            room: Tensor::empty([0], (Kind::Float, device)),
        })
    }

    /// Sees to it that the others' parts of `flat` have room. In the steady state it is there.
    pub fn make_room(
        &mut self,
        flat: &Tensor,
        world: u32,
        side: &SideStream,
    ) -> Result<(), DeviceCollectiveError> {
        let elements = others(flat, world);
        if self.room.size()[0] < elements {
            // The old room may still be in use.
            side.synchronize()?;
            self.room = Tensor::empty([elements], (Kind::Float, self.device));
        }
        Ok(())
    }

    /// Replaces this rank's part of `flat`, fp32, by its sum over all ranks. There is room.
    pub fn reduce_scatter(
        &self,
        comm: &mut Comm,
        flat: &Tensor,
        queue: &Queue,
    ) -> Result<(), DeviceCollectiveError> {
        let (rank, world) = (comm.rank(), comm.world());
        let parts = flat.view([-1]).chunk(world.into(), 0);
        let mine = &parts[rank as usize];
        let theirs = self.room.narrow(0, 0, others(flat, world));
        let out = slices(&parts, self.device)?;
        let mut into = slices(&theirs.chunk(i64::from(world) - 1, 0), self.device)?;
        let stream = stream(queue);
        comm.group(|group| {
            let peers = (0..world).filter(|&peer| peer != rank);
            for (peer, into) in peers.zip(&mut into) {
                group.send(out[peer as usize].as_slice(), peer, stream)?;
                group.recv(into, peer, stream)?;
            }
            Ok(())
        })?;
        Ok(self.sum.add(queue, mine, &theirs, rank)?)
    }
}

/// Elements of all other ranks' shares of one part.
fn others(flat: &Tensor, world: u32) -> i64 {
    flat.numel() as i64 / i64::from(world) * i64::from(world - 1)
}

fn slices(parts: &[Tensor], device: Device) -> Result<Vec<DeviceSliceMut>, DeviceCollectiveError> {
    parts.iter().map(|part| slice(part, device, 1)).collect()
}
