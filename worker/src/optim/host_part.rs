//! A part of a replica's state in host memory, where it outlives whatever happens to the device or to another rank.

use supra_agent::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

use super::{Layout, Numbers, Part, Replica, handover};
use crate::collective::{DeviceCollective, DeviceCollectiveError};

/// Elements that are hashed and passed on at once: 32 MiB of fp32.
const PIECE: i64 = 8 << 20;

/// Bytes of what is said about a part before its numbers.
const HEADER: usize = 32;

/// BLAKE3.
pub type Hash = [u8; 32];

/// Masters, moments and counters of a part, behind one step. Of bf16 parameters masters are the parameters and their
/// remainders.
pub struct HostPart {
    part: Part,
    counters: Counters,
    /// As in the replica, flat, of the part alone: parameters, remainders if there are any, and both moments.
    flats: Vec<Tensor>,
}

/// [`Replica::updates`] and [`Replica::skipped`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    updates: u64,
    skipped: u32,
}

/// What a part of a state takes in host memory. Another thread may allocate it.
#[derive(Clone, Debug)]
pub struct HostRoom {
    part: Part,
    elements: i64,
    kinds: Vec<Kind>,
    device: Device,
}

impl HostRoom {
    /// For a part of a state like that of `replica`.
    pub fn of(replica: &Replica, part: Part) -> HostRoom {
        HostRoom {
            part,
            elements: part.elements(&replica.layout),
            kinds: replica.flats().map(|(flat, _)| flat.kind()).collect(),
            device: replica.parameters.device(),
        }
    }

    /// Whether a part has exactly this room.
    pub fn fits(&self, part: &HostPart) -> bool {
        let kinds = part.flats.iter().map(Tensor::kind);
        self.part.of == part.part.of
            && self.kinds.iter().copied().eq(kinds)
            && part.flats.iter().all(|flat| flat.size() == [self.elements])
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        let element = self.kinds.iter().map(|kind| kind.elt_size_in_bytes());
        element.sum::<usize>() as u64 * self.elements as u64
    }

    /// A part that holds nothing yet. Beside a GPU it is pinned, so that copies go at full speed.
    pub fn allocate(&self) -> HostPart {
        let room = |kind: &Kind| {
            let options = (*kind, Device::Cpu);
            match self.device {
                Device::Cpu => Tensor::zeros([self.elements], options),
                // What is pinned is a copy. Of memory that nobody has touched it takes neither memory nor time.
                device => Tensor::empty([self.elements], options).pin_memory(device),
            }
        };
        HostPart {
            part: self.part,
            counters: Counters::default(),
            flats: self.kinds.iter().map(room).collect(),
        }
    }
}

impl HostPart {
    /// From 0.
    pub fn index(&self) -> u32 {
        self.part.index as u32
    }

    /// Takes a part that this rank has of a state that no update works on. Returns when it is here.
    pub fn copy_from(&mut self, replica: &Replica, part: Part) {
        self.part = part;
        self.counters = Counters {
            updates: replica.updates,
            skipped: replica.skipped,
        };
        for (room, (flat, there)) in self.flats.iter().zip(replica.flats()) {
            if there == part {
                room.shallow_clone().copy_(flat);
                continue;
            }
            // Of this every rank has all.
            for piece in part.pieces(&replica.layout) {
                piece.of_part(room).copy_(&piece.of_all(flat));
            }
        }
    }

    /// What is here.
    pub fn numbers(&self) -> Numbers {
        Numbers::new(self.part, self.flats.iter().map(|flat| (flat, self.part)))
    }

    /// Passes this part to the next rank, and takes that of the rank before, which has the same room. Returns the hashes of
    /// this part and of that one.
    ///
    /// # Errors
    ///
    /// The collective's own, and that what came is not what was sent. `kept` is then of no use.
    pub fn pass(
        &self,
        kept: &mut HostPart,
        collective: &mut dyn Collective,
    ) -> Result<(Hash, Hash), CollectiveError> {
        let mut header = [0; HEADER];
        collective.pass(&self.header(), &mut header)?;
        kept.take_header(&header);
        let (mut own, mut other) = (hasher(&self.header()), hasher(&header));
        let (mut outgoing, mut incoming) = (Vec::new(), Vec::new());
        for (mine, theirs) in self.pieces().zip(kept.pieces()) {
            read(&mine, &mut outgoing);
            incoming.resize(outgoing.len(), 0);
            collective.pass(&outgoing, &mut incoming)?;
            own.update(&outgoing);
            other.update(&incoming);
            write(&theirs, &incoming);
        }
        let (own, other) = (own.finalize(), other.finalize());
        let mut sent = Hash::default();
        collective.pass(own.as_bytes(), &mut sent)?;
        if other != sent {
            let (rank, world) = (collective.rank(), collective.world());
            return Err(CollectiveError::Peer {
                rank: (rank + world - 1) % world,
                address: "on the ring of snapshots".to_owned(),
                cause: "the part that it sent came with another hash".to_owned(),
            });
        }
        Ok((own.into(), other.into()))
    }

