//! A replica's way into the next generation: into that one's layout, and to ranks that do not have it.

use std::iter;

use supra_agent::CollectiveError;
use tch::{Kind, Tensor};

use super::{Layout, Part, Replica};
use crate::collective::{DeviceCollective, DeviceCollectiveError, Operation};

/// Elements that go from rank to rank at once: 32 MiB of fp32, which are in host memory twice.
const PIECE: i64 = 8 << 20;

impl Replica {
    /// The same state, which is whole here, in another layout of the same parameters, of which this rank keeps `part`. One
    /// flat tensor at a time is there twice, and no gradient meanwhile: where the replica had room, this has.
    pub fn into_layout(self, layout: Layout, part: Part) -> Replica {
        if self.layout == layout && self.part == part {
            return self;
        }
        let Replica {
            layout: before,
            parameters,
            gradient,
            remainder,
            exp_avg,
            exp_avg_sq,
            updates,
            skipped,
            params,
            gradients,
            ..
        } = self;
        let device = parameters.device();
        drop((params, gradient, gradients));
        let moved = |flat: Tensor, part: Part| {
            let there = Tensor::zeros([part.elements(&layout)], (flat.kind(), device));
            for (bucket, piece) in before.buckets().iter().zip(part.pieces(&layout)) {
                if piece.length > 0 {
                    let first = bucket.start + piece.index - bucket.index;
                    piece
                        .of_part(&there)
                        .copy_(&flat.narrow(0, first, piece.length));
                }
            }
            there
        };
        let parameters = moved(parameters, Part::WHOLE);
        let remainder = remainder.map(|flat| moved(flat, part));
        let exp_avg = moved(exp_avg, part);
        let exp_avg_sq = moved(exp_avg_sq, part);
        let gradient = Tensor::zeros([layout.elements()], (Kind::Float, device));
        Replica {
            params: layout.views(&parameters),
            gradients: layout.views(&gradient),
            parameters,
            gradient,
            remainder,
            exp_avg,
            exp_avg_sq,
            updates,
            skipped,
            part,
            layout,
        }
    }

    /// Takes part where rank `root` hands its state over: the state of this rank is whole and the same. Every rank of
    /// `collective` calls this or [`take_over`](Replica::take_over), whatever its layout.
    ///
    /// # Errors
    ///
    /// The collective's own. This replica is then still what it was.
    pub fn hand_over(
        &self,
        root: u32,
        collective: &mut dyn DeviceCollective,
    ) -> Result<(), DeviceCollectiveError> {
        let gives = collective.host().rank() == root;
        for (offset, length) in pieces(&self.layout) {
            for (flat, _) in self.flats() {
                let mine = flat.narrow(0, offset, length);
                // What breaks off leaves anything in the memory that it writes to.
                let piece = if gives { mine } else { mine.empty_like() };
                broadcast(root, &piece, collective)?;
            }
        }
        let mut counters = counters(self.updates, self.skipped).to_vec();
        Ok(collective.host().broadcast(root, &mut counters)?)
    }

    /// Takes the state of rank `root`: all of the parameters, this rank's part of the rest.
    ///
    /// # Errors
    ///
    /// The collective's own. This replica is then of no use.
    pub fn take_over(
        &mut self,
        root: u32,
        collective: &mut dyn DeviceCollective,
    ) -> Result<(), DeviceCollectiveError> {
        for (offset, length) in pieces(&self.layout) {
            for (flat, part) in self.flats() {
                let piece = Tensor::empty([length], (flat.kind(), flat.device()));
                broadcast(root, &piece, collective)?;
                self.keep(part, flat, offset, &piece);
            }
        }
        let mut bytes = Vec::new();
        collective.host().broadcast(root, &mut bytes)?;
        (self.updates, self.skipped) = from_counters(root, &bytes)?;
        Ok(())
    }

    /// All state, each flat tensor with the part of it that is here.
    pub(crate) fn flats(&self) -> impl Iterator<Item = (&Tensor, Part)> {
        let own = [
            self.remainder.as_ref(),
            Some(&self.exp_avg),
            Some(&self.exp_avg_sq),
        ];
        let own = own.into_iter().flatten().map(|flat| (flat, self.part));
        iter::once((&self.parameters, Part::WHOLE)).chain(own)
    }
}

/// All numbers, as offset and length in a flat tensor: as many and as long ones in every layout of the same parameters.
fn pieces(layout: &Layout) -> impl Iterator<Item = (i64, i64)> {
    layout.buckets().iter().flat_map(|bucket| {
        (0..bucket.numbers)
            .step_by(PIECE as usize)
            .map(|first| (bucket.start + first, PIECE.min(bucket.numbers - first)))
    })
}

/// The counters of a replica as they travel.
pub(super) fn counters(updates: u64, skipped: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&updates.to_le_bytes());
    bytes[8..].copy_from_slice(&skipped.to_le_bytes());
    bytes
}

