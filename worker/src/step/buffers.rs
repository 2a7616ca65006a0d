//! Every tensor that forward and backward fill, allocated once for rows of one shape. `supra_recipes::plan::memory` counts
//! them beforehand.

use supra_recipes::plan::memory::LOGITS;
use tch::{Device, Kind, Tensor};

use super::{Policy, qk_norm::QkNorm};
use crate::{
    kernels::HeadShape,
    model::{ModelConfig, accumulate_kind},
};

/// All buffers of a step over micro-batches of one shape.
pub struct Buffers {
    /// One per block. What the policy does not keep is one tensor in all of them.
    pub blocks: Vec<BlockBuffers>,
    /// What serves every block in turn.
    pub scratch: Scratch,
    /// After the last block.
    pub head: HeadBuffers,
}

/// What one block computes on the way forward.
pub struct BlockBuffers {
    /// Residual stream on entry: [n, D].
    pub x_in_nd: Tensor,
    /// Of its norm: [n].
    pub rstd_in_n: Tensor,
    /// The input of attention.
    pub normed_in_nd: Tensor,
    /// Queries, keys, values as matrix products give them.
    pub projected: Projected,
    /// Between `projected` and heads, if there are query and key norms.
    pub qk_norm: Option<QkNorm>,
    /// [B, H, T, d].
    pub q_bhtd: Tensor,
    /// [B, K, T, d], or [B, H, T, d] with query and key norms.
    pub k_bktd: Tensor,
    /// Likewise.
    pub v_bktd: Tensor,
    /// What attention makes of them.
    pub o_bhtd: Tensor,
    /// Tokens first again, for SUPRA normed.
    pub o_nx: Tensor,
    /// Residual stream between attention and feed-forward layer.
    pub x_mid_nd: Tensor,
    /// Of its norm.
    pub rstd_mid_n: Tensor,
    /// The input of the feed-forward layer.
    pub normed_mid_nd: Tensor,
    /// [gate | up].
    pub gate_up_nx: Tensor,
    /// silu(gate) * up.
    pub act_nf: Tensor,
}

/// Queries, keys and values before they become heads, or their gradients.
pub struct Projected {
    /// [q | k | v]: [n, (H + 2K) d].
    pub qkv_nx: Tensor,
    /// View of the queries in it: [n, H d].
    pub q_nx: Tensor,
    /// View of the keys: [n, K d].
    pub k_nx: Tensor,
    /// View of the values: [n, K d].
    pub v_nx: Tensor,
    /// SUPRA: queries after the product of the feature map. Softmax: `q_nx`.
    pub pre_q_nx: Tensor,
    /// The keys likewise.
    pub pre_k_nx: Tensor,
}

/// What serves every block in turn.
pub struct Scratch {
    /// On the way forward what a layer adds to the stream, on the way back the gradient of what a layer read: [n, D].
    pub work_nd: Tensor,
    /// Gradient of the residual stream.
    pub dx_nd: Tensor,
    /// Gradient of [`BlockBuffers::act_nf`].
    pub dact_nf: Tensor,
    /// Of [`BlockBuffers::o_bhtd`].
    pub do_bhtd: Tensor,
    /// Of queries.
    pub dq_bhtd: Tensor,
    /// Of keys.
    pub dk_bktd: Tensor,
    /// Of values.
    pub dv_bktd: Tensor,
    /// Of [`BlockBuffers::projected`].
    pub dprojected: Projected,
    /// Of [`BlockBuffers::qk_norm`].
    pub dqk_norm: Option<QkNorm>,
}

/// What happens after the last block.
pub struct HeadBuffers {
    /// Residual stream: [n, D].
    pub x_nd: Tensor,
    /// Of its norm: [n].
    pub rstd_n: Tensor,
    /// The input of the output layer.
    pub normed_nd: Tensor,
    /// Logits of some tokens, then their gradient: [c, V].
    pub logits_cv: Tensor,
}

