//! One rank's copy of everything that training changes, or its part of it.
//!
//! The model computes on views of flat parameters and adds its gradients to views of a flat fp32 gradient: every rank has
//! both whole. Optimizer state is flat too, but holds only the rank's [`Part`] of every bucket. In fp32 the parameters are
//! the masters; in bf16 they are the masters' upper halves, and a remainder of 16 bits each is the rest.

use supra_agent::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

use super::{Layout, Part};
use crate::{
    collective::{DeviceCollective, DeviceCollectiveError, Operation},
    kernels::{Kernels, Shard, twin},
    model::Params,
};

/// Key of the fingerprints that are in the replica's hash.
const KEY: u64 = 0;

/// Kinds of the numbers that a replica keeps, each fp32 or bf16. Masters and gradient are fp32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    /// What the model computes in.
    pub parameters: Kind,
    /// Both moments'.
    pub moments: Kind,
}

/// What training keeps of every parameter.
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

/// What tells replicas apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prints {
    /// BLAKE3 over fingerprints of all parameters and of the optimizer's state, and the number of updates.
    pub whole: [u8; 32],
    /// For each bucket the first 8 bytes, little-endian, of BLAKE3 over the fingerprints of its parameters and state.
    pub buckets: Vec<u64>,
}

/// Numbers of a fingerprint, and of those of what a replica keeps of a bucket beside its parameters: remainder and moments.
const PRINT: usize = 4;
const STATE: usize = 3 * PRINT;

/// Parameters, gradient and optimizer state of one rank.
pub struct Replica {
    pub(super) layout: Layout,
    pub(super) part: Part,
    /// What the model computes on: compute kind, flat, everything.
    pub parameters: Tensor,
    /// Sum of the gradients of the step in hand: fp32, flat, everything.
    pub gradient: Tensor,
    /// What masters have beyond bf16 parameters: i16, flat, of the part.
    pub remainder: Option<Tensor>,
    /// First moment of the gradient: flat, of the part.
    pub exp_avg: Tensor,
    /// Second moment of the gradient: flat, of the part.
    pub exp_avg_sq: Tensor,
    /// Updates applied so far: AdamW's step counter. A skipped step does not count.
    pub updates: u64,
    /// Skipped steps in a row up to now. Neither checkpoints nor the hash have it.
    pub skipped: u32,
    pub(super) params: Params,
    pub(super) gradients: Params,
}

