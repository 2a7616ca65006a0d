//! What the ranks exchange during a step, bucket by bucket, and what of it is under way.
//!
//! In the backward pass of a step's last micro-batch the reduction of a bucket begins as soon as its gradients are final;
//! where ranks keep parts, the parameters of a bucket are gathered as soon as they are updated, and the next forward pass
//! waits for them block by block. Every rank starts the same operations in the same order, whatever it was fed.

use std::time::Duration;

use supra_agent::Collective;
use tch::Tensor;

use super::{Part, Replica};
use crate::collective::{DeviceCollective, DeviceCollectiveError, Operation, Pending};

/// The exchanges of a rank's gradients and parameters.
pub struct Exchange {
    collective: Box<dyn DeviceCollective>,
    buckets: Vec<Bucket>,
    reduction: Operation,
    /// Whether updated parameters are those of a part.
    parts: bool,
    /// Buckets whose reduction has not begun in this step: all before this one.
    unreduced: usize,
    /// The reduction that was begun last.
    reducing: Option<Pending>,
}

/// A bucket's views of the flat buffers.
struct Bucket {
    gradient: Tensor,
    parameters: Tensor,
    gathering: Option<Pending>,
}

impl Exchange {
    /// Of `replica`, whose ranks `collective` connects.
    pub fn new(collective: Box<dyn DeviceCollective>, replica: &Replica) -> Exchange {
        let buckets: Vec<Bucket> = replica
            .layout()
            .buckets()
            .iter()
            .map(|bucket| Bucket {
                gradient: bucket.view(&replica.gradient),
                parameters: bucket.view(&replica.parameters),
                gathering: None,
            })
            .collect();
        let parts = replica.part() != Part::WHOLE;
        Exchange {
            collective,
            reduction: if parts {
                Operation::ReduceScatter
            } else {
                Operation::AllReduce
            },
            parts,
            unreduced: buckets.len(),
            buckets,
            reducing: None,
        }
    }

    /// The ranks, for what is exchanged between steps.
    pub fn collective(&mut self) -> &mut dyn DeviceCollective {
        self.collective.as_mut()
    }

    /// The same for what lies in host memory.
    pub fn host(&mut self) -> &mut dyn Collective {
        self.collective.host()
    }

    /// The gradients of this bucket, and of all behind it, are final: begins their reduction.
    pub fn reduce(&mut self, bucket: usize) -> Result<(), DeviceCollectiveError> {
        while self.unreduced > bucket {
            self.unreduced -= 1;
            let gradient = &self.buckets[self.unreduced].gradient;
            self.reducing = Some(self.collective.start(self.reduction, gradient)?);
        }
        Ok(())
    }

    /// Has all gradients reduced: each rank's part of them, or everything where ranks keep everything.
    pub fn reduced(&mut self) -> Result<(), DeviceCollectiveError> {
        self.reduce(0)?;
        self.unreduced = self.buckets.len();
        // They end in order.
        match self.reducing.take() {
            Some(last) => self.collective.wait(last),
            None => Ok(()),
        }
    }

    /// This rank's part of a bucket's parameters is updated: begins to gather the others'.
    pub fn gather(&mut self, bucket: usize) -> Result<(), DeviceCollectiveError> {
        if self.parts {
            let bucket = &mut self.buckets[bucket];
            let pending = self
                .collective
                .start(Operation::AllGather, &bucket.parameters)?;
            bucket.gathering = Some(pending);
        }
        Ok(())
    }

    /// Has a bucket's parameters from all ranks.
    pub fn gathered(&mut self, bucket: usize) -> Result<(), DeviceCollectiveError> {
        match self.buckets[bucket].gathering.take() {
            Some(pending) => self.collective.wait(pending),
            None => Ok(()),
        }
    }

    /// Has the parameters of all buckets.
    pub fn all_gathered(&mut self) -> Result<(), DeviceCollectiveError> {
        (0..self.buckets.len()).try_for_each(|bucket| self.gathered(bucket))
    }

    /// [`DeviceCollective::stalled`].
    pub fn stalled(&mut self) -> Result<Duration, DeviceCollectiveError> {
        self.collective.stalled()
    }

    /// [`DeviceCollective::finish`].
    pub fn finish(self) -> Result<(), DeviceCollectiveError> {
        self.collective.finish()
    }
}