impl Buffers {
    /// For rows [B, T] of a model with weights of `kind` on `device`.
    pub fn new(
        config: &ModelConfig,
        rows: (i64, i64),
        policy: Policy,
        options: (Kind, Device),
    ) -> Buffers {
        let new = New {
            config,
            rows,
            options,
        };
        let first = new.block();
        let rest = (1..config.layers)
            .map(|_| first.next(config, policy))
            .collect::<Vec<_>>();
        Buffers {
            scratch: new.scratch(),
            head: new.head(),
            blocks: std::iter::once(first).chain(rest).collect(),
        }
    }
}

impl BlockBuffers {
    /// For one block and rows [B, T], of a model with weights of `kind` on `device`.
    pub fn new(config: &ModelConfig, rows: (i64, i64), options: (Kind, Device)) -> BlockBuffers {
        New {
            config,
            rows,
            options,
        }
        .block()
    }

    /// The buffers of the next block: its own where the policy keeps them, else these.
    fn next(&self, config: &ModelConfig, policy: Policy) -> BlockBuffers {
        let own = |tensor: &Tensor, from: Policy| {
            if policy >= from {
                tensor.empty_like()
            } else {
                tensor.shallow_clone()
            }
        };
        let of_products = |tensor: &Tensor| own(tensor, Policy::Lean);
        let of_elements = |tensor: &Tensor| own(tensor, Policy::Save);
        BlockBuffers {
            x_in_nd: own(&self.x_in_nd, Policy::Recompute),
            rstd_in_n: own(&self.rstd_in_n, Policy::Recompute),
            normed_in_nd: of_elements(&self.normed_in_nd),
            projected: self.projected.map(config, of_products),
            qk_norm: self.qk_norm.as_ref().map(|norm| norm.map(of_elements)),
            q_bhtd: of_elements(&self.q_bhtd),
            k_bktd: of_elements(&self.k_bktd),
            v_bktd: of_elements(&self.v_bktd),
            o_bhtd: of_products(&self.o_bhtd),
            o_nx: of_elements(&self.o_nx),
            x_mid_nd: of_products(&self.x_mid_nd),
            rstd_mid_n: of_products(&self.rstd_mid_n),
            normed_mid_nd: of_elements(&self.normed_mid_nd),
            gate_up_nx: of_products(&self.gate_up_nx),
            act_nf: of_elements(&self.act_nf),
        }
    }
}

impl Projected {
    /// Cuts [q | k | v]; without the products of feature maps the projections themselves become heads.
    fn new(config: &ModelConfig, qkv_nx: Tensor, pre: Option<[Tensor; 2]>) -> Projected {
        let (queries, keys) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let q_nx = qkv_nx.narrow(1, 0, queries);
        let k_nx = qkv_nx.narrow(1, queries, keys);
        let v_nx = qkv_nx.narrow(1, queries + keys, keys);
        let [pre_q_nx, pre_k_nx] =
            pre.unwrap_or_else(|| [q_nx.shallow_clone(), k_nx.shallow_clone()]);
        Projected {
            qkv_nx,
            q_nx,
            k_nx,
            v_nx,
            pre_q_nx,
            pre_k_nx,
        }
    }

    fn map(&self, config: &ModelConfig, new: impl Fn(&Tensor) -> Tensor) -> Projected {
        let pre = config
            .supra()
            .map(|_| [new(&self.pre_q_nx), new(&self.pre_k_nx)]);
        Projected::new(config, new(&self.qkv_nx), pre)
    }
}

/// How to cut heads out of tokens; with query and key norms every query head has its own keys and values.
pub fn head_shape(config: &ModelConfig, (batch, tokens): (i64, i64)) -> HeadShape {
    let qk_norm = config.supra().is_some_and(|supra| supra.qk_norm);
    HeadShape {
        batch,
        tokens,
        heads: config.heads,
        kv_heads: if qk_norm {
            config.heads
        } else {
            config.kv_heads
        },
        head_dim: config.head_dim,
    }
}

