//! How the tokens of one batch are mixed: decided once, used by every block.

use tch::Tensor;

use super::chunkwise::Chunkwise;
use super::parallel::Parallel;
use super::ragged::Ragged;
use super::rotary::Rotary;
use super::softmax::Mask;
use crate::model::slots::SlotLayer;

/// Everything about a batch that its blocks share.
#[derive(Debug)]
pub struct Plan {
    /// Rotation of queries and keys.
    pub rotary: Rotary,
    /// Mixing of the tokens.
    pub mixer: Mixer,
}

/// One of the forms of attention, with its tables.
#[derive(Debug)]
pub enum Mixer {
    /// Softmax attention over whole sequences.
    Softmax(Mask),
    /// SUPRA, quadratic.
    Parallel(Parallel),
    /// SUPRA, by chunks.
    Chunkwise(Chunkwise),
    /// Either attention, going on from slots.
    Ragged(Ragged<Chunkwise>),
}

impl Mixer {
    /// o [B, H, T, e] of q, k [B, H, T, d] and v [B, H, T, e]. A `memory` is read and moved on.
    ///
    /// # Panics
    /// If the form needs a memory and there is none, or the other way round: [`Plan`]s and memories are brought together by
    /// [`crate::model::Transformer`].
    pub fn mix(
        &self,
        q_bhtd: &Tensor,
        k_bhtd: &Tensor,
        v_bhte: &Tensor,
        memory: Option<&mut SlotLayer>,
    ) -> Tensor {
        match (self, memory) {
            (Mixer::Softmax(mask), None) => mask.mix(q_bhtd, k_bhtd, v_bhte),
            (Mixer::Parallel(form), None) => form.mix(q_bhtd, k_bhtd, v_bhte),
            (Mixer::Chunkwise(form), None) => form.mix(q_bhtd, k_bhtd, v_bhte),
            (Mixer::Ragged(form), Some(memory)) => {
                let o = Tensor::empty(q_bhtd.size(), form.options());
                form.mix([q_bhtd, k_bhtd, v_bhte], memory, &o, Chunkwise::go_on);
                o
            }
            (form, memory) => panic!("invariant: {form:?} does not go with {memory:?}"),
        }
    }
}
