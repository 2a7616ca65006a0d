//! Several sequences at once, each going on from its own slot by a number of tokens of its own.
//!
//! Their tokens stand one after the other in one row, so projections and feed-forward layers see a single matrix without
//! padding; only here they are taken apart. Sequences that go on by one token are mixed together, recurrently; longer pieces
//! one by one, by chunks, as whoever asks computes those.

use std::collections::BTreeMap;

use tch::{Device, IndexOp, Kind, Tensor};

use super::cache::Cache;
use super::decay::slopes;
use super::features::repeat_heads;
use super::recurrent::Recurrent;
use crate::model::slots::{SlotLayer, Slots};
use crate::model::{AttentionKind, ModelConfig, accumulate_kind};

/// The tokens of one sequence in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The slot that they go on from.
    pub slot: usize,
    /// How many.
    pub tokens: i64,
}

/// The positions [1, n] of the next tokens of sequences, one after the other, which from here on these have.
pub fn next_positions(spans: &[Span], slots: &mut Slots) -> Tensor {
    let mut positions = Vec::new();
    for &Span { slot, tokens } in spans {
        let position = &mut slots.positions_s[slot];
        positions.extend(*position..*position + tokens);
        *position += tokens;
    }
    Tensor::from_slice(&positions).unsqueeze(0)
}

/// How the tokens of such a row are mixed; `P` is what longer pieces of SUPRA need, for each length.
#[derive(Debug)]
pub struct Ragged<P> {
    spans: Vec<Span>,
    /// Spans of one token, which come first.
    singles: i64,
    /// In which everything is computed, and on which device.
    options: (Kind, Device),
    form: Form<P>,
}

#[derive(Debug)]
enum Form<P> {
    /// The form of single tokens, and that of each length of a longer piece.
    Supra {
        single: Recurrent,
        longer: BTreeMap<i64, P>,
    },
    /// Key/value heads.
    Softmax { kv_heads: i64 },
}

/// A piece of one sequence, of t tokens. Its keys are scaled already.
pub struct Piece<'a> {
    /// q [1, H, t, d], k [1, K, t, d], v [1, K, t, e]: K divides H.
    pub qkv: [&'a Tensor; 3],
    /// The state [1, H, d, e] before it, to become that behind it.
    pub state: &'a mut Tensor,
    /// To be filled: [1, H, t, e].
    pub o: &'a mut Tensor,
}

impl<P> Ragged<P> {
    /// For `spans` in the order of their tokens, those of a single token first, no slot twice; of a model that computes in the kind,
    /// and on the device, of `options`. `longer` makes what pieces need from the decay's slopes, the length of chunks and that of
    /// the piece.
    ///
    /// # Panics
    /// If a single token stands behind a longer span.
    pub fn new(
        config: &ModelConfig,
        spans: &[Span],
        options: (Kind, Device),
        longer: impl Fn(&[f64], i64, i64) -> P,
    ) -> Ragged<P> {
        let singles = spans.iter().take_while(|span| span.tokens == 1).count();
        assert!(
            spans[singles..].iter().all(|span| span.tokens > 1),
            "invariant: single tokens come first"
        );
        let (kind, device) = options;
        let (kind, form) = match &config.attention {
            AttentionKind::Softmax => (
                kind,
                Form::Softmax {
                    kv_heads: config.kv_heads,
                },
            ),
            AttentionKind::Supra(supra) => {
                let slopes_h = slopes(supra.decay, config.heads);
                let kind = accumulate_kind(kind);
                let lengths = spans[singles..].iter().map(|span| span.tokens);
                let form = Form::Supra {
                    single: Recurrent::new(&slopes_h, (kind, device)),
                    longer: lengths
                        .map(|tokens| (tokens, longer(&slopes_h, supra.chunk, tokens)))
                        .collect(),
                };
                (kind, form)
            }
        };
        Ragged {
            spans: spans.to_vec(),
            singles: singles as i64,
            options: (kind, device),
            form,
        }
    }

    /// Kind in which it computes, and device: those of an `o` that loses nothing.
    pub fn options(&self) -> (Kind, Device) {
        self.options
    }

    /// `o_1hne` [1, H, n, e] of q [1, H, n, d], k [1, K, n, d] and v [1, K, n, e], n tokens of all spans, where K is the number of
    /// key/value heads or H. `piece` computes the longer pieces of SUPRA. The slots move on.
    ///
    /// # Panics
    /// If the memory is of another kind of attention.
    pub fn mix(
        &self,
        [q_1hnd, k_1knd, v_1kne]: [&Tensor; 3],
        memory: &mut SlotLayer,
        o_1hne: &Tensor,
        piece: impl Fn(&P, Piece<'_>),
    ) {
        let heads = q_1hnd.size()[1];
        let o = |start, tokens| o_1hne.narrow(2, start, tokens);
        match (&self.form, memory) {
            (Form::Supra { single, longer }, SlotLayer::Supra { state_shde }) => {
                if self.singles > 0 {
                    let qkv = [q_1hnd, k_1knd, v_1kne].map(|x| {
                        let x = x.narrow(2, 0, self.singles).to_kind(self.options.0);
                        repeat_heads(&x, heads).transpose(0, 2)
                    });
                    let o_sh1e = single.advance(qkv.each_ref(), state_shde, &self.single_slots());
                    o(0, self.singles).copy_(&o_sh1e.transpose(0, 2));
                }
                for (span, start) in self.longer() {
                    let qkv = [q_1hnd, k_1knd, v_1kne].map(|x| x.narrow(2, start, span.tokens));
                    piece(
                        &longer[&span.tokens],
                        Piece {
                            qkv: qkv.each_ref(),
                            state: &mut state_shde.i(span.slot as i64).unsqueeze(0),
                            o: &mut o(start, span.tokens),
                        },
                    );
                }
            }
            (&Form::Softmax { kv_heads }, SlotLayer::Softmax { caches }) => {
                let mut start = 0;
                for span in &self.spans {
                    let take = |x: &Tensor| x.narrow(2, start, span.tokens);
                    let once = |x: &Tensor| take(x).slice(1, None, None, x.size()[1] / kv_heads);
                    let cache = &mut caches[span.slot];
                    cache.append(&once(k_1knd), &once(v_1kne));
                    o(start, span.tokens).copy_(&look(&take(q_1hnd), cache));
                    start += span.tokens;
                }
            }
            _ => panic!("invariant: each kind of attention goes with slots of its own kind"),
        }
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
