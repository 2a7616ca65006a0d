//! Attention: from the normed residual stream to what is added to it.
//!
//! 1. q, k, v = in_proj(x), no bias.
//! 2. SUPRA: q = relu(W q + b), k = relu(W' k + b') over the concatenation of their heads ([`features`]).
//! 3. Query head h reads key/value head floor(h / (H/K)).
//! 4. Rotary embedding of q and k ([`rotary`]); SUPRA: k is scaled by 1/sqrt(d).
//! 5. The tokens are mixed: [`softmax`], or SUPRA's o_t = sum over j <= t of gamma^(t-j) (q_t . k_j) v_j in one of its
//!    forms, [`parallel`], [`chunkwise`] and [`recurrent`]. In inference [`ragged`] chooses, sequence by sequence.
//! 6. SUPRA: each head's output is normed.
//! 7. out_proj, no bias.

pub mod cache;
pub mod chunkwise;
pub mod decay;
pub mod features;
pub mod mixer;
pub mod parallel;
pub mod ragged;
pub mod recurrent;
pub mod rotary;
pub mod softmax;

use tch::Tensor;

use super::ModelConfig;
use super::block::LayerParams;
use super::norm::head_norm;
use super::slots::SlotLayer;
pub use mixer::{Mixer, Plan};

/// The attention of one block: normed residual stream [B, T, D] in, [B, T, D] out. A `memory` is read and moved on by the
/// tokens.
pub fn attention(
    config: &ModelConfig,
    params: &LayerParams,
    plan: &Plan,
    x_btd: &Tensor,
    memory: Option<&mut SlotLayer>,
) -> Tensor {
    let (q_bhtd, k_bhtd, v_bhte) =
        features::queries_keys_values(config, params, &plan.rotary, x_btd);
    let mixed_bhte = plan.mixer.mix(&q_bhtd, &k_bhtd, &v_bhte, memory);
    let o_bhte = if config.supra().is_some() {
        head_norm(&mixed_bhte)
    } else {
        mixed_bhte
    };
    let (b, t) = (x_btd.size()[0], x_btd.size()[1]);
    let o_btx = o_bhte.to_kind(x_btd.kind()).transpose(1, 2).reshape([
        b,
        t,
        config.heads * config.head_dim,
    ]);
    o_btx.linear(params.out_proj, None::<&Tensor>)
}
