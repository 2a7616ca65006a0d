//! Pointers to a model's weights and states, checked once and kept alive.

use tch::{Kind, Tensor};

use crate::{
    kernels::cuda::{error::KernelError, launch::Argument, tensors::Tensors},
    model::{ModelConfig, block::LayerParams, slots::SlotLayer},
};

/// Pointers to the weights and the state of one block.
pub struct Layer {
    pub attention_norm: Argument,
    pub in_proj: Argument,
    /// What SUPRA has and softmax has not.
    pub supra: Option<Recurrence>,
    pub out_proj: Argument,
    pub ffn_norm: Argument,
    pub w12: Argument,
    pub w3: Argument,
}

/// Pointers to what a SUPRA layer has of its own.
pub struct Recurrence {
    /// Weight and bias of the queries' feature map, then of the keys'.
    pub features: [[Argument; 2]; 2],
    pub states: Argument,
}

/// Checks tensors, and keeps them alive for the pointers to them.
pub struct Alive {
    pub tensors: Tensors,
    pub kept: Vec<Tensor>,
}

impl Alive {
    /// A bf16 tensor of this shape, whose numbers lie together.
    pub fn weight(
        &mut self,
        name: &'static str,
        tensor: &Tensor,
        shape: &[i64],
    ) -> Result<Argument, KernelError> {
        self.kept.push(tensor.shallow_clone());
        self.tensors.vectors(name, tensor, Kind::BFloat16, shape)
    }

    /// One block of a model and of its slots' memory.
    pub fn layer(
        &mut self,
        config: &ModelConfig,
        weights: &LayerParams<'_>,
        memory: &SlotLayer,
    ) -> Result<Layer, KernelError> {
        let (d, f) = (config.dim, config.ffn);
        let (q, k) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let supra = match (memory, &weights.features) {
            (SlotLayer::Supra { state_shde }, Some(features)) => {
                let maps = [(&features.query, q), (&features.key, k)];
                let [query, key] = maps.map(|(map, width)| {
                    Ok([
                        self.weight("feature map", map.weight, &[width, width])?,
                        self.weight("feature bias", map.bias, &[width])?,
                    ])
                });
                self.kept.push(state_shde.shallow_clone());
                let shape = state_shde.size();
                Some(Recurrence {
                    features: [query?, key?],
                    states: self
                        .tensors
                        .vectors("state", state_shde, Kind::Float, &shape)?,
                })
            }
            (SlotLayer::Softmax { .. }, None) => None,
            _ => panic!("invariant: weights and memory are of one attention"),
        };
        Ok(Layer {
            attention_norm: self.weight("attention_norm", weights.attention_norm, &[d])?,
            in_proj: self.weight("in_proj", weights.in_proj, &[q + 2 * k, d])?,
            supra,
            out_proj: self.weight("out_proj", weights.out_proj, &[d, q])?,
            ffn_norm: self.weight("ffn_norm", weights.ffn_norm, &[d])?,
            w12: self.weight("w12", weights.w12, &[2 * f, d])?,
            w3: self.weight("w3", weights.w3, &[d, f])?,
        })
    }
}
