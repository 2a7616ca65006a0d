//! Rotary position embedding, half-split: channel i is paired with channel i + d/2.
//!
//! (x_i, x_{i+d/2}) turns by the angle position * theta^(-2i/d). Angles are computed in fp64 modulo 2 pi and sine and
//! cosine rounded once, so far positions are as exact as near ones.

use std::f64::consts::TAU;

use half::bf16;
use tch::{Kind, Tensor};

use crate::model::{ModelConfig, RopeFrequencies, accumulate_kind};

/// Cosines and sines for the tokens of a batch.
#[derive(Debug)]
pub struct Rotary {
    cos_b1tp: Tensor,
    sin_b1tp: Tensor,
}

/// theta^(-2i/d) for the d/2 pairs of channels of a head.
pub fn frequencies(theta: f64, head_dim: i64, rounding: RopeFrequencies) -> Vec<f64> {
    let exact = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
    match rounding {
        RopeFrequencies::Exact => exact.collect(),
        // By way of fp32, as the reference code does.
        RopeFrequencies::Bf16 => exact
            .map(|frequency| bf16::from_f32(frequency as f32).to_f64())
            .collect(),
    }
}

impl Rotary {
    /// For tokens at `positions_bt` (i64; one row serves all), of a model that computes in `kind`.
    pub fn new(config: &ModelConfig, positions_bt: &Tensor, kind: Kind) -> Rotary {
        let rounding = config
            .supra()
            .map_or(RopeFrequencies::Exact, |supra| supra.rope_frequencies);
        let frequencies_p =
            Tensor::from_slice(&frequencies(config.rope_theta, config.head_dim, rounding));
        let frequencies_p = frequencies_p.to_device(positions_bt.device());
        let angles_b1tp = (positions_bt.to_kind(Kind::Double).unsqueeze(-1) * frequencies_p)
            .remainder(TAU)
            .unsqueeze(1);
        let kind = accumulate_kind(kind);
        Rotary {
            cos_b1tp: angles_b1tp.cos().to_kind(kind),
            sin_b1tp: angles_b1tp.sin().to_kind(kind),
        }
    }

    /// Cosines and sines as [x, T, d/2]: x is B, or 1 if one row serves all.
    pub fn tables(&self) -> (Tensor, Tensor) {
        (self.cos_b1tp.squeeze_dim(1), self.sin_b1tp.squeeze_dim(1))
    }

    /// Turns queries or keys and multiplies them by `scale`, rounding once.
    pub fn rotate(&self, x_bhtd: &Tensor, scale: f64) -> Tensor {
        let halves = x_bhtd.to_kind(self.cos_b1tp.kind()).chunk(2, -1);
        let (first, second) = (&halves[0], &halves[1]);
        let turned = Tensor::cat(
            &[
                first * &self.cos_b1tp - second * &self.sin_b1tp,
                second * &self.cos_b1tp + first * &self.sin_b1tp,
            ],
            -1,
        );
        let scaled = if scale == 1.0 { turned } else { turned * scale };
        scaled.to_kind(x_bhtd.kind())
    }
}
