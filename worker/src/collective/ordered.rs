//! Sums between GPUs in rank order: NCCL only carries the values.
//!
//! Every rank gets its part of the tensor from all others and adds in fp32, in the order of ranks; so the bits depend on
//! the number of ranks and on nothing else. It moves as much as a ring does, but needs room for `world - 1` parts.

use nccl::{Comm, DeviceSliceMut, Stream};
use supra_agent::collective::chunk;
use tch::{Kind, Tensor};

use super::{DeviceCollectiveError, nccl::slice};

/// Replaces `flat` by its sum over all ranks.
pub fn all_reduce(comm: &mut Comm, flat: &Tensor) -> Result<(), DeviceCollectiveError> {
    reduce_scatter(comm, flat)?;
    let mut slices = slices(&parts(flat, comm.world()))?;
    Ok(comm.group(|group| {
        for (part, root) in slices.iter_mut().zip(0..) {
            group.broadcast(part, root, Stream::DEFAULT)?;
        }
        Ok(())
    })?)
}

/// Replaces this rank's part of `flat` by its sum over all ranks, rounded once.
fn reduce_scatter(comm: &mut Comm, flat: &Tensor) -> Result<(), DeviceCollectiveError> {
    let rank = comm.rank() as usize;
    let parts = parts(flat, comm.world());
    // What each rank has of this rank's part; its own stays where it is.
    let mut mine: Vec<Tensor> = parts.iter().map(|_| parts[rank].empty_like()).collect();
    mine[rank] = parts[rank].shallow_clone();
    let (out, mut into) = (slices(&parts)?, slices(&mine)?);
    comm.group(|group| {
        for peer in (0..out.len()).filter(|&peer| peer != rank) {
            group.send(out[peer].as_slice(), peer as u32, Stream::DEFAULT)?;
            group.recv(&mut into[peer], peer as u32, Stream::DEFAULT)?;
        }
        Ok(())
    })?;
    let mut sum = mine[0].to_dtype(Kind::Float, false, true);
    for values in &mine[1..] {
        let _ = sum.g_add_(values);
    }
    mine[rank].copy_(&sum);
    Ok(())
}

/// Views of the ranks' parts, which differ by at most one element.
fn parts(flat: &Tensor, world: u32) -> Vec<Tensor> {
    let flat = flat.view([-1]);
    (0..world)
        .map(|rank| {
            let range = chunk(flat.numel(), world, rank);
            flat.narrow(0, range.start as i64, range.len() as i64)
        })
        .collect()
}

fn slices(parts: &[Tensor]) -> Result<Vec<DeviceSliceMut>, DeviceCollectiveError> {
    let world = parts.len() as u32;
    parts
        .iter()
        .map(|part| slice(part, part.device(), world))
        .collect()
}
