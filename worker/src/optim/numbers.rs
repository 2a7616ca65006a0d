//! The numbers of one part of the state, wherever they lie, to and from bytes that are stored.

use tch::{Device, Kind, Tensor};

use super::{Part, Replica, Section, Staged};
use crate::kernels::twin;

/// Flat tensors that hold a part of the state, on the device or in host memory. Nothing may change them meanwhile.
pub struct Numbers {
    part: Part,
    /// Each with the part of the state that it is: the part, or everything.
    flats: Vec<(Tensor, Part)>,
}

/// Numbers that lie side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First of them in a flat tensor of everything.
    pub all: i64,
    /// First of them in a flat tensor of the part alone.
    pub own: i64,
    /// How many.
    pub length: i64,
}

impl Numbers {
    /// Those of `part` in flat tensors: parameters, remainders if there are any, and both moments.
    pub(super) fn new<'a>(part: Part, flats: impl Iterator<Item = (&'a Tensor, Part)>) -> Numbers {
        let flats = flats.map(|(flat, of)| (flat.shallow_clone(), of));
        Numbers {
            part,
            flats: flats.collect(),
        }
    }

    /// The same numbers for another thread: a tensor is one thread's.
    pub fn share(&self) -> Numbers {
        Numbers::new(self.part, self.flats.iter().map(|(flat, of)| (flat, *of)))
    }

    /// What a section is stored as: masters as fp32, moments as they are.
    pub fn kind(&self, section: Section) -> Kind {
        match section {
            Section::Masters => Kind::Float,
            Section::ExpAvg | Section::ExpAvgSq => self.moments(section).0.kind(),
        }
    }

    /// Puts the bytes of a run into `bytes`, little-endian, in the place of what is there.
    pub fn read(&self, section: Section, run: Run, bytes: &mut Vec<u8>) {
        match (section, &self.flats[..]) {
            (Section::Masters, [parameters, remainder, _, _]) => {
                let [mut upper, mut lower] = [Vec::new(), Vec::new()];
                copy(&self.of(parameters, run), &mut upper);
                copy(&self.of(remainder, run), &mut lower);
                join(&upper, &lower, bytes);
            }
            (Section::Masters, _) => copy(&self.of(&self.flats[0], run), bytes),
            (Section::ExpAvg | Section::ExpAvgSq, _) => {
                copy(&self.of(self.moments(section), run), bytes);
            }
        }
    }

    /// Where they lie.
    pub fn device(&self) -> Device {
        self.flats[0].0.device()
    }

    /// Takes the numbers of a run: fp32, or what moments may be stored as. They are there when this returns. Threads may write
    /// different runs at the same time.
    pub fn write(&self, section: Section, run: Run, values: &Staged) {
        let values = &values.0;
        match (section, &self.flats[..]) {
            (Section::Masters, [parameters, remainder, _, _]) => {
                let (upper, lower) = (self.view(parameters, run), self.view(remainder, run));
                let values = values.to_device(upper.device());
                twin::split(&values, &upper, &lower);
            }
            (Section::Masters, _) => self.view(&self.flats[0], run).copy_(values),
            (Section::ExpAvg | Section::ExpAvgSq, _) => {
                self.view(self.moments(section), run).copy_(values);
            }
        }
    }

    fn moments(&self, section: Section) -> &(Tensor, Part) {
        let from_the_end = match section {
            Section::ExpAvg => 2,
            Section::Masters | Section::ExpAvgSq => 1,
        };
        &self.flats[self.flats.len() - from_the_end]
    }

    /// A run of a flat tensor, in host memory.
    fn of(&self, flat: &(Tensor, Part), run: Run) -> Tensor {
        self.view(flat, run).to_device(Device::Cpu)
    }

    /// A run of a flat tensor, sharing its storage.
    fn view(&self, (flat, of): &(Tensor, Part), run: Run) -> Tensor {
        let first = if *of == self.part { run.own } else { run.all };
        flat.narrow(0, first, run.length)
    }
}

/// The bytes of a tensor in host memory, in the place of what is in `bytes`.
fn copy(values: &Tensor, bytes: &mut Vec<u8>) {
    bytes.resize(values.numel() * values.kind().elt_size_in_bytes(), 0);
    values.copy_data_u8(bytes, values.numel());
}

/// What [`twin::join`] does, to bytes: libtorch would have all of its threads work for each of those that write.
fn join(upper: &[u8], lower: &[u8], masters: &mut Vec<u8>) {
    masters.resize(2 * upper.len(), 0);
    let halves = upper.as_chunks().0.iter().zip(lower.as_chunks().0);
    for (master, (upper, lower)) in masters.as_chunks_mut::<4>().0.iter_mut().zip(halves) {
        let upper = u32::from(u16::from_le_bytes(*upper)) << 16;
        let lower = i32::from(i16::from_le_bytes(*lower)).cast_unsigned();
        *master = upper.wrapping_add(lower).to_le_bytes();
    }
}

impl Replica {
    /// The numbers of a part that this rank has. No update may work on them while they are read.
    pub fn numbers(&self, part: Part) -> Numbers {
        Numbers::new(part, self.flats())
    }
}
