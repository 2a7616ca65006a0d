//! Several sequences at once, each going on from its own slot by a number of tokens of its own.
//!
//! Their tokens stand one after the other in one row, so projections and feed-forward layers see a single matrix without
//! padding; only here they are taken apart. Sequences that go on by one token are mixed together, recurrently; longer pieces
//! one by one, by chunks.

use std::collections::BTreeMap;

use tch::{Device, IndexOp, Kind, Tensor};

use super::cache::Cache;
use super::chunkwise::Chunkwise;
use super::decay::slopes;
use super::features::repeat_heads;
use super::recurrent::Recurrent;
use crate::model::slots::SlotLayer;
use crate::model::{AttentionKind, ModelConfig, accumulate_kind};

/// The tokens of one sequence in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The slot that they go on from.
    pub slot: usize,
    /// How many.
    pub tokens: i64,
}

/// How the tokens of such a row are mixed.
#[derive(Debug)]
pub struct Ragged {
    spans: Vec<Span>,
    /// Spans of one token, which come first.
    singles: i64,
    form: Form,
}

#[derive(Debug)]
enum Form {
    /// The kind in which SUPRA is computed, the form of single tokens, and that of each length of a longer piece.
    Supra {
        kind: Kind,
        single: Recurrent,
        longer: BTreeMap<i64, Chunkwise>,
    },
    /// Query heads per key/value head.
    Softmax { group: i64 },
}

impl Ragged {
    /// For `spans` in the order of their tokens, those of a single token first, no slot twice; of a model that computes in the kind,
    /// and on the device, of `options`.
    ///
    /// # Panics
    /// If a single token stands behind a longer span.
    pub fn new(config: &ModelConfig, spans: &[Span], options: (Kind, Device)) -> Ragged {
        let singles = spans.iter().take_while(|span| span.tokens == 1).count();
        assert!(
            spans[singles..].iter().all(|span| span.tokens > 1),
            "invariant: single tokens come first"
        );
        let form = match &config.attention {
            AttentionKind::Softmax => Form::Softmax {
                group: config.group(),
            },
            AttentionKind::Supra(supra) => {
                let slopes_h = slopes(supra.decay, config.heads);
                let kind = accumulate_kind(options.0);
                let options = (kind, options.1);
                let tables = |tokens| Chunkwise::new(&slopes_h, supra.chunk, tokens, None, options);
                let lengths = spans[singles..].iter().map(|span| span.tokens);
                Form::Supra {
                    kind,
                    single: Recurrent::new(&slopes_h, options),
                    longer: lengths.map(|tokens| (tokens, tables(tokens))).collect(),
                }
            }
        };
        Ragged {
            spans: spans.to_vec(),
            singles: singles as i64,
            form,
        }
    }

    /// o [1, H, n, e] of q, k [1, H, n, d] and v [1, H, n, e], n tokens of all spans. The slots move on.
    ///
    /// # Panics
    /// If the memory is of another kind of attention.
    pub fn mix(&self, [q_1hnd, k_1hnd, v_1hne]: [&Tensor; 3], memory: &mut SlotLayer) -> Tensor {
        let mut parts = Vec::with_capacity(self.spans.len());
        match (&self.form, memory) {
            (
                Form::Supra {
                    kind,
                    single,
                    longer,
                },
                SlotLayer::Supra { state_shde },
            ) => {
                let take = |start, tokens| {
                    [q_1hnd, k_1hnd, v_1hne].map(|x| x.narrow(2, start, tokens).to_kind(*kind))
                };
                if self.singles > 0 {
                    let qkv = take(0, self.singles).map(|x_1hsd| x_1hsd.transpose(0, 2));
                    let o_sh1e = single.advance(qkv.each_ref(), state_shde, &self.single_slots());
                    parts.push(o_sh1e.transpose(0, 2));
                }
                for (span, start) in self.longer() {
                    let [q, k, v] = take(start, span.tokens);
                    let mut state = state_shde.i(span.slot as i64).unsqueeze(0);
                    let (o, after) = longer[&span.tokens].mix_from(&q, &k, &v, &state);
                    state.copy_(&after);
                    parts.push(o);
                }
            }
            (&Form::Softmax { group }, SlotLayer::Softmax { caches }) => {
                let mut start = 0;
                for span in &self.spans {
                    let take = |x: &Tensor| x.narrow(2, start, span.tokens);
                    let once = |x: &Tensor| take(x).slice(1, None, None, group);
                    let cache = &mut caches[span.slot];
                    cache.append(&once(k_1hnd), &once(v_1hne));
                    parts.push(look(&take(q_1hnd), cache));
                    start += span.tokens;
                }
            }
            (form, _) => panic!("invariant: {form:?} goes with slots of its own kind"),
        }
        Tensor::cat(&parts, 2)
    }

    fn single_slots(&self) -> Vec<i64> {
        let singles = &self.spans[..self.singles as usize];
        singles.iter().map(|span| span.slot as i64).collect()
    }

    /// The spans of more than one token, and where they begin in the row.
    fn longer(&self) -> impl Iterator<Item = (&Span, i64)> {
        let mut start = self.singles;
        self.spans[self.singles as usize..].iter().map(move |span| {
            let begin = start;
            start += span.tokens;
            (span, begin)
        })
    }
}

/// What the last t tokens of a cache, with queries [1, H, t, d], see of it: [1, H, t, e].
fn look(q_1htd: &Tensor, cache: &Cache) -> Tensor {
    let [k_1ksd, v_1kse] = cache.all();
    let (heads, new, all) = (q_1htd.size()[1], q_1htd.size()[2], cache.tokens());
    let attend = |k: &Tensor, v: &Tensor, mask, causal, grouped| {
        Tensor::scaled_dot_product_attention(q_1htd, k, v, mask, 0.0, causal, None::<f64>, grouped)
    };
    if new == 1 || new == all {
        return attend(&k_1ksd, &v_1kse, None, new > 1, true);
    }
    let options = (Kind::Bool, q_1htd.device());
    let before_ts = Tensor::ones([new, all], options).tril(all - new);
    // With a mask libtorch's frugal kernels want as many key heads as query heads.
    let [k_1hsd, v_1hse] = [k_1ksd, v_1kse].map(|x| repeat_heads(&x, heads));
    attend(&k_1hsd, &v_1hse, Some(before_ts), false, false)
}
