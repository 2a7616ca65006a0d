//! One rank's copy of everything that training changes, or its part of it.
//!
//! The model computes on views of flat parameters and adds its gradients to views of a flat fp32 gradient: every rank has
//! both whole. Optimizer state is flat too, but holds only the rank's [`Part`] of every bucket. Beside fp32 parameters
//! there are no masters: they are the masters.

use std::ops::Range;

use supra_agent::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

use super::{Layout, Part, fingerprint::fingerprint};
use crate::{
    collective::{DeviceCollective, DeviceCollectiveError, Operation},
    kernels::Shard,
    model::Params,
};

/// What training keeps, in fp32, of every parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// The parameters themselves.
    Masters,
    /// First moments of their gradients.
    ExpAvg,
    /// Second moments.
    ExpAvgSq,
}

impl Section {
    /// All of them.
    pub const ALL: [Section; 3] = [Section::Masters, Section::ExpAvg, Section::ExpAvgSq];
}

/// Parameters, gradient and optimizer state of one rank.
pub struct Replica {
    layout: Layout,
    part: Part,
    /// What the model computes on: compute kind, flat, everything.
    pub parameters: Tensor,
    /// Sum of the gradients of the step in hand: fp32, flat, everything.
    pub gradient: Tensor,
    /// fp32 masters of rounded parameters: flat, of the part.
    masters: Option<Tensor>,
    /// First moment of the gradient: fp32, flat, of the part.
    pub exp_avg: Tensor,
    /// Second moment of the gradient: fp32, flat, of the part.
    pub exp_avg_sq: Tensor,
    /// Updates applied so far: AdamW's step counter. A skipped step does not count.
    pub updates: u64,
    params: Params,
    gradients: Params,
}

impl Replica {
    /// A replica of zeros, to be [`load`](Replica::load)ed. `part` is what this rank keeps of the optimizer's state;
    /// `precision` is what the model computes in.
    pub fn new(layout: Layout, part: Part, precision: Kind, device: Device) -> Replica {
        let whole = |kind| Tensor::zeros([layout.elements()], (kind, device));
        let own = || Tensor::zeros([part.elements(&layout)], (Kind::Float, device));
        let (parameters, gradient) = (whole(precision), whole(Kind::Float));
        Replica {
            params: layout.views(&parameters),
            gradients: layout.views(&gradient),
            parameters,
            gradient,
            masters: (precision != Kind::Float).then(own),
            exp_avg: own(),
            exp_avg_sq: own(),
            updates: 0,
            part,
            layout,
        }
    }

    /// Where each parameter lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What this rank keeps of the optimizer's state.
    pub fn part(&self) -> Part {
        self.part
    }

    /// What the model computes with.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Where the model adds the gradient of each parameter: views of [`gradient`](Replica::gradient).
    pub fn gradients(&self) -> &Params {
        &self.gradients
    }

    /// Takes the fp32 numbers of a parameter, or of a piece of it, for the elements of a flat buffer from `offset` on. What
    /// other ranks keep is dropped, so one parameter at a time is all that is there twice.
    pub fn load(&mut self, section: Section, offset: i64, numbers: &Tensor) {
        let values = numbers.view([-1]).to_device(self.parameters.device());
        let range = offset..offset + values.size()[0];
        let whole = narrow(&self.parameters, &range);
        let (own, at) = self.layout.overlap(self.part, range.clone());
        let kept = match section {
            Section::Masters => {
                { whole }.copy_(&values);
                self.masters.as_ref()
            }
            Section::ExpAvg => Some(&self.exp_avg),
            Section::ExpAvgSq => Some(&self.exp_avg_sq),
        };
        let length = own.end - own.start;
        if let Some(kept) = kept.filter(|_| length > 0) {
            kept.narrow(0, at, length)
                .copy_(&values.narrow(0, own.start - range.start, length));
        }
    }