/// Reads those that rank `root` sent.
pub(super) fn from_counters(root: u32, bytes: &[u8]) -> Result<(u64, u32), CollectiveError> {
    let split = bytes.split_first_chunk().and_then(|(updates, skipped)| {
        let skipped = u32::from_le_bytes(skipped.try_into().ok()?);
        Some((u64::from_le_bytes(*updates), skipped))
    });
    split.ok_or_else(|| CollectiveError::Peer {
        rank: root,
        address: "in this generation".to_owned(),
        cause: format!("sent counters of {} bytes where 12 were due", bytes.len()),
    })
}

/// Replaces `piece` by that of rank `root`, to the bit.
pub(super) fn broadcast(
    root: u32,
    piece: &Tensor,
    collective: &mut dyn DeviceCollective,
) -> Result<(), DeviceCollectiveError> {
    // Nobody computes with what is only carried.
    let carried = match piece.kind() {
        Kind::Int16 => piece.view_dtype(Kind::BFloat16),
        _ => piece.shallow_clone(),
    };
    let pending = collective.start(Operation::Broadcast { root }, &carried)?;
    // One at a time: a piece that waits takes room.
    collective.wait(pending)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;
    use supra_agent::collective::{InProcess, Solo};
    use tch::Device;

    use super::*;
    use crate::{
        collective::Host,
        kernels::Twin,
        model::ParamSpec,
        optim::{Kinds, Section},
    };

    /// A bucket for each size, the first half of it decayed.
    fn layout(sizes: &[i64], world: u32) -> Layout {
        let specs: Vec<ParamSpec> = sizes
            .iter()
            .enumerate()
            .map(|(block, &size)| ParamSpec {
                name: format!("layers.{block}.w"),
                shape: vec![size],
                decayed: block % 2 == 0,
                new: false,
            })
            .collect();
        Layout::new(&specs, false, world)
    }

    fn kinds(kind: Kind) -> Kinds {
        Kinds {
            parameters: kind,
            moments: kind,
        }
    }

    /// A whole replica with numbers everywhere.
    fn full(layout: Layout, kind: Kind) -> Replica {
        let mut replica = Replica::new(layout, Part::WHOLE, kinds(kind), Device::Cpu);
        for slot in replica.layout().slots().to_vec() {
            for section in Section::ALL {
                let numbers = Tensor::arange(slot.elements, (Kind::Float, Device::Cpu));
                // By name and section, so that they do not depend on the padding.
                let seed = slot.name.bytes().map(f64::from).sum::<f64>() + section as i64 as f64;
                replica.load(section, slot.offset, &((numbers + seed) * 12.9898).sin());
            }
        }
        (replica.updates, replica.skipped) = (7, 2);
        replica
    }

    fn hash(replica: &Replica) -> [u8; 32] {
        replica.hash(&Twin, &mut Solo).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn newcomers_and_holders_end_with_the_same_state_in_every_layout_and_part(
            sizes in prop::collection::vec(3..700i64, 2..5),
            (before, world) in (1..5u32, 2..5u32),
            root in 0..2u32,
            parts in any::<bool>(),
        ) {
            for kind in [Kind::Float, Kind::BFloat16] {
                let expected = hash(&full(layout(&sizes, before), kind));
                let sizes = &sizes;
                let hashes: Vec<[u8; 32]> = thread::scope(|scope| {
                    let ranks: Vec<_> = InProcess::group(world).into_iter().zip(0..).map(|(group, rank)| {
                        scope.spawn(move || {
                            let mut host = Host::new(Box::new(group));
                            let part = if parts { Part::of_rank(rank, world) } else { Part::WHOLE };
                            let here = layout(sizes, world);
                            // Two of them hold the state.
                            let replica = if rank < 2 {
                                let held = full(layout(sizes, before), kind);
                                held.hand_over(root, &mut host).unwrap();
                                held.into_layout(here, part)
                            } else {
                                let mut empty = Replica::new(here, part, kinds(kind), Device::Cpu);
                                empty.take_over(root, &mut host).unwrap();
                                empty
                            };
                            assert_eq!((replica.updates, replica.skipped), (7, 2));
                            replica.hash(&Twin, host.host()).unwrap()
                        })
                    }).collect();
                    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
                });
                for found in hashes {
                    prop_assert_eq!(found, expected);
                }
            }
        }
    }

    #[test]
    fn a_replica_in_another_layout_computes_on_its_own_parameters() {
        let sizes = [70, 5];
        let replica =
            full(layout(&sizes, 1), Kind::BFloat16).into_layout(layout(&sizes, 3), Part::WHOLE);
        let _ = replica.parameters.shallow_clone().fill_(2.0);
        let weight = replica.params().get("layers.1.w");
        assert_eq!(weight.to_kind(Kind::Float).double_value(&[4]), 2.0);
        let _ = replica
            .gradients()
            .get("layers.1.w")
            .shallow_clone()
            .fill_(1.0);
        assert_eq!(replica.gradient.sum(Kind::Float).double_value(&[]), 5.0);
    }
}
