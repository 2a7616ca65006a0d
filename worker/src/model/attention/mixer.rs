//! How the tokens of one batch are mixed: decided once, used by every block.

use tch::Tensor;

use super::chunkwise::Chunkwise;
use super::parallel::Parallel;
use super::recurrent::Recurrent;
use super::rotary::Rotary;
use super::softmax::Mask;
use crate::model::state::LayerState;

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
    /// Softmax attention.
    Softmax(Mask),
    /// SUPRA, quadratic.
    Parallel(Parallel),
    /// SUPRA, by chunks.
    Chunkwise(Chunkwise),
    /// SUPRA, one token.
    Recurrent(Recurrent),
}

impl Mixer {
    /// o [B, H, T, e] of q, k [B, H, T, d] and v [B, H, T, e]. A `state` is read and moved on.
    ///
    /// # Panics
    /// If the state is of another kind of attention, or the form needs one and there is none: [`Plan`]s and states are
    /// made together by [`crate::model::Transformer`].
    pub fn mix(
        &self,
        q_bhtd: &Tensor,
        k_bhtd: &Tensor,
        v_bhte: &Tensor,
        state: Option<&mut LayerState>,
    ) -> Tensor {
        match (self, state) {
            (Mixer::Softmax(mask), None) => mask.mix(q_bhtd, k_bhtd, v_bhte),
            (Mixer::Softmax(mask), Some(LayerState::Softmax { k_bhsd, v_bhse })) => {
                *k_bhsd = Tensor::cat(&[&*k_bhsd, k_bhtd], 2);
                *v_bhse = Tensor::cat(&[&*v_bhse, v_bhte], 2);
                mask.mix(q_bhtd, k_bhsd, v_bhse)
            }
            (Mixer::Parallel(form), None) => form.mix(q_bhtd, k_bhtd, v_bhte),
            (Mixer::Chunkwise(form), None) => form.mix(q_bhtd, k_bhtd, v_bhte),
            (Mixer::Chunkwise(form), Some(LayerState::Supra { state_bhde })) => {
                let (o_bhte, after) = form.mix_from(q_bhtd, k_bhtd, v_bhte, state_bhde);
                *state_bhde = after;
                o_bhte
            }
            (Mixer::Recurrent(form), Some(LayerState::Supra { state_bhde })) => {
                let (o_bhte, after) = form.step(q_bhtd, k_bhtd, v_bhte, state_bhde);
                *state_bhde = after;
                o_bhte
            }
            (form, state) => panic!("invariant: {form:?} does not go with the state {state:?}"),
        }
    }
}