    /// All numbers of a section, fp32, flat. Where ranks keep parts, all of them have to call it, and it takes the place of
    /// the gradient.
    pub fn whole(
        &mut self,
        section: Section,
        collective: &mut dyn DeviceCollective,
    ) -> Result<Tensor, DeviceCollectiveError> {
        let kept = match section {
            Section::Masters => match &self.masters {
                None => return Ok(self.parameters.shallow_clone()),
                Some(masters) => masters,
            },
            Section::ExpAvg => &self.exp_avg,
            Section::ExpAvgSq => &self.exp_avg_sq,
        };
        if self.part == Part::WHOLE {
            return Ok(kept.shallow_clone());
        }
        let mut last = None;
        for bucket in self.layout.buckets() {
            let piece = self.part.piece(bucket);
            piece.of_all(&self.gradient).copy_(&piece.of_part(kept));
            last = Some(collective.start(Operation::AllGather, &bucket.view(&self.gradient))?);
        }
        // They end in order.
        last.map_or(Ok(()), |last| collective.wait(last))?;
        Ok(self.gradient.shallow_clone())
    }

    /// Forgets the gradient: a new step begins.
    pub fn zero_gradient(&mut self) {
        let _ = self.gradient.zero_();
    }

    /// What `part` has of the gradient, bucket by bucket.
    pub fn gradient_of(&self, part: Part) -> Vec<Tensor> {
        part.pieces(&self.layout)
            .map(|piece| piece.of_all(&self.gradient))
            .collect()
    }

    /// Hands what an update reads and changes of a bucket to `update`.
    pub fn update(&mut self, bucket: usize, update: impl FnOnce(Shard<'_>)) {
        let piece = self.part.piece(&self.layout.buckets()[bucket]);
        let mut parameters = piece.of_all(&self.parameters);
        let mut masters = self.masters.as_ref().map(|masters| piece.of_part(masters));
        let (master_m, compute_m) = match &mut masters {
            Some(masters) => (masters, Some(&mut parameters)),
            None => (&mut parameters, None),
        };
        update(Shard {
            master_m,
            gradient_m: &piece.of_all(&self.gradient),
            exp_avg_m: &mut piece.of_part(&self.exp_avg),
            exp_avg_sq_m: &mut piece.of_part(&self.exp_avg_sq),
            compute_m,
            decayed: piece.decayed,
        });
    }

    /// A hash of parameters, optimizer state and the number of updates: equal on two ranks, and on ranks that keep other
    /// parts, exactly when they will go on alike. Where ranks keep parts, all of them have to call it.
    pub fn hash(&self, host: &mut dyn Collective) -> Result<[u8; 32], CollectiveError> {
        let whole = Part::WHOLE.pieces(&self.layout);
        let parameters = whole.fold(0u64, |sum, piece| {
            sum.wrapping_add(fingerprint(&piece.of_all(&self.parameters), piece.index))
        });
        let sections = [
            self.masters.as_ref(),
            Some(&self.exp_avg),
            Some(&self.exp_avg_sq),
        ];
        let state = sections.map(|section| {
            section.map_or(0, |flat| {
                self.part.pieces(&self.layout).fold(0u64, |sum, piece| {
                    sum.wrapping_add(fingerprint(&piece.of_part(flat), piece.index))
                })
            })
        });
        let mut hasher = blake3::Hasher::new();
        hasher.update(&parameters.to_le_bytes());
        hasher.update(bytemuck::cast_slice(&self.of_all_parts(state, host)?));
        hasher.update(&self.updates.to_le_bytes());
        Ok(*hasher.finalize().as_bytes())
    }

    /// Adds the fingerprints of the ranks' parts, where they keep parts.
    fn of_all_parts<const N: usize>(
        &self,
        mine: [u64; N],
        host: &mut dyn Collective,
    ) -> Result<[u64; N], CollectiveError> {
        if self.part == Part::WHOLE {
            return Ok(mine);
        }
        let mut sums = [0u64; N];
        for (bytes, rank) in host
            .all_gather(bytemuck::cast_slice(&mine))?
            .iter()
            .zip(0..)
        {
            if bytes.len() != size_of_val(&mine) {
                return Err(CollectiveError::Peer {
                    rank,
                    address: "in this generation".to_owned(),
                    cause: format!(
                        "sent fingerprints of {} bytes where {} were due",
                        bytes.len(),
                        size_of_val(&mine)
                    ),
                });
            }
            // Bytes that came from elsewhere need not be aligned.
            let theirs: Vec<u64> = bytemuck::pod_collect_to_vec(bytes);
            for (sum, theirs) in sums.iter_mut().zip(theirs) {
                *sum = sum.wrapping_add(theirs);
            }
        }
        Ok(sums)
    }
}

fn narrow(flat: &Tensor, range: &Range<i64>) -> Tensor {
    flat.narrow(0, range.start, range.end - range.start)
}

#[cfg(test)]
mod tests {
    use supra_agent::collective::Solo;

