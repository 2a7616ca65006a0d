//! The tensors of a step that stay where they are.

use tch::{Device, Kind, Tensor};

use crate::model::{
    ModelConfig,
    attention::{decay::gammas, rotary::frequencies},
};

/// What is between the products; n rows each.
pub struct Buffers {
    /// Token, slot and position of each row: i32 [3, n].
    pub inputs: Tensor,
    /// Residual stream [n, D].
    pub x: Tensor,
    /// [n, D].
    pub normed: Tensor,
    /// q | k | v before the feature maps: [n, (H + 2K) d].
    pub projected: Tensor,
    /// [n, H d] and [n, K d], before bias and ReLU.
    pub features: [Tensor; 2],
    /// Heads' outputs, normed: [n, H d].
    pub mixed: Tensor,
    /// What a layer adds to the stream: [n, D].
    pub delta: Tensor,
    /// [n, 2F].
    pub gate_up: Tensor,
    /// [n, F].
    pub gated: Tensor,
    /// [n, V].
    pub logits: Tensor,
    /// i32 [n].
    pub chosen: Tensor,
    /// fp32 [n, d/2] each.
    pub angles: [Tensor; 2],
    /// fp64 [d/2].
    pub frequencies: Tensor,
    /// fp32 [H].
    pub gammas: Tensor,
}

impl Buffers {
    /// For so many rows.
    pub fn new(config: &ModelConfig, n: i64, device: Device) -> Buffers {
        let (d, f) = (config.dim, config.ffn);
        let (q, k) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let bf16 = |width: i64| Tensor::zeros([n, width], (Kind::BFloat16, device));
        let supra = config.supra().copied().unwrap_or_default();
        let numbers =
            |numbers: &[f64], kind| Tensor::from_slice(numbers).to_kind(kind).to_device(device);
        let pairs = config.head_dim / 2;
        let frequencies = frequencies(config.rope_theta, config.head_dim, supra.rope_frequencies);
        Buffers {
            inputs: Tensor::zeros([3, n], (Kind::Int, device)),
            x: bf16(d),
            normed: bf16(d),
            projected: bf16(q + 2 * k),
            features: [bf16(q), bf16(k)],
            mixed: bf16(q),
            delta: bf16(d),
            gate_up: bf16(2 * f),
            gated: bf16(f),
            logits: bf16(config.vocab),
            chosen: Tensor::zeros([n], (Kind::Int, device)),
            angles: [0, 1].map(|_| Tensor::zeros([n, pairs], (Kind::Float, device))),
            frequencies: numbers(&frequencies, Kind::Double),
            gammas: numbers(&gammas(supra.decay, config.heads), Kind::Float),
        }
    }
}
