//! How the ranks of a generation add and share what lies on their devices.
//!
//! Small things (tallies, hashes, barriers) go over the agent's [`Collective`] whatever the device is.
//! Flat tensors go the device's own way: through host memory between CPUs, over NCCL between GPUs. A
//! GPU never takes the way through host memory; what NCCL needs and does not find is an error.

mod host;
mod nccl;
mod ordered;

use std::time::Duration;

use supra_agent::{Collective, CollectiveError, Link};
use supra_recipes::schema::Reduction;
use tch::{Device, Kind, Tensor};
use thiserror::Error;

pub use self::nccl::Nccl;
pub use host::Host;

use crate::{
    device::{DeviceError, Place},
    kernels::KernelError,
};

/// What ranks do together with a flat tensor, in place. Unless all of it goes from one rank to all, it is cut into as many
/// equal parts as there are ranks; part `r` is rank `r`'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Every element becomes its sum over all ranks: same bits on every rank.
    AllReduce,
    /// Every element of this rank's part becomes its sum over all ranks, with the bits of `AllReduce`'s where the order of
    /// additions is fixed. What the other parts hold afterwards is not said.
    ReduceScatter,
    /// Every part becomes that of the rank whose it is.
    AllGather,
    /// All of it becomes that of rank `root`, to the bit.
    Broadcast {
        /// Who has it.
        root: u32,
    },
}

impl Operation {
    /// Into how many equal parts it cuts what `world` ranks exchange.
    fn parts(self, world: u32) -> u32 {
        match self {
            Operation::Broadcast { .. } => 1,
            _ => world,
        }
    }
}

/// An operation under way, which [`DeviceCollective::wait`] ends.
#[derive(Debug)]
#[must_use]
pub struct Pending {
    /// In the order in which they were started.
    number: u64,
}

impl Pending {
    /// The operation that was started as number `number`.
    pub fn new(number: u64) -> Pending {
        Pending { number }
    }

    /// Which operation it is.
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// What the ranks do together with flat tensors: contiguous, fp32 or bf16, on the rank's own device.
///
/// All ranks start the same operations with the same sizes in the same order, and they end in that order: who waits for
/// one has waited for all before it. Between CPUs an operation is over when `start` returns. GPUs do it beside what
/// libtorch's stream computes, behind all that this stream was asked for before the start; nothing may touch the tensor
/// until it was waited for. After an error the collective is of no more use: drop it and leave the generation.
pub trait DeviceCollective {
    /// The collective for what lies in host memory.
    fn host(&mut self) -> &mut dyn Collective;

    /// Starts an operation.
    fn start(
        &mut self,
        operation: Operation,
        flat: &Tensor,
    ) -> Result<Pending, DeviceCollectiveError>;

    /// Has everything that is computed from now on find the operation done. Only CPUs wait here: a GPU's stream waits by
    /// itself.
    fn wait(&mut self, pending: Pending) -> Result<(), DeviceCollectiveError>;

    /// As [`wait`](Self::wait), where the host has to wait anyway before it can go on: it does so here, so that the
    /// coordinator can be told that this rank only waits for others.
    fn settle(&mut self, pending: Pending) -> Result<(), DeviceCollectiveError> {
        self.wait(pending)
    }

    /// For how long computing has stood still in the waits since the last call, as far as the device has got: so call it
    /// when something was just read from the device.
    fn stalled(&mut self) -> Result<Duration, DeviceCollectiveError>;

    /// Leaves the waits so far out of what [`stalled`](Self::stalled) tells.
    fn forget_waits(&mut self);

    /// Ends it in order: returns when all ranks have called this and everything is done.
    fn finish(self: Box<Self>) -> Result<(), DeviceCollectiveError>;
}

/// Why ranks cannot do something together.
#[derive(Debug, Error)]
pub enum DeviceCollectiveError {
    /// In host memory, or before the devices came into it.
    #[error(transparent)]
    Host(#[from] CollectiveError),
    /// Between GPUs.
    #[error("between GPUs: {0}")]
    Nccl(#[from] ::nccl::Error),
    /// The GPU refuses a stream, or the kernel that adds.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The device is not what it was when it was opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The tensor is none that ranks can exchange.
    #[error(
        "cannot exchange a tensor of {elements} x {kind:?} on {device:?} in {parts} parts: {problem}"
    )]
    Unsuitable {
        /// Its elements.
        elements: usize,
        /// Their type.
        kind: Kind,
        /// Where it lies.
        device: Device,
        /// How many parts it has to have.
        parts: u32,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// The device collective of a generation whose ranks `host` has connected. `reduction` says how GPUs add. A generation
/// that becomes void aborts it, from `link`'s other end.
///
/// # Errors
///
/// Between GPUs: NCCL's own, and that a rank does not come in time.
pub fn connect(
    host: Box<dyn Collective>,
    place: &Place,
    reduction: Reduction,
    link: &Link,
) -> Result<Box<dyn DeviceCollective>, DeviceCollectiveError> {
    match (&place.nccl, place.device) {
        // Alone there is nothing to exchange.
        (Some(library), Device::Cuda(index)) if host.world() > 1 => Ok(Box::new(Nccl::connect(
            host, library, index, reduction, link,
        )?)),
        _ => Ok(Box::new(Host::new(host))),
    }
}

/// Refuses what is not flat, fp32 or bf16, in so many equal parts, and on `device`.
fn check(flat: &Tensor, device: Device, parts: u32) -> Result<Kind, DeviceCollectiveError> {
    let kind = flat.kind();
    let problem = if !matches!(kind, Kind::Float | Kind::BFloat16) {
        "only fp32 and bf16 can be added"
    } else if !flat.is_contiguous() {
        "it is not contiguous"
    } else if flat.device() != device {
        "it is on another device than this rank"
    } else if !flat.numel().is_multiple_of(parts as usize) {
        "it has no equal parts"
    } else {
        return Ok(kind);
    };
    Err(DeviceCollectiveError::Unsuitable {
        elements: flat.numel(),
        kind,
        device: flat.device(),
        parts,
        problem,
    })
}
