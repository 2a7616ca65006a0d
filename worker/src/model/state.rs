//! What inference remembers of the tokens so far.

use tch::{Device, Kind, Tensor};

use super::attention::softmax::Past;
use super::{AttentionKind, ModelConfig, accumulate_kind};

/// The memory of a batch of sequences. For SUPRA its size does not depend on how many tokens there were.
#[derive(Debug)]
pub struct State {
    /// Position of the next token inside its document: i64 [B].
    pub positions_b: Tensor,
    /// One per block.
    pub layers: Vec<LayerState>,
    /// The tokens in a softmax model's cache.
    pub(super) past: Past,
}

/// The memory of one block.
#[derive(Debug)]
pub enum LayerState {
    /// S [B, H, d, e], already decayed; its keys are rotated and scaled. fp32 (fp64 for an fp64 model).
    Supra {
        /// S.
        state_bhde: Tensor,
    },
    /// Rotated keys and values of all S tokens so far, [B, H, S, d] and [B, H, S, e], in the model's kind.
    Softmax {
        /// Keys.
        k_bhsd: Tensor,
        /// Values.
        v_bhse: Tensor,
    },
}

impl State {
    /// Nothing seen yet; for `batch` sequences of a model with weights of `kind` on `device`.
    pub fn new(config: &ModelConfig, batch: i64, device: Device, kind: Kind) -> State {
        let (h, d) = (config.heads, config.head_dim);
        let layer = || match config.attention {
            AttentionKind::Supra(_) => LayerState::Supra {
                state_bhde: Tensor::zeros([batch, h, d, d], (accumulate_kind(kind), device)),
            },
            AttentionKind::Softmax => LayerState::Softmax {
                k_bhsd: Tensor::zeros([batch, h, 0, d], (kind, device)),
                v_bhse: Tensor::zeros([batch, h, 0, d], (kind, device)),
            },
        };
        State {
            positions_b: Tensor::zeros([batch], (Kind::Int64, device)),
            layers: (0..config.layers).map(|_| layer()).collect(),
            past: Past::default(),
        }
    }
}
