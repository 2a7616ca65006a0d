//! One transformer block by hand, forward and backward: x += attention(norm(x)); x += w3(silu(gate) * up) of norm(x).
//!
//! A layer's contribution waits in [`Scratch::work_nd`] until the next norm adds it to the residual stream, so that sum
//! and norm are one pass over memory. The work itself is [`Kernels`].

use tch::Tensor;

use super::{
    Policy,
    buffers::{BlockBuffers, Projected, Scratch, head_shape},
    qk_norm::QkNorm,
    softmax,
    tables::{Sight, Tables},
};
use crate::{
    kernels::{DecayTables, Delta, HeadsGrad, HeadsIn, Kernels, NormOut},
    model::{ModelConfig, attention::ragged::Piece, block::LayerParams, slots::SlotLayer},
};

/// A block and the rows that it works on.
pub struct Block<'a> {
    /// Shape of the model.
    pub config: &'a ModelConfig,
    /// Who does the elementwise work.
    pub kernels: &'a dyn Kernels,
    /// Of the micro-batch.
    pub tables: &'a Tables,
    /// B, T.
    pub rows: (i64, i64),
    /// Of this block.
    pub weights: LayerParams<'a>,
}

impl Block<'_> {
    /// The whole block. The stream on entry is `before` + `work_nd`, or, without `before`, what [`BlockBuffers::x_in_nd`] holds
    /// already. The stream on exit is [`BlockBuffers::x_mid_nd`] + `work_nd`. A `memory` is read and moved on by the tokens.
    pub fn forward(
        &self,
        before: Option<&Tensor>,
        at: &mut BlockBuffers,
        work_nd: &Tensor,
        memory: Option<&mut SlotLayer>,
    ) {
        let x_nd = at.x_in_nd.shallow_clone();
        let delta = before.map(|_| Delta {
            delta_nd: work_nd,
            sum_nd: &mut at.x_in_nd,
        });
        let out = NormOut {
            rstd_n: &mut at.rstd_in_n,
            normed_nd: &mut at.normed_in_nd,
        };
        self.kernels.add_rms_norm(
            before.unwrap_or(&x_nd),
            delta,
            self.weights.attention_norm,
            self.config.norm_eps,
            out,
        );
        self.inside(at, work_nd, memory);
        self.kernels.swiglu(&at.gate_up_nx, &mut at.act_nf);
        self.kernels.linear(&at.act_nf, self.weights.w3, work_nd);
    }

    /// Everything between the first norm and the gate of the feed-forward layer.
    fn inside(&self, at: &mut BlockBuffers, work_nd: &Tensor, memory: Option<&mut SlotLayer>) {
        let weights = &self.weights;
        let projected = &at.projected;
        self.kernels
            .linear(&at.normed_in_nd, weights.in_proj, &projected.qkv_nx);
        if let Some(maps) = &weights.features {
            self.kernels
                .linear(&projected.q_nx, maps.query.weight, &projected.pre_q_nx);
            self.kernels
                .linear(&projected.k_nx, maps.key.weight, &projected.pre_k_nx);
        }
        self.heads(at);
        self.mix(at, memory);
        self.tokens(at);
        self.kernels.linear(&at.o_nx, weights.out_proj, work_nd);
        let delta = Delta {
            delta_nd: work_nd,
            sum_nd: &mut at.x_mid_nd,
        };
        let out = NormOut {
            rstd_n: &mut at.rstd_mid_n,
            normed_nd: &mut at.normed_mid_nd,
        };
        self.kernels.add_rms_norm(
            &at.x_in_nd,
            Some(delta),
            weights.ffn_norm,
            self.config.norm_eps,
            out,
        );
        self.kernels
            .linear(&at.normed_mid_nd, weights.w12, &at.gate_up_nx);
    }

    /// From queries, keys and values to what attention makes of them.
    fn mix(&self, at: &mut BlockBuffers, memory: Option<&mut SlotLayer>) {
        let qkv = [&at.q_bhtd, &at.k_bktd, &at.v_bktd];
        match (&self.tables.sight, memory) {
            (Sight::Softmax(mask), None) => softmax::attend(mask, qkv, &mut at.o_bhtd),
            (Sight::Supra(decay), None) => {
                let [q_bhtd, k_bktd, v_bktd] = qkv;
                self.kernels
                    .linear_attention(decay, q_bhtd, k_bktd, v_bktd, &mut at.o_bhtd);
            }
            (Sight::Slots(ragged), Some(memory)) => {
                ragged.mix(qkv, memory, &at.o_bhtd, |decay, piece| {
                    go_on(self.kernels, decay, piece);
                });
            }
            _ => panic!("invariant: slots are seen with their memory, and rows without one"),
        }
    }

    /// From the products of [`Projected`] to queries, keys and values by heads.
    fn heads(&self, at: &mut BlockBuffers) {
        if let (Some(norm), Some(maps)) = (&mut at.qk_norm, &self.weights.features) {
            norm.forward(self.kernels, self.config, maps, &at.projected);
        }
        let input = self.heads_in(&at.projected, at.qk_norm.as_ref());
        self.kernels
            .heads(&input, &mut at.q_bhtd, &mut at.k_bktd, &mut at.v_bktd);
    }

    fn heads_in<'b>(&'b self, projected: &'b Projected, norm: Option<&'b QkNorm>) -> HeadsIn<'b> {
        let maps = self.weights.features.as_ref();
        let (pre_q_nx, pre_k_nx, v_nx) = match norm {
            Some(norm) => (&norm.normed_q_nx, &norm.normed_k_nx, &norm.v_nx),
            None => (&projected.pre_q_nx, &projected.pre_k_nx, &projected.v_nx),
        };
        HeadsIn {
            shape: head_shape(self.config, self.rows),
            pre_q_nx,
            pre_k_nx,
            v_nx,
            biases: match norm {
                Some(_) => None,
                None => maps.map(|maps| [maps.query.bias, maps.key.bias]),
            },
            cos_xtp: &self.tables.cos_xtp,
            sin_xtp: &self.tables.sin_xtp,
            key_scale: maps.map_or(1.0, |_| (self.config.head_dim as f64).sqrt().recip()),
        }
    }

    /// From the output of attention by heads to the input of the output projection.
    fn tokens(&self, at: &mut BlockBuffers) {
        if self.weights.features.is_some() {
            self.kernels.head_norm(&at.o_bhtd, &mut at.o_nx);
        } else {
            softmax::by_heads(&at.o_nx, &at.o_bhtd).copy_(&at.o_bhtd);
        }
    }

    /// Brings back what the policy did not keep, but for [`BlockBuffers::act_nf`].
    fn restore(&self, policy: Policy, at: &mut BlockBuffers, scratch: &mut Scratch) {
        if policy == Policy::Save {
            return;
        }
        let (kernels, weights) = (self.kernels, &self.weights);
        let gain_d = weights.attention_norm;
        kernels.rms_norm_again(&at.x_in_nd, &at.rstd_in_n, gain_d, &mut at.normed_in_nd);
        if policy == Policy::Recompute {
            return self.inside(at, &scratch.work_nd, None);
        }
        self.heads(at);
        self.tokens(at);
        let gain_d = weights.ffn_norm;
        kernels.rms_norm_again(&at.x_mid_nd, &at.rstd_mid_n, gain_d, &mut at.normed_mid_nd);
    }

    /// Turns the gradient of the stream on exit, [`Scratch::dx_nd`], into that of the stream on entry, and adds those of
    /// the weights to `dweights`.
    pub fn backward(
        &self,
        policy: Policy,
        dweights: &LayerParams<'_>,
        at: &mut BlockBuffers,
        scratch: &mut Scratch,
    ) {
        self.restore(policy, at, scratch);
        self.feed_forward_backward(policy, dweights, at, scratch);
        self.attention_backward(dweights, at, scratch);
    }

    fn feed_forward_backward(
        &self,
        policy: Policy,
        dweights: &LayerParams<'_>,
        at: &mut BlockBuffers,
        scratch: &mut Scratch,
    ) {
        let weights = &self.weights;
        self.kernels
            .linear_input_gradient(&scratch.dx_nd, weights.w3, &scratch.dact_nf);
        // What was not kept comes back while gate and up are read anyway.
        let act_nf = (policy < Policy::Save).then_some(&mut at.act_nf);
        self.kernels
            .swiglu_backward(&mut at.gate_up_nx, &scratch.dact_nf, act_nf);
        self.kernels
            .linear_weight_gradient(&scratch.dx_nd, &at.act_nf, dweights.w3);
        let dgate_up_nx = &at.gate_up_nx;
        self.kernels
            .linear_weight_gradient(dgate_up_nx, &at.normed_mid_nd, dweights.w12);
        self.kernels
            .linear_input_gradient(dgate_up_nx, weights.w12, &scratch.work_nd);
        self.kernels.rms_norm_backward(
            &scratch.work_nd,
            &at.x_mid_nd,
            &at.rstd_mid_n,
            weights.ffn_norm,
            &mut scratch.dx_nd,
            &mut dweights.ffn_norm.shallow_clone(),
        );
    }

    fn attention_backward(
        &self,
        dweights: &LayerParams<'_>,
        at: &BlockBuffers,
        scratch: &mut Scratch,
    ) {
        let weights = &self.weights;
        self.kernels
            .linear_weight_gradient(&scratch.dx_nd, &at.o_nx, dweights.out_proj);
        self.kernels
            .linear_input_gradient(&scratch.dx_nd, weights.out_proj, &scratch.work_nd);
        self.mixing_backward(at, scratch);
        self.heads_backward(dweights, at, scratch);
        let dprojected = &scratch.dprojected;
        if let (Some(maps), Some(dmaps)) = (&weights.features, &dweights.features) {
            for (dpre_nx, x_nx, map, dmap, dx_nx) in [
                (
                    &dprojected.pre_q_nx,
                    &at.projected.q_nx,
                    &maps.query,
                    &dmaps.query,
                    &dprojected.q_nx,
                ),
                (
                    &dprojected.pre_k_nx,
                    &at.projected.k_nx,
                    &maps.key,
                    &dmaps.key,
                    &dprojected.k_nx,
                ),
            ] {
                self.kernels
                    .linear_weight_gradient(dpre_nx, x_nx, dmap.weight);
                self.kernels
                    .linear_input_gradient(dpre_nx, map.weight, dx_nx);
            }
        }
        self.kernels
            .linear_weight_gradient(&dprojected.qkv_nx, &at.normed_in_nd, dweights.in_proj);
        self.kernels
            .linear_input_gradient(&dprojected.qkv_nx, weights.in_proj, &scratch.work_nd);
        self.kernels.rms_norm_backward(
            &scratch.work_nd,
            &at.x_in_nd,
            &at.rstd_in_n,
            weights.attention_norm,
            &mut scratch.dx_nd,
            &mut dweights.attention_norm.shallow_clone(),
        );
    }

    /// From the gradient of the output projection's input, in [`Scratch::work_nd`], to those of the heads.
    fn mixing_backward(&self, at: &BlockBuffers, scratch: &mut Scratch) {
        let qkv = [&at.q_bhtd, &at.k_bktd, &at.v_bktd];
        let dqkv = [
            &mut scratch.dq_bhtd,
            &mut scratch.dk_bktd,
            &mut scratch.dv_bktd,
        ];
        let (do_nx, do_bhtd) = (&scratch.work_nd, &mut scratch.do_bhtd);
        match &self.tables.sight {
            Sight::Softmax(mask) => {
                do_bhtd.copy_(&softmax::by_heads(do_nx, do_bhtd));
                softmax::attend_backward(mask, qkv, do_bhtd, dqkv);
            }
            Sight::Supra(decay) => {
                self.kernels.head_norm_backward(do_nx, &at.o_bhtd, do_bhtd);
                self.kernels
                    .linear_attention_backward(decay, qkv, do_bhtd, dqkv);
            }
            Sight::Slots(_) => {
                panic!("invariant: slots are read, and nothing is learned from them")
            }
        }
    }

    /// From the gradients of the heads to those of the products of [`Projected`].
    fn heads_backward(&self, dweights: &LayerParams<'_>, at: &BlockBuffers, scratch: &mut Scratch) {
        let input = self.heads_in(&at.projected, at.qk_norm.as_ref());
        let (dprojected, dqk_norm) = (&mut scratch.dprojected, &mut scratch.dqk_norm);
        let mut dbiases = dweights
            .features
            .as_ref()
            .map(|maps| [&maps.query, &maps.key].map(|map| map.bias.shallow_clone()));
        let out = match dqk_norm {
            Some(norm) => HeadsGrad {
                dpre_q_nx: &mut norm.normed_q_nx,
                dpre_k_nx: &mut norm.normed_k_nx,
                dv_nx: &mut norm.v_nx,
                dbiases_sum: None,
            },
            None => HeadsGrad {
                dpre_q_nx: &mut dprojected.pre_q_nx,
                dpre_k_nx: &mut dprojected.pre_k_nx,
                dv_nx: &mut dprojected.v_nx,
                dbiases_sum: dbiases.as_mut().map(|biases| biases.each_mut()),
            },
        };
        let [dq, dk, dv] = [&scratch.dq_bhtd, &scratch.dk_bktd, &scratch.dv_bktd];
        self.kernels.heads_backward(&input, dq, dk, dv, out);
        if let (Some(norm), Some(gradient), Some(maps), Some(dmaps)) = (
            &at.qk_norm,
            dqk_norm,
            &self.weights.features,
            &dweights.features,
        ) {
            norm.backward(self.kernels, self.config, maps, dmaps, gradient, dprojected);
        }
    }
}

/// Linear attention over a piece of a sequence; kernels want heads that lie together, and one piece among several has others
/// between them.
fn go_on(kernels: &dyn Kernels, decay: &DecayTables, piece: Piece<'_>) {
    let qkv = piece.qkv.map(Tensor::contiguous);
    let mut o_1hte = piece.o.contiguous();
    kernels.linear_attention_from(decay, qkv.each_ref(), piece.state, &mut o_1hte);
    if o_1hte.data_ptr() != piece.o.data_ptr() {
        piece.o.copy_(&o_1hte);
    }
}
