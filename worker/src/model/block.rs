//! One transformer block: x += attention(norm(x)); x += w3(silu(gate) * up) of norm(x).

use tch::Tensor;

use super::attention::features::{FeatureMap, Features};
use super::attention::{Plan, attention};
use super::norm::rms_norm;
use super::params::in_layer;
use super::slots::SlotLayer;
use super::{ModelConfig, Params};

/// The weights of one block.
pub struct LayerParams<'a> {
    /// Gain of the norm before attention, [D].
    pub attention_norm: &'a Tensor,
    /// Rows of queries, keys, values: [(H + 2K) d, D].
    pub in_proj: &'a Tensor,
    /// SUPRA's own weights.
    pub features: Option<Features<'a>>,
    /// [D, H e].
    pub out_proj: &'a Tensor,
    /// Gain of the norm before the feed-forward layer, [D].
    pub ffn_norm: &'a Tensor,
    /// Rows of gate, up: [2F, D].
    pub w12: &'a Tensor,
    /// [D, F].
    pub w3: &'a Tensor,
}

impl<'a> LayerParams<'a> {
    /// Picks the weights of block `layer`.
    pub fn new(config: &ModelConfig, params: &'a Params, layer: i64) -> LayerParams<'a> {
        let get = |name: &str| params.get(&in_layer(layer, name));
        let features = config.supra().map(|supra| {
            let map = |weight, bias| FeatureMap {
                weight: get(weight),
                bias: get(bias),
            };
            let query = map(
                "attention._totrain_embed.weight",
                "attention._totrain_embed.bias",
            );
            let key = if config.group() == 1 {
                FeatureMap { ..query }
            } else {
                map(
                    "attention._totrain_embed_kv.weight",
                    "attention._totrain_embed_kv.bias",
                )
            };
            let norms = supra.qk_norm.then(|| {
                (
                    get("attention._totrain_q_norm.weight"),
                    get("attention._totrain_k_norm.weight"),
                )
            });
            Features { query, key, norms }
        });
        LayerParams {
            attention_norm: get("attention_norm.weight"),
            in_proj: get("attention.in_proj.weight"),
            features,
            out_proj: get("attention.out_proj.weight"),
            ffn_norm: get("ffn_norm.weight"),
            w12: get("feed_forward.w12.weight"),
            w3: get("feed_forward.w3.weight"),
        }
    }
}

/// Residual stream [B, T, D] through one block. A `memory` is read and moved on by the tokens.
pub fn block(
    config: &ModelConfig,
    params: &LayerParams,
    plan: &Plan,
    x_btd: &Tensor,
    memory: Option<&mut SlotLayer>,
) -> Tensor {
    let normed = rms_norm(x_btd, params.attention_norm, config.norm_eps);
    let x_btd = x_btd + attention(config, params, plan, &normed, memory);
    let normed = rms_norm(&x_btd, params.ffn_norm, config.norm_eps);
    let gate_up = normed.linear(params.w12, None::<&Tensor>).chunk(2, -1);
    &x_btd + (gate_up[0].silu() * &gate_up[1]).linear(params.w3, None::<&Tensor>)
}
