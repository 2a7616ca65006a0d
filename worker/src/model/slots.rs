//! What inference remembers of several sequences of different lengths, each in a slot.

use tch::{Device, Kind, TchError, Tensor};

use super::attention::cache::Cache;
use super::{AttentionKind, ModelConfig, accumulate_kind};

/// The memory of sequences that are read and continued independently of each other.
#[derive(Debug)]
pub struct Slots {
    /// Tokens that each sequence has so far, which is the position of its next one.
    pub positions_s: Vec<i64>,
    /// One per block.
    pub layers: Vec<SlotLayer>,
}

/// The memory of one block.
#[derive(Debug)]
pub enum SlotLayer {
    /// S [slots, H, d, e] of SUPRA, already decayed; fp32 (fp64 for an fp64 model). Its size does not depend on how many
    /// tokens there were.
    Supra {
        /// S.
        state_shde: Tensor,
    },
    /// Keys and values of a softmax model, one cache per slot.
    Softmax {
        /// They grow with their sequences.
        caches: Vec<Cache>,
    },
}

impl Slots {
    /// So many empty sequences, of a model with weights of `kind` on `device`.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub fn new(
        config: &ModelConfig,
        slots: usize,
        device: Device,
        kind: Kind,
    ) -> Result<Slots, TchError> {
        let (h, d) = (config.heads, config.head_dim);
        let layer = |_| {
            Ok::<_, TchError>(match config.attention {
                AttentionKind::Supra(_) => SlotLayer::Supra {
                    state_shde: Tensor::f_zeros(
                        [slots as i64, h, d, d],
                        (accumulate_kind(kind), device),
                    )?,
                },
                AttentionKind::Softmax => SlotLayer::Softmax {
                    caches: (0..slots)
                        .map(|_| Cache::new(config, (kind, device)))
                        .collect(),
                },
            })
        };
        Ok(Slots {
            positions_s: vec![0; slots],
            layers: (0..config.layers)
                .map(layer)
                .collect::<Result<_, TchError>>()?,
        })
    }

    /// Bytes that each sequence needs, whatever its length; none for softmax, where that grows.
    pub fn bytes_of_each(config: &ModelConfig, kind: Kind) -> Option<u64> {
        config.supra()?;
        let numbers = config.layers * config.heads * config.head_dim * config.head_dim;
        Some(numbers.cast_unsigned() * accumulate_kind(kind).elt_size_in_bytes() as u64)
    }

    /// Makes a slot's sequence empty.
    pub fn clear(&mut self, slot: usize) {
        self.positions_s[slot] = 0;
        for layer in &mut self.layers {
            match layer {
                SlotLayer::Supra { state_shde } => {
                    let _ = state_shde.get(slot as i64).zero_();
                }
                SlotLayer::Softmax { caches } => caches[slot].clear(),
            }
        }
    }

    /// Makes a slot's sequence the same as another's.
    pub fn copy(&mut self, from: usize, to: usize) {
        self.positions_s[to] = self.positions_s[from];
        for layer in &mut self.layers {
            match layer {
                SlotLayer::Supra { state_shde } => state_shde
                    .get(to as i64)
                    .copy_(&state_shde.get(from as i64)),
                SlotLayer::Softmax { caches } => caches[to] = caches[from].copy(),
            }
        }
    }

    /// The tensors of a slot's sequence by name: views, on the device.
    pub fn tensors(&self, slot: usize) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let mut add = |name, tensor| tensors.push((format!("layers.{at}.{name}"), tensor));
            match layer {
                SlotLayer::Supra { state_shde } => add("state_hde", state_shde.get(slot as i64)),
                SlotLayer::Softmax { caches } => {
                    let [k_ktd, v_kte] = caches[slot].tensors();
                    add("k_ktd", k_ktd);
                    add("v_kte", v_kte);
                }
            }
        }
        tensors
    }

    /// Makes a slot's sequence that of which [`tensors`](Slots::tensors) were taken, after so many tokens. A tensor that is
    /// missing, or of another shape, is named.
    pub fn restore(
        &mut self,
        slot: usize,
        position: i64,
        find: impl Fn(&str) -> Option<Tensor>,
    ) -> Result<(), String> {
        let get = |at: usize, name: &str, shape: &[i64]| {
            let name = format!("layers.{at}.{name}");
            let tensor = find(&name).ok_or_else(|| format!("tensor `{name}` is missing"))?;
            if tensor.size() == shape {
                Ok(tensor)
            } else {
                let found = tensor.size();
                Err(format!("tensor `{name}` is {found:?}, not {shape:?}"))
            }
        };
        for (at, layer) in self.layers.iter_mut().enumerate() {
            match layer {
                SlotLayer::Supra { state_shde } => {
                    let mut state_hde = state_shde.get(slot as i64);
                    state_hde.copy_(&get(at, "state_hde", &state_hde.size())?);
                }
                SlotLayer::Softmax { caches } => {
                    let shape = caches[slot].shape(position);
                    let (k_ktd, v_kte) = (get(at, "k_ktd", &shape)?, get(at, "v_kte", &shape)?);
                    caches[slot].clear();
                    caches[slot].append(&k_ktd.unsqueeze(0), &v_kte.unsqueeze(0));
                }
            }
        }
        self.positions_s[slot] = position;
        Ok(())
    }

    /// Bytes that a slot's sequence needs.
    pub fn bytes(&self, slot: usize) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        let layer = |layer: &SlotLayer| match layer {
            SlotLayer::Supra { state_shde } => bytes(&state_shde.get(slot as i64)),
            SlotLayer::Softmax { caches } => caches[slot].tensors().iter().map(bytes).sum(),
        };
        self.layers.iter().map(layer).sum()
    }
}
