//! Softmax attention of the base: softmax(q k^T / sqrt(d)) v, causal.

use tch::{Device, Kind, Tensor};

use crate::model::Documents;

/// Who sees whom. The keys of earlier tokens (S of them, from a cache) stand before those of the T tokens in hand.
#[derive(Debug)]
pub enum Mask {
    /// Each token sees itself and those before it; no cache.
    Causal,
    /// One new token that sees everything.
    Everything,
    /// bool [B or 1, 1, T, S + T], true where the row's token sees the column's.
    Chosen(Tensor),
}

impl Mask {
    /// For `tokens` new tokens after `past` cached ones.
    pub fn new(past: &Past, tokens: i64, documents: Option<&Documents>, device: Device) -> Mask {
        match (past.tokens, documents, &past.visible_bs) {
            (0, None, _) => return Mask::Causal,
            (_, None, None) if tokens == 1 => return Mask::Everything,
            _ => {}
        }
        let before_tt = Tensor::ones([tokens, tokens], (Kind::Bool, device)).tril(0);
        let mut new_xtt = before_tt.unsqueeze(0);
        let mut old_xts = Tensor::ones([1, tokens, past.tokens], (Kind::Bool, device));
        if let Some(visible_bs) = &past.visible_bs {
            old_xts = old_xts.logical_and(&visible_bs.unsqueeze(1));
        }
        if let Some(Documents { segments_bt, .. }) = documents {
            new_xtt = new_xtt.logical_and(
                &segments_bt
                    .unsqueeze(2)
                    .eq_tensor(&segments_bt.unsqueeze(1)),
            );
            old_xts = old_xts.logical_and(&segments_bt.unsqueeze(2).eq(0));
        }
        let b = old_xts.size()[0].max(new_xtt.size()[0]);
        let old_bts = old_xts.expand([b, tokens, past.tokens], false);
        let new_btt = new_xtt.expand([b, tokens, tokens], false);
        Mask::Chosen(Tensor::cat(&[old_bts, new_btt], 2).unsqueeze(1))
    }

    /// o [B, H, T, e] of q [B, H, T, d], k [B, H, S + T, d], v [B, H, S + T, e].
    pub fn mix(&self, q_bhtd: &Tensor, k_bhsd: &Tensor, v_bhse: &Tensor) -> Tensor {
        let (mask, causal) = match self {
            Mask::Causal => (None, true),
            Mask::Everything => (None, false),
            Mask::Chosen(mask) => (Some(mask), false),
        };
        Tensor::scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhse, mask, 0.0, causal, None, false)
    }
}

/// What is known about the tokens in the cache.
#[derive(Debug, Default)]
pub struct Past {
    /// How many there are.
    pub tokens: i64,
    /// Which of them belong to the document that is running, bool [B, S]; none: all.
    pub visible_bs: Option<Tensor>,
}

impl Past {
    /// What later tokens find after `tokens` more.
    pub fn extended(&self, tokens: i64, documents: Option<&Documents>) -> Past {
        let visible_bs = match (documents, &self.visible_bs) {
            (None, None) => None,
            (None, Some(visible_bs)) => {
                let new = Tensor::ones(
                    [visible_bs.size()[0], tokens],
                    (Kind::Bool, visible_bs.device()),
                );
                Some(Tensor::cat(&[visible_bs, &new], 1))
            }
            (Some(Documents { segments_bt, .. }), old) => {
                let last_b1 = segments_bt.narrow(1, tokens - 1, 1);
                let runs_on_b1 = last_b1.eq(0);
                let old_bs = runs_on_b1.expand([segments_bt.size()[0], self.tokens], false);
                let old_bs = old
                    .as_ref()
                    .map_or(old_bs.shallow_clone(), |old| old.logical_and(&old_bs));
                Some(Tensor::cat(&[old_bs, segments_bt.eq_tensor(&last_b1)], 1))
            }
        };
        Past {
            tokens: self.tokens + tokens,
            visible_bs,
        }
    }
}
