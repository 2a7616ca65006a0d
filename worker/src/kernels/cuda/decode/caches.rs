//! Where the caches of a softmax model's sequences lie, as the kernels look it up.

use tch::{Device, Kind, Tensor};

use super::Row;
use crate::{
    kernels::KernelError,
    kernels::cuda::{
        launch::Argument,
        tensors::{VECTOR, wrong},
    },
    model::{ModelConfig, Slots, slots::SlotLayer},
};

/// Blocks that all sequences of a step have together, at least, for each key/value head; no sequence has more.
const MOST_SPLITS: i64 = 64;
/// Each has so many at least.
const LEAST_SPLITS: i64 = 4;

/// Addresses and rooms of all caches, and what blocks leave of their parts of a sequence.
pub struct Caches {
    /// i64 [layers, 2, slots].
    addresses: Tensor,
    /// i32 [slots].
    rooms: Tensor,
    /// What the device has of both.
    known: (Vec<i64>, Vec<i32>),
    /// fp32, as long as all parts.
    parts: Tensor,
}

/// Blocks among which each of n sequences is divided.
pub fn splits(n: i64) -> i64 {
    (MOST_SPLITS / n).max(LEAST_SPLITS)
}

impl Caches {
    /// For steps of at most `rows` rows.
    pub fn new(config: &ModelConfig, slots: usize, rows: i64, device: Device) -> Caches {
        let slots = slots as i64;
        let blocks = (1..=rows).map(|n| n * splits(n)).max().unwrap_or(1);
        let numbers = blocks * config.heads * (config.head_dim + 2);
        Caches {
            addresses: Tensor::zeros([config.layers, 2, slots], (Kind::Int64, device)),
            rooms: Tensor::zeros([slots], (Kind::Int, device)),
            known: (
                vec![0; (config.layers * 2 * slots) as usize],
                vec![0; slots as usize],
            ),
            parts: Tensor::zeros([numbers], (Kind::Float, device)),
        }
    }

    /// Addresses of keys and of values of a block, and the rooms.
    pub fn arguments(&self, layer: usize) -> [Argument; 3] {
        let of_layer = self.addresses.get(layer as i64);
        [&of_layer.get(0), &of_layer.get(1), &self.rooms].map(Argument::pointer)
    }

    /// What blocks leave of their parts.
    pub fn parts(&self) -> Argument {
        Argument::pointer(&self.parts)
    }

    /// Makes room for one more token of each row, and tells the device where caches are now.
    pub fn reserve(&mut self, rows: &[Row], memory: &mut Slots) -> Result<(), KernelError> {
        let slots = self.known.1.len();
        let mut moved = false;
        for (layer, memory) in memory.layers.iter_mut().enumerate() {
            let SlotLayer::Softmax { caches } = memory else {
                panic!("invariant: a softmax model has caches");
            };
            for row in rows {
                let slot = row.slot as usize;
                let cache = &mut caches[slot];
                cache.reserve(1);
                for (which, buffer) in cache.buffers().into_iter().enumerate() {
                    let address = buffer.data_ptr() as i64;
                    if address % (2 * VECTOR) != 0 {
                        let problem = "its address is no multiple of 16";
                        return Err(wrong("cache", problem.to_owned()));
                    }
                    let known = &mut self.known.0[(layer * 2 + which) * slots + slot];
                    moved |= std::mem::replace(known, address) != address;
                    let room = buffer.size()[2] as i32;
                    let known = &mut self.known.1[slot];
                    moved |= std::mem::replace(known, room) != room;
                }
            }
        }
        if moved {
            let addresses = Tensor::from_slice(&self.known.0).view_as(&self.addresses);
            self.addresses.copy_(&addresses);
            self.rooms.copy_(&Tensor::from_slice(&self.known.1));
        }
        Ok(())
    }

    /// Counts the token of each row that a step has written.
    pub fn count(rows: &[Row], memory: &mut Slots) {
        for layer in &mut memory.layers {
            if let SlotLayer::Softmax { caches } = layer {
                rows.iter()
                    .for_each(|row| caches[row.slot as usize].count());
            }
        }
    }
}