    /// Of everything that is here.
    pub fn hash(&self) -> Hash {
        let mut hasher = hasher(&self.header());
        let mut bytes = Vec::new();
        for piece in self.pieces() {
            read(&piece, &mut bytes);
            hasher.update(&bytes);
        }
        hasher.finalize().into()
    }

    /// Views of all numbers, in order.
    fn pieces(&self) -> impl Iterator<Item = Tensor> {
        self.flats.iter().flat_map(|flat| {
            let elements = flat.size()[0];
            let starts = (0..elements).step_by(PIECE as usize);
            starts.map(move |start| flat.narrow(0, start, PIECE.min(elements - start)))
        })
    }

    fn header(&self) -> [u8; HEADER] {
        let numbers = [
            self.part.index as u64,
            self.part.of as u64,
            self.counters.updates,
            u64::from(self.counters.skipped),
        ];
        let mut header = [0; HEADER];
        for (bytes, number) in header.chunks_exact_mut(8).zip(numbers) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        header
    }

    fn take_header(&mut self, header: &[u8; HEADER]) {
        let mut numbers = header.chunks_exact(8).map(|bytes| {
            let bytes = bytes.try_into();
            u64::from_le_bytes(bytes.expect("invariant: eight bytes"))
        });
        let mut next = || numbers.next().unwrap_or_default();
        self.part = Part {
            index: next() as i64,
            of: next() as i64,
        };
        self.counters = Counters {
            updates: next(),
            skipped: next() as u32,
        };
    }
}

impl Replica {
    /// Takes a state that is in parts: part `i`, in the layout `before`, from rank `holders[i]`, to which `held` gives it. All
    /// ranks of `collective` call this; each keeps what its own part has of the state, in its own layout.
    ///
    /// # Errors
    ///
    /// The collective's own. This replica is then of no use.
    pub fn take_parts<'a>(
        &mut self,
        before: &Layout,
        holders: &[u32],
        held: impl Fn(u32) -> Option<&'a HostPart>,
        collective: &mut dyn DeviceCollective,
    ) -> Result<(), DeviceCollectiveError> {
        let of = holders.len() as i64;
        for (&root, index) in holders.iter().zip(0..) {
            let part = Part { index, of };
            let mine = held(index as u32).filter(|_| collective.host().rank() == root);
            self.take_part(before, part, root, mine, collective)?;
            let counters = mine.map_or(Counters::default(), |mine| mine.counters);
            let mut bytes = handover::counters(counters.updates, counters.skipped).to_vec();
            collective.host().broadcast(root, &mut bytes)?;
            (self.updates, self.skipped) = handover::from_counters(root, &bytes)?;
        }
        Ok(())
    }

    fn take_part(
        &mut self,
        before: &Layout,
        part: Part,
        root: u32,
        mine: Option<&HostPart>,
        collective: &mut dyn DeviceCollective,
    ) -> Result<(), DeviceCollectiveError> {
        for (there, here) in before.buckets().iter().zip(self.layout.buckets()) {
            let piece = part.piece(there);
            for first in (0..piece.length).step_by(PIECE as usize) {
                let length = PIECE.min(piece.length - first);
                let offset = here.start + piece.index - there.index + first;
                for (place, (flat, own)) in self.flats().enumerate() {
                    let numbers = match mine {
                        Some(mine) => mine.flats[place]
                            .narrow(0, piece.own + first, length)
                            .to_device(flat.device()),
                        None => Tensor::empty([length], (flat.kind(), flat.device())),
                    };
                    handover::broadcast(root, &numbers, collective)?;
                    self.keep(own, flat, offset, &numbers);
                }
            }
        }
        Ok(())
    }
}

fn hasher(header: &[u8; HEADER]) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher
}

/// Copies the bytes of a tensor in host memory.
fn read(flat: &Tensor, bytes: &mut Vec<u8>) {
    bytes.resize(flat.numel() * flat.kind().elt_size_in_bytes(), 0);
    flat.copy_data_u8(bytes, flat.numel());
}