impl Replica {
    /// A replica of zeros, to be [`load`](Replica::load)ed. `part` is what this rank keeps of the optimizer's state.
    pub fn new(layout: Layout, part: Part, kinds: Kinds, device: Device) -> Replica {
        let whole = |kind| Tensor::zeros([layout.elements()], (kind, device));
        let own = |kind| Tensor::zeros([part.elements(&layout)], (kind, device));
        let (parameters, gradient) = (whole(kinds.parameters), whole(Kind::Float));
        Replica {
            params: layout.views(&parameters),
            gradients: layout.views(&gradient),
            parameters,
            gradient,
            remainder: (kinds.parameters != Kind::Float).then(|| own(Kind::Int16)),
            exp_avg: own(kinds.moments),
            exp_avg_sq: own(kinds.moments),
            updates: 0,
            skipped: 0,
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
        let length = values.size()[0];
        match section {
            Section::Masters => {
                let mut parameters = self.parameters.narrow(0, offset, length);
                if let Some(remainder) = &self.remainder {
                    let lower = Tensor::zeros([length], (Kind::Int16, values.device()));
                    twin::split(&values, &parameters, &lower);
                    self.keep(self.part, remainder, offset, &lower);
                } else {
                    parameters.copy_(&values);
                }
            }
            Section::ExpAvg => self.keep(self.part, &self.exp_avg, offset, &values),
            Section::ExpAvgSq => self.keep(self.part, &self.exp_avg_sq, offset, &values),
        }
    }

    /// Copies to `own`, a flat buffer of `part`, what the part has of the elements of a flat buffer from `offset` on.
    pub(super) fn keep(&self, part: Part, own: &Tensor, offset: i64, values: &Tensor) {
        let range = offset..offset + values.size()[0];
        let (overlap, at) = self.layout.overlap(part, range);
        if !overlap.is_empty() {
            let length = overlap.end - overlap.start;
            own.narrow(0, at, length)
                .copy_(&values.narrow(0, overlap.start - offset, length));
        }
    }

    /// Has the parameters of all ranks, each of which has its part. Where ranks keep parts, all of them have to call it.
    ///
    /// # Errors
    ///
    /// The collective's own.
    pub fn gather_parameters(
        &self,
        collective: &mut dyn DeviceCollective,
    ) -> Result<(), DeviceCollectiveError> {
        if self.part == Part::WHOLE {
            return Ok(());
        }
        let mut last = None;
        for bucket in self.layout.buckets() {
            let parameters = bucket.view(&self.parameters);
            last = Some(collective.start(Operation::AllGather, &parameters)?);
        }
        // They end in order.
        last.map_or(Ok(()), |last| collective.wait(last))
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
        let mut remainder = self.remainder.as_ref().map(|flat| piece.of_part(flat));
        update(Shard {
            param_m: &mut piece.of_all(&self.parameters),
            remainder_m: remainder.as_mut(),
            gradient_m: &piece.of_all(&self.gradient),
            exp_avg_m: &mut piece.of_part(&self.exp_avg),
            exp_avg_sq_m: &mut piece.of_part(&self.exp_avg_sq),
            decayed: piece.decayed,
            first: piece.index,
        });
    }

    /// [`Prints::whole`] of this replica: equal on two ranks, whichever parts they keep, exactly when they will go on alike.
    /// Where ranks keep parts, all of them have to call it.
    pub fn hash(
        &self,
        kernels: &dyn Kernels,
        host: &mut dyn Collective,
    ) -> Result<[u8; 32], DeviceCollectiveError> {
        Ok(self.prints(kernels, host)?.whole)
    }

    /// What tells this replica apart, as a whole and bucket by bucket. Where ranks keep parts, all of them have to call it.
    pub fn prints(
        &self,
        kernels: &dyn Kernels,
        host: &mut dyn Collective,
    ) -> Result<Prints, DeviceCollectiveError> {
        let buckets = self.layout.buckets();
        let state = [
            self.remainder.as_ref(),
            Some(&self.exp_avg),
            Some(&self.exp_avg_sq),
        ];
        // Of the state, bucket by bucket; a section that is not there has fingerprints of zero.
        let mut own = Vec::with_capacity(buckets.len() * STATE);
        for piece in self.part.pieces(&self.layout) {
            for flat in state {
                let print = match flat {
                    Some(flat) => kernels.fingerprint(&piece.of_part(flat), piece.index, KEY)?,
                    None => [0; PRINT],
                };
                own.extend(print);
            }
        }
        if self.part != Part::WHOLE {
            own = sum_over_ranks(&own, host)?;
        }
        let mut sum = [0; PRINT + STATE];
        let mut short = Vec::with_capacity(buckets.len());
        let whole = Part::WHOLE.pieces(&self.layout);
        for (piece, own) in whole.zip(own.chunks_exact(STATE)) {
            let mut prints = [0; PRINT + STATE];
            let flat = piece.of_all(&self.parameters);
            prints[..PRINT].copy_from_slice(&kernels.fingerprint(&flat, piece.index, KEY)?);
            prints[PRINT..].copy_from_slice(own);
            add(&mut sum, &prints);
            let hash = hash_of(&prints);
            let head = hash.first_chunk().expect("invariant: a hash is longer");
            short.push(u64::from_le_bytes(*head));
        }
        Ok(Prints {
            whole: hash_of(sum.iter().chain([&self.updates])),
            buckets: short,
        })
    }
}

/// BLAKE3 of numbers, little-endian.
fn hash_of<'a>(numbers: impl IntoIterator<Item = &'a u64>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for number in numbers {
        hasher.update(&number.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

fn add(sum: &mut [u64], more: &[u64]) {
    for (sum, more) in sum.iter_mut().zip(more) {
        *sum = sum.wrapping_add(*more);
    }
}

/// The sum of as many numbers of every rank.
fn sum_over_ranks(mine: &[u64], host: &mut dyn Collective) -> Result<Vec<u64>, CollectiveError> {
    let mut sums = vec![0; mine.len()];
    let all = host.all_gather(bytemuck::cast_slice(mine))?;
    for (bytes, rank) in all.iter().zip(0..) {
        if bytes.len() != size_of_val(mine) {
            return Err(CollectiveError::Peer {
                rank,
                address: "in this generation".to_owned(),
                cause: format!(
                    "sent fingerprints of {} bytes where {} were due",
                    bytes.len(),
                    size_of_val(mine)
                ),
            });
        }
        // Bytes that came from elsewhere need not be aligned.
        add(&mut sums, &bytemuck::pod_collect_to_vec(bytes));
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use supra_agent::collective::Solo;

    use super::*;
    use crate::{model::ParamSpec, optim::Run};

    fn replica(kind: Kind, part: Part) -> Replica {
        let kinds = Kinds {
            parameters: kind,
            moments: kind,
        };
        let spec = |name: &str, shape: &[i64]| ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            decayed: true,
            new: false,
        };
        let specs = [spec("a", &[20, 10]), spec("layers.0.unused", &[3])];
        let layout = Layout::new(&specs, false, 2);
        let mut replica = Replica::new(layout.clone(), part, kinds, Device::Cpu);
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
        replica.hash(&twin::Twin, &mut Solo).unwrap()
    }

    #[test]
    fn bf16_parameters_and_the_remainder_are_the_masters() {
        let replica = replica(Kind::BFloat16, Part::WHOLE);
        let (numbers, mut bytes) = (replica.numbers(Part::WHOLE), Vec::new());
        let run = Run {
            all: 0,
            own: 0,
            length: 200,
        };
        numbers.read(Section::Masters, run, &mut bytes);
        let masters = Tensor::from_data_size(&bytes, &[200], Kind::Float);
        let expected = Tensor::arange(200, (Kind::Float, Device::Cpu)) * 1.001;
        assert_eq!(masters, expected);
        let rounded = expected.to_kind(Kind::BFloat16);
        assert_eq!(
            replica.parameters.narrow(0, 0, 200),
            rounded,
            "no ties here"
        );
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
                        (own.remainder.as_ref(), whole.remainder.as_ref()),
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
        let change = |flat: &Tensor, at| drop(flat.narrow(0, at, 1).fill_(77));
        change(&replica.parameters, 199);
        seen.push(hash(&replica));
        change(replica.remainder.as_ref().unwrap(), 258);
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

    #[test]
    fn a_flipped_bit_shows_in_the_print_of_its_bucket_alone_whoever_keeps_it() {
        for part in [Part::WHOLE, Part { index: 1, of: 2 }] {
            let replica = replica(Kind::BFloat16, part);
            let prints = || replica.prints(&twin::Twin, &mut Solo).unwrap();
            let before = prints();
            let flip = |flat: &Tensor, at: i64| {
                let mut number = flat.narrow(0, at, 1).view_dtype(Kind::Int16);
                let _ = number.bitwise_xor_tensor_(&Tensor::from(1i16));
            };
            assert_eq!((before.whole, before.buckets.len()), (hash(&replica), 2));
            let second = replica.layout().buckets()[1].start;
            flip(&replica.parameters, second);
            let after = prints();
            assert_ne!(after.whole, before.whole);
            assert_eq!(after.buckets[0], before.buckets[0]);
            assert_ne!(after.buckets[1], before.buckets[1]);
            flip(&replica.parameters, second);
            assert_eq!(prints(), before);
            flip(&replica.exp_avg, 0);
            let after = prints();
            assert_ne!(after.buckets[0], before.buckets[0]);
            assert_eq!(after.buckets[1], before.buckets[1]);
        }
    }
}
