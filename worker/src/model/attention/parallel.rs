//! The parallel form: O = ((Q K^T) * M) V with M_tj = gamma^(t-j) for j <= t, else 0.
//!
//! Quadratic in T. It is the plainest statement of the method, and what the other forms are tested against.

use tch::{Kind, Tensor};

use super::decay::{ages, powers};
use crate::model::Documents;

/// The mask of a batch.
#[derive(Debug)]
pub struct Parallel {
    /// M: [H, T, T], or [B, H, T, T] with documents.
    mask: Tensor,
}

impl Parallel {
    /// For rows of `tokens` tokens; computes in `kind`.
    pub fn new(
        slopes_h: &[f64],
        tokens: i64,
        documents: Option<&Documents>,
        options: (Kind, tch::Device),
    ) -> Parallel {
        let (kind, device) = options;
        let mask_htt = powers(slopes_h, &ages(tokens, device))
            .tril(0)
            .to_kind(kind);
        let mask = match documents {
            None => mask_htt,
            Some(documents) => {
                let segments = &documents.segments_bt;
                let same_b1tt = segments
                    .unsqueeze(2)
                    .eq_tensor(&segments.unsqueeze(1))
                    .unsqueeze(1);
                mask_htt * same_b1tt
            }
        };
        Parallel { mask }
    }

    /// o [B, H, T, e] of q, k [B, H, T, d] and v [B, H, T, e]; k already scaled.
    pub fn mix(&self, q_bhtd: &Tensor, k_bhtd: &Tensor, v_bhte: &Tensor) -> Tensor {
        let kind = self.mask.kind();
        let scores_bhtt = q_bhtd
            .to_kind(kind)
            .matmul(&k_bhtd.to_kind(kind).transpose(-2, -1))
            * &self.mask;
        scores_bhtt.matmul(&v_bhte.to_kind(kind))
    }
}