fn write(flat: &Tensor, bytes: &[u8]) {
    let values = Tensor::from_data_size(bytes, &flat.size(), flat.kind());
    flat.shallow_clone().copy_(&values);
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::{
        collective::Host,
        kernels::Twin,
        model::ParamSpec,
        optim::{Kinds, Section},
    };
    use proptest::prelude::*;
    use supra_agent::collective::InProcess;

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

    /// What one of `world` ranks has of a state that does not depend on their number.
    fn replica(sizes: &[i64], rank: u32, world: u32, kind: Kind) -> Replica {
        let kinds = Kinds {
            parameters: kind,
            moments: kind,
        };
        let part = Part::of_rank(rank, world);
        let mut replica = Replica::new(layout(sizes, world), part, kinds, Device::Cpu);
        for slot in replica.layout().slots().to_vec() {
            for section in Section::ALL {
                let numbers = Tensor::arange(slot.elements, (Kind::Float, Device::Cpu));
                let seed = slot.name.bytes().map(f64::from).sum::<f64>() + section as i64 as f64;
                replica.load(section, slot.offset, &((numbers + seed) * 12.9898).sin());
            }
        }
        (replica.updates, replica.skipped) = (7, 2);
        replica
    }

    /// What each rank makes of its collective.
    fn ranks<T: Send>(world: u32, work: impl Fn(u32, InProcess) -> T + Sync) -> Vec<T> {
        let work = &work;
        thread::scope(|scope| {
            let threads: Vec<_> = InProcess::group(world)
                .into_iter()
                .zip(0..)
                .map(|(group, rank)| scope.spawn(move || work(rank, group)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        })
    }

    /// Each rank's own part and its neighbour's, with their hashes.
    fn snapshot(sizes: &[i64], world: u32, kind: Kind) -> Vec<[(HostPart, Hash); 2]> {
        ranks(world, |rank, mut group| {
            let replica = replica(sizes, rank, world, kind);
            let part = replica.part();
            let mut own = HostRoom::of(&replica, part).allocate();
            let mut kept = HostRoom::of(&replica, part).allocate();
            assert!(HostRoom::of(&replica, part).fits(&own));
            own.copy_from(&replica, part);
            let (hash, other) = own.pass(&mut kept, &mut group).unwrap();
            [(own, hash), (kept, other)]
        })
    }

    #[test]
    fn a_neighbour_has_the_same_part_and_hash() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let parts = snapshot(&[200, 7, 90], 3, kind);
            for (rank, [(own, hash), _]) in parts.iter().enumerate() {
                let [_, (kept, other)] = &parts[(rank + 1) % 3];
                assert_eq!((own.index(), kept.index()), (rank as u32, rank as u32));
                assert_eq!((hash, &own.hash()), (other, &kept.hash()));
                assert_eq!(hash, &own.hash());
            }
            let hashes: Vec<Hash> = parts.iter().map(|[(_, hash), _]| *hash).collect();
            assert!(hashes[0] != hashes[1] && hashes[1] != hashes[2]);
        }
    }

    #[test]
    fn a_bit_more_anywhere_is_another_hash() {
        let [(part, hash), _] = snapshot(&[200], 2, Kind::BFloat16).remove(0);
        for flat in &part.flats {
            let before = flat.copy();
            let _ = flat.narrow(0, 3, 1).fill_(5);
            assert_ne!(part.hash(), hash);
            flat.shallow_clone().copy_(&before);
        }
        assert_eq!(part.hash(), hash);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn parts_become_the_whole_state_in_every_layout_whoever_holds_them(
            sizes in prop::collection::vec(3..700i64, 2..5),
            (before, world) in (2..5u32, 1..5u32),
            holders in prop::collection::vec(0..4u32, 4),
            divided in any::<bool>(),
        ) {
            for kind in [Kind::Float, Kind::BFloat16] {
                let mut parts = Vec::new();
                for [(own, _), _] in snapshot(&sizes, before, kind) {
                    parts.push(own);
                }
                let roots: Vec<u32> = holders[..before as usize].iter().map(|rank| rank % world).collect();
                let (sizes, roots) = (&sizes, &roots);
                // Each rank gets the parts that it holds.
                let mut each: Vec<Vec<HostPart>> = (0..world).map(|_| Vec::new()).collect();
                for (part, root) in parts.into_iter().zip(roots) {
                    each[*root as usize].push(part);
                }
                let each: Vec<_> = each.into_iter().map(std::sync::Mutex::new).collect();
                let hashes = ranks(world, |rank, group| {
                    let mine = std::mem::take(&mut *each[rank as usize].lock().unwrap());
                    let mut host = Host::new(Box::new(group));
                    let part = if divided { Part::of_rank(rank, world) } else { Part::WHOLE };
                    let kinds = Kinds { parameters: kind, moments: kind };
                    let mut replica = Replica::new(layout(sizes, world), part, kinds, Device::Cpu);
                    let held = |index| mine.iter().find(|part| part.index() == index);
                    replica.take_parts(&layout(sizes, before), roots, held, &mut host).unwrap();
                    assert_eq!((replica.updates, replica.skipped), (7, 2));
                    replica.hash(&Twin, host.host()).unwrap()
                });
                let expected = ranks(world, |rank, group| {
                    let mut host = Host::new(Box::new(group));
                    replica(sizes, rank, world, kind).hash(&Twin, host.host()).unwrap()
                });
                for found in hashes {
                    prop_assert_eq!(found, expected[0]);
                }
            }
        }
    }
}