    use super::*;
    use crate::model::ParamSpec;

    fn replica(precision: Kind, part: Part) -> Replica {
        let spec = |name: &str, shape: &[i64]| ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            decayed: true,
            new: false,
        };
        let specs = [spec("a", &[20, 10]), spec("layers.0.unused", &[3])];
        let layout = Layout::new(&specs, false, 2);
        let mut replica = Replica::new(layout.clone(), part, precision, Device::Cpu);
        for (slot, section) in layout
            .slots()
            .iter()
            .flat_map(|slot| Section::ALL.map(|section| (slot, section)))
        {
            let numbers = Tensor::arange(slot.elements, (Kind::Float, Device::Cpu));
            let numbers = numbers * 1.001 + slot.offset + section as i64;
            replica.load(section, slot.offset, &numbers.view(slot.shape.as_slice()));
        }
        replica
    }

    fn hash(replica: &Replica) -> [u8; 32] {
        replica.hash(&mut Solo).unwrap()
    }

    #[test]
    fn gradients_of_parameters_are_parts_of_the_flat_one() {
        let mut replica = replica(Kind::Float, Part::WHOLE);
        let _ = replica.gradients().get("a").shallow_clone().fill_(2.0);
        let sum = |replica: &Replica| replica.gradient.sum(Kind::Float).double_value(&[]);
        assert_eq!(sum(&replica), 400.0);
        replica.zero_gradient();
        assert_eq!(sum(&replica), 0.0);
    }

    #[test]
    fn a_part_holds_the_numbers_that_the_whole_has_there() {
        for precision in [Kind::Float, Kind::BFloat16] {
            let whole = replica(precision, Part::WHOLE);
            for index in 0..2 {
                let part = Part { index, of: 2 };
                let own = replica(precision, part);
                assert_eq!(
                    own.parameters, whole.parameters,
                    "everybody computes on all"
                );
                for (mine, all) in part
                    .pieces(own.layout())
                    .zip(Part::WHOLE.pieces(own.layout()))
                {
                    let skip = mine.index - all.index;
                    for (own, whole) in [
                        (Some(&own.exp_avg), Some(&whole.exp_avg)),
                        (Some(&own.exp_avg_sq), Some(&whole.exp_avg_sq)),
                        (own.masters.as_ref(), whole.masters.as_ref()),
                    ] {
                        let (Some(own), Some(whole)) = (own, whole) else {
                            continue;
                        };
                        let there = all.of_part(whole).slice(0, skip, skip + mine.length, 1);
                        assert_eq!(mine.of_part(own), there, "{precision:?} {part:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_hash_sees_every_part_of_the_state_and_no_padding() {
        let mut replica = replica(Kind::BFloat16, Part::WHOLE);
        let mut seen = vec![hash(&replica)];
        let change = |flat: &Tensor, at| drop(flat.narrow(0, at, 1).fill_(9.0e4));
        change(&replica.parameters, 199);
        seen.push(hash(&replica));
        change(replica.masters.as_ref().unwrap(), 258);
        seen.push(hash(&replica));
        change(&replica.exp_avg, 0);
        seen.push(hash(&replica));
        change(&replica.exp_avg_sq, 3);
        seen.push(hash(&replica));
        replica.updates += 1;
        seen.push(hash(&replica));
        let _ = replica.gradient.fill_(1.0);
        change(&replica.exp_avg, 200);
        assert_eq!(
            hash(&replica),
            seen[5],
            "neither gradient nor padding is state"
        );
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 6);
    }
}
