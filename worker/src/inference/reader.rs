//! Reading several tokens of sequences at once by the forward pass of training, whose kernels are the fastest there are.

use std::rc::Rc;

use tch::Tensor;

use crate::{
    kernels::{KernelError, Kernels},
    model::{
        ModelConfig, Params, Slots,
        attention::ragged::{Span, next_positions},
        block::LayerParams,
    },
    step::{block::Block, buffers::BlockBuffers, tables::Tables},
};

/// Reads what [`Transformer::advance`](crate::model::Transformer::advance) reads, and means the same.
pub struct Reader {
    kernels: Rc<dyn Kernels>,
}

impl Reader {
    /// By these kernels.
    pub fn new(kernels: Rc<dyn Kernels>) -> Reader {
        Reader { kernels }
    }

    /// The residual stream [n, D] behind the last block for ids [n], the tokens of all `spans` one after the other. Spans of a
    /// single token come first, and no slot is named twice. The slots move on.
    ///
    /// # Errors
    /// A kernel did not run: then slots and result are of no use.
    pub fn advance(
        &self,
        config: &ModelConfig,
        params: &Params,
        slots: &mut Slots,
        ids_n: &Tensor,
        spans: &[Span],
    ) -> Result<Tensor, KernelError> {
        let (kind, device) = (params.kind(), params.device());
        let rows = (1, ids_n.size()[0]);
        let positions_1n = next_positions(spans, slots).to_device(device);
        let tables = Tables::of_pieces(config, spans, &positions_1n, kind);
        // One block's buffers serve all of them.
        let mut at = BlockBuffers::new(config, rows, (kind, device));
        let work_nd = at.x_in_nd.empty_like();
        let embedding_vd = params.get("tok_embeddings.weight");
        let _ = embedding_vd.index_select_out(&at.x_in_nd, 0, ids_n);
        let mut before = None;
        for (layer, memory) in (0..).zip(&mut slots.layers) {
            let block = Block {
                config,
                kernels: self.kernels.as_ref(),
                tables: &tables,
                rows,
                weights: LayerParams::new(config, params, layer),
            };
            block.forward(before.as_ref(), &mut at, &work_nd, Some(memory));
            before = Some(at.x_mid_nd.shallow_clone());
        }
        self.kernels.check()?;
        Ok(at.x_mid_nd + work_nd)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        kernels::Twin,
        model::{AttentionKind, SupraConfig, Transformer, config::tests::small, init_all},
    };

    const OPTIONS: (Kind, Device) = (Kind::Double, Device::Cpu);

    /// Turns of spans: pieces alone, single tokens before pieces of equal and of different lengths, in slots out of order.
    const TURNS: [&[(usize, i64)]; 4] = [
        &[(2, 150)],
        &[(2, 1), (0, 1), (3, 40), (1, 40)],
        &[(1, 1), (3, 7), (2, 90), (0, 2)],
        &[(0, 1), (3, 1)],
    ];

    #[test]
    fn what_it_reads_is_what_the_model_reads() {
        let _guard = tch::no_grad_guard();
        let supra = |qk_norm| {
            AttentionKind::Supra(SupraConfig {
                qk_norm,
                ..SupraConfig::default()
            })
        };
        for attention in [AttentionKind::Softmax, supra(false), supra(true)] {
            let config = small(attention);
            let weights = init_all(&config, 5).to(OPTIONS.1, OPTIONS.0);
            let model = Transformer::new(config.clone());
            let reader = Reader::new(Rc::new(Twin));
            let [mut slots, mut expected] =
                [(); 2].map(|()| Slots::new(&config, 4, OPTIONS.1, OPTIONS.0).unwrap());
            for turn in TURNS {
                let spans: Vec<Span> = turn
                    .iter()
                    .map(|&(slot, tokens)| Span { slot, tokens })
                    .collect();
                let n = spans.iter().map(|span| span.tokens).sum::<i64>();
                let ids_n = Tensor::randint(config.vocab, [n], (Kind::Int64, OPTIONS.1));
                let found = reader.advance(&config, &weights, &mut slots, &ids_n, &spans);
                let right = model.advance(&weights, &mut expected, &ids_n, &spans);
                let same = |x: &Tensor, y: &Tensor| x.allclose(y, 1e-9, 1e-11, false);
                assert!(same(&found.unwrap(), &right), "{attention:?}, {turn:?}");
                for slot in 0..4 {
                    let both = slots.tensors(slot).into_iter().zip(expected.tensors(slot));
                    for ((name, x), (_, y)) in both {
                        assert!(same(&x, &y), "{attention:?}, {turn:?}: {name} of {slot}");
                    }
                }
            }
            assert_eq!(slots.positions_s, expected.positions_s);
        }
    }
}
