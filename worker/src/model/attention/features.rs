//! From the residual stream to queries, keys and values: everything before the tokens are mixed.

use tch::Tensor;

use super::rotary::Rotary;
use crate::model::ModelConfig;
use crate::model::block::LayerParams;
use crate::model::norm::rms_norm;

/// A layer across all heads: relu(W x + b).
pub struct FeatureMap<'a> {
    /// W, [out, in].
    pub weight: &'a Tensor,
    /// b.
    pub bias: &'a Tensor,
}

impl FeatureMap<'_> {
    fn apply(&self, x: &Tensor) -> Tensor {
        x.linear(self.weight, Some(self.bias)).relu()
    }
}

/// What SUPRA adds to the weights of an attention layer.
pub struct Features<'a> {
    /// Map of the queries.
    pub query: FeatureMap<'a>,
    /// Map of the keys: the same weights where every query head has its own key head.
    pub key: FeatureMap<'a>,
    /// Gains of the query and key norms, [H d] each.
    pub norms: Option<(&'a Tensor, &'a Tensor)>,
}

/// Normed residual stream [B, T, D] to q [B, H, T, d], k [B, H, T, d], v [B, H, T, e]: projected, mapped, repeated to H
/// heads, rotated, and for SUPRA the keys scaled by 1/sqrt(d).
pub fn queries_keys_values(
    config: &ModelConfig,
    params: &LayerParams,
    rotary: &Rotary,
    x_btd: &Tensor,
) -> (Tensor, Tensor, Tensor) {
    let (h, kv, d) = (config.heads, config.kv_heads, config.head_dim);
    let projected = x_btd
        .linear(params.in_proj, None::<&Tensor>)
        .split_with_sizes([h * d, kv * d, kv * d].as_slice(), -1);
    let [q, k, v] = [&projected[0], &projected[1], &projected[2]];
    let repeated = |x_btx: &Tensor| repeat_heads(&heads_first(x_btx, kv), h);
    let v_bhte = repeated(v);
    // Rotated before they are repeated: the same numbers for less work.
    let rotated = |q: &Tensor, k: &Tensor, key_scale| {
        (
            rotary.rotate(&heads_first(q, h), 1.0),
            repeat_heads(&rotary.rotate(&heads_first(k, kv), key_scale), h),
        )
    };
    let Some(features) = &params.features else {
        let (q_bhtd, k_bhtd) = rotated(q, k, 1.0);
        return (q_bhtd, k_bhtd, v_bhte);
    };
    let key_scale = (d as f64).sqrt().recip();
    let (q, k) = (features.query.apply(q), features.key.apply(k));
    let (q_bhtd, k_bhtd) = match features.norms {
        None => rotated(&q, &k, key_scale),
        // One norm over all H d channels of a token, keys already repeated.
        Some((query_gain, key_gain)) => {
            let (b, t) = (x_btd.size()[0], x_btd.size()[1]);
            let k = repeated(&k).transpose(1, 2).reshape([b, t, h * d]);
            let norm =
                |x: &Tensor, gain: &Tensor| heads_first(&rms_norm(x, gain, config.norm_eps), h);
            (
                rotary.rotate(&norm(&q, query_gain), 1.0),
                rotary.rotate(&norm(&k, key_gain), key_scale),
            )
        }
    };
    (q_bhtd, k_bhtd, v_bhte)
}

/// [B, T, heads * d] to [B, heads, T, d].
fn heads_first(x: &Tensor, heads: i64) -> Tensor {
    let (b, t) = (x.size()[0], x.size()[1]);
    x.reshape([b, t, heads, -1]).transpose(1, 2)
}

/// [B, K, T, d] to [B, H, T, d]: each key/value head once for every query head that reads it.
pub fn repeat_heads(x_bktd: &Tensor, heads: i64) -> Tensor {
    let size = x_bktd.size();
    let (b, kv, t, d) = (size[0], size[1], size[2], size[3]);
    if kv == heads {
        return x_bktd.shallow_clone();
    }
    x_bktd
        .unsqueeze(2)
        .expand([b, kv, heads / kv, t, d], false)
        .reshape([b, heads, t, d])
}