/// Allocates.
struct New<'a> {
    config: &'a ModelConfig,
    rows: (i64, i64),
    options: (Kind, Device),
}

impl New<'_> {
    fn tokens(&self) -> i64 {
        self.rows.0 * self.rows.1
    }

    /// [n, channels].
    fn wide(&self, channels: i64) -> Tensor {
        Tensor::empty([self.tokens(), channels], self.options)
    }

    /// [n], for statistics.
    fn per_token(&self) -> Tensor {
        let (kind, device) = self.options;
        Tensor::empty([self.tokens()], (accumulate_kind(kind), device))
    }

    /// [B, H or K, T, d] of queries, keys and values.
    fn heads(&self) -> [Tensor; 3] {
        let shape = head_shape(self.config, self.rows);
        [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| {
            Tensor::empty(
                [shape.batch, heads, shape.tokens, shape.head_dim],
                self.options,
            )
        })
    }

    fn projected(&self) -> Projected {
        let ModelConfig {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        let pre = self
            .config
            .supra()
            .map(|_| [self.wide(heads * head_dim), self.wide(kv_heads * head_dim)]);
        let qkv_nx = self.wide((heads + 2 * kv_heads) * head_dim);
        Projected::new(self.config, qkv_nx, pre)
    }

    fn qk_norm(&self) -> Option<QkNorm> {
        let supra = self.config.supra()?;
        supra
            .qk_norm
            .then(|| QkNorm::new(self.config, self.tokens(), self.options))
    }

    fn block(&self) -> BlockBuffers {
        let (dim, ffn) = (self.config.dim, self.config.ffn);
        let [q_bhtd, k_bktd, v_bktd] = self.heads();
        BlockBuffers {
            x_in_nd: self.wide(dim),
            rstd_in_n: self.per_token(),
            normed_in_nd: self.wide(dim),
            projected: self.projected(),
            qk_norm: self.qk_norm(),
            o_bhtd: q_bhtd.empty_like(),
            q_bhtd,
            k_bktd,
            v_bktd,
            o_nx: self.wide(dim),
            x_mid_nd: self.wide(dim),
            rstd_mid_n: self.per_token(),
            normed_mid_nd: self.wide(dim),
            gate_up_nx: self.wide(2 * ffn),
            act_nf: self.wide(ffn),
        }
    }

    fn scratch(&self) -> Scratch {
        let [dq_bhtd, dk_bktd, dv_bktd] = self.heads();
        Scratch {
            work_nd: self.wide(self.config.dim),
            dx_nd: self.wide(self.config.dim),
            dact_nf: self.wide(self.config.ffn),
            do_bhtd: dq_bhtd.empty_like(),
            dq_bhtd,
            dk_bktd,
            dv_bktd,
            dprojected: self.projected(),
            dqk_norm: self.qk_norm(),
        }
    }

    fn head(&self) -> HeadBuffers {
        let (dim, vocab) = (self.config.dim, self.config.vocab);
        let rows = (LOGITS.cast_signed() / vocab).clamp(1, self.tokens());
        HeadBuffers {
            x_nd: self.wide(dim),
            rstd_n: self.per_token(),
            normed_nd: self.wide(dim),
            logits_cv: Tensor::empty([rows, vocab], self.options),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use supra_recipes::{
        Recipe,
        plan::Memory,
        schema::{Attention, Precision},
    };

    use super::*;
    use crate::model::{AttentionKind, SupraConfig, config::tests::small};

    /// Bytes of tensors, each memory once.
    #[derive(Default)]
    struct Held(BTreeMap<usize, usize>);

    impl Held {
        fn hold<'a>(&mut self, tensors: impl IntoIterator<Item = &'a Tensor>) {
            for x in tensors {
                let bytes = x.numel() * x.kind().elt_size_in_bytes();
                self.0.insert(x.data_ptr() as usize, bytes);
            }
        }

        fn hold_projected(&mut self, x: &Projected, maps: bool) {
            self.hold([&x.qkv_nx]);
            if maps {
                self.hold([&x.pre_q_nx, &x.pre_k_nx]);
            }
        }

        fn hold_norm(&mut self, norm: Option<&QkNorm>) {
            if let Some(x) = norm {
                self.hold([&x.q_nx, &x.k_nx, &x.v_nx, &x.rstd_q_n, &x.rstd_k_n]);
                self.hold([&x.normed_q_nx, &x.normed_k_nx]);
            }
        }

        fn hold_all(&mut self, buffers: &Buffers, maps: bool) {
            for x in &buffers.blocks {
                self.hold([&x.x_in_nd, &x.rstd_in_n, &x.normed_in_nd]);
                self.hold([&x.q_bhtd, &x.k_bktd, &x.v_bktd, &x.o_bhtd, &x.o_nx]);
                self.hold([&x.x_mid_nd, &x.rstd_mid_n, &x.normed_mid_nd]);
                self.hold([&x.gate_up_nx, &x.act_nf]);
                self.hold_projected(&x.projected, maps);
                self.hold_norm(x.qk_norm.as_ref());
            }
            let x = &buffers.scratch;
            self.hold([&x.work_nd, &x.dx_nd, &x.dact_nf, &x.do_bhtd]);
            self.hold([&x.dq_bhtd, &x.dk_bktd, &x.dv_bktd]);
            self.hold_projected(&x.dprojected, maps);
            self.hold_norm(x.dqk_norm.as_ref());
            let x = &buffers.head;
            self.hold([&x.x_nd, &x.rstd_n, &x.normed_nd, &x.logits_cv]);
        }
    }

    /// What the plan counts for the same, [3, 7] being the rows.
    fn planned(config: &ModelConfig, precision: Precision, policy: Policy) -> usize {
        let text = "name: t\nbase: { path: b }\ndata: { train: d }\nbudget: { tokens: 1B }\n\
                    batch: { tokens: 700, micro_batch: 3, sequence_length: 7 }\n";
        let mut recipe = Recipe::parse(text, "t.yaml").unwrap();
        recipe.model.precision = precision;
        match config.supra() {
            Some(supra) => recipe.model.qk_norm = supra.qk_norm,
            None => recipe.attention = Attention::Softmax,
        }
        let memory = Memory::new(&recipe, &config.shape(), 1, policy);
        let buffers = [
            "activations, per block",
            "activations, shared",
            "their gradients",
            "last norm and logits",
        ];
        let parts = memory.components.iter();
        let parts = parts.filter(|part| buffers.contains(&part.name));
        parts.map(|part| part.bytes as usize).sum()
    }

    #[test]
    fn the_plan_counts_all_buffers_to_the_byte() {
        let supra = |qk_norm| {
            AttentionKind::Supra(SupraConfig {
                qk_norm,
                ..SupraConfig::default()
            })
        };
        for attention in [AttentionKind::Softmax, supra(false), supra(true)] {
            // Of so many logits only some tokens' fit at a time.
            let wide = ModelConfig {
                vocab: 1 << 25,
                ..small(attention)
            };
            for config in [small(attention), wide] {
                for policy in Policy::ALL {
                    for (precision, kind) in [
                        (Precision::Bf16, Kind::BFloat16),
                        (Precision::Fp32, Kind::Float),
                    ] {
                        let buffers = Buffers::new(&config, (3, 7), policy, (kind, Device::Cpu));
                        let mut held = Held::default();
                        held.hold_all(&buffers, config.supra().is_some());
                        assert_eq!(
                            held.0.values().sum::<usize>(),
                            planned(&config, precision, policy),
                            "{attention:?}, {policy}, {kind:?}, {} tokens",
                            config.vocab
                        );
                    }
                }
            }
        }
    }
}
