//! Batches read through slots, one sequence per row.

use supra_worker::model::{
    Documents, Params, Slots, Transformer, attention::ragged::Span, slots::SlotLayer,
};
use tch::Tensor;

/// A model with one slot per row of a batch.
pub struct Sequences<'a> {
    pub model: &'a Transformer,
    pub params: &'a Params,
    pub slots: Slots,
}

impl<'a> Sequences<'a> {
    pub fn new(model: &'a Transformer, params: &'a Params, rows: i64) -> Sequences<'a> {
        let config = model.config();
        Sequences {
            model,
            params,
            slots: Slots::new(config, rows as usize, params.device(), params.kind()).unwrap(),
        }
    }

    /// Logits [B, T, V] of T more tokens of each row.
    pub fn extend(&mut self, ids_bt: &Tensor) -> Tensor {
        let (rows, tokens) = ids_bt.size2().unwrap();
        let spans: Vec<Span> = (0..rows as usize)
            .map(|slot| Span { slot, tokens })
            .collect();
        self.read(&ids_bt.flatten(0, 1), &spans)
            .view([rows, tokens, -1])
    }

    /// The same where documents begin with nothing, wherever they begin.
    pub fn extend_documents(&mut self, ids_bt: &Tensor, documents: &Documents) -> Tensor {
        let (rows, tokens) = ids_bt.size2().unwrap();
        let row = |slot: i64| {
            let segment = |t| documents.segments_bt.int64_value(&[slot, t]);
            let mut parts = Vec::new();
            let mut from = 0;
            while from < tokens {
                let until = (from..tokens).find(|&t| segment(t) != segment(from));
                let until = until.unwrap_or(tokens);
                let goes_on = from == 0 && segment(from) == 0;
                if !goes_on {
                    self.slots.clear(slot as usize);
                }
                let ids_n = ids_bt.get(slot).narrow(0, from, until - from);
                let slot = slot as usize;
                let tokens = until - from;
                parts.push(self.read(&ids_n, &[Span { slot, tokens }]));
                from = until;
            }
            Tensor::cat(&parts, 0)
        };
        Tensor::stack(&(0..rows).map(row).collect::<Vec<_>>(), 0)
    }

    /// Logits [B, V] of one more token of each row.
    pub fn step(&mut self, ids_b: &Tensor) -> Tensor {
        self.extend(&ids_b.unsqueeze(1)).squeeze_dim(1)
    }

    /// Logits [B, T, V] of T more tokens of each row, one after the other.
    pub fn steps(&mut self, ids_bt: &Tensor) -> Tensor {
        let steps: Vec<Tensor> = (0..ids_bt.size()[1])
            .map(|t| self.step(&ids_bt.select(1, t)))
            .collect();
        Tensor::stack(&steps, 1)
    }

    /// S [B, H, d, e] of each block of a SUPRA model.
    pub fn states(&self) -> Vec<Tensor> {
        let of = |layer: &SlotLayer| match layer {
            SlotLayer::Supra { state_shde } => state_shde.copy(),
            SlotLayer::Softmax { .. } => panic!("not a SUPRA model"),
        };
        self.slots.layers.iter().map(of).collect()
    }

    fn read(&mut self, ids_n: &Tensor, spans: &[Span]) -> Tensor {
        let x_nd = self
            .model
            .advance(self.params, &mut self.slots, ids_n, spans);
        self.model.head(self.params, &x_nd)
    }
}
