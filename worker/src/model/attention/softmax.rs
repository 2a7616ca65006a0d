//! Softmax attention of the base: softmax(q k^T / sqrt(d)) v, causal.

use tch::{Device, Kind, Tensor};

use crate::model::Documents;

/// Who sees whom in whole sequences.
#[derive(Debug)]
pub enum Mask {
    /// Each token sees itself and those before it.
    Causal,
    /// bool [B, 1, T, T], true where the row's token sees the column's.
    Chosen(Tensor),
}

impl Mask {
    /// For sequences of so many tokens.
    pub fn new(tokens: i64, documents: Option<&Documents>, device: Device) -> Mask {
        let Some(Documents { segments_bt, .. }) = documents else {
            return Mask::Causal;
        };
        let before_tt = Tensor::ones([tokens, tokens], (Kind::Bool, device)).tril(0);
        let same_btt = segments_bt
            .unsqueeze(2)
            .eq_tensor(&segments_bt.unsqueeze(1));
        Mask::Chosen(same_btt.logical_and(&before_tt).unsqueeze(1))
    }

    /// o [B, H, T, e] of q, k [B, H, T, d], v [B, H, T, e].
    pub fn mix(&self, q_bhtd: &Tensor, k_bhtd: &Tensor, v_bhte: &Tensor) -> Tensor {
        let (mask, causal) = match self {
            Mask::Causal => (None, true),
            Mask::Chosen(mask) => (Some(mask), false),
        };
        Tensor::scaled_dot_product_attention(q_bhtd, k_bhtd, v_bhte, mask, 0.0, causal, None, false)
    }
}
