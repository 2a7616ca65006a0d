//! What the blocks share about the rows of a micro-batch.

use tch::{Device, Kind, Tensor};

use crate::{
    kernels::DecayTables,
    model::{
        AttentionKind, Documents, ModelConfig, accumulate_kind,
        attention::{
            decay::slopes,
            rotary::Rotary,
            softmax::{Mask, Past},
        },
    },
};

/// Rotation and sight of the tokens.
pub struct Tables {
    /// Rotary cosines [x, T, d/2]; x is 1, or B with documents.
    pub cos_xtp: Tensor,
    /// Rotary sines.
    pub sin_xtp: Tensor,
    /// Who sees whom.
    pub sight: Sight,
}

/// Who sees whom, and how well.
pub enum Sight {
    /// Softmax attention.
    Softmax(Mask),
    /// SUPRA.
    Supra(DecayTables),
}

impl Tables {
    /// For rows of `tokens` tokens of a model that computes in `kind` on `device`.
    pub fn new(
        config: &ModelConfig,
        tokens: i64,
        documents: Option<&Documents>,
        (kind, device): (Kind, Device),
    ) -> Tables {
        let positions_xt = match documents {
            Some(documents) => documents.positions_bt.shallow_clone(),
            None => Tensor::arange(tokens, (Kind::Int64, device)).unsqueeze(0),
        };
        let (cos_xtp, sin_xtp) = Rotary::new(config, &positions_xt, kind).tables();
        let sight = match &config.attention {
            AttentionKind::Softmax => {
                Sight::Softmax(Mask::new(&Past::default(), tokens, documents, device))
            }
            AttentionKind::Supra(supra) => Sight::Supra(DecayTables::new(
                slopes(supra.decay, config.heads),
                supra.chunk,
                tokens,
                documents.map(|documents| documents.segments_bt.shallow_clone()),
                (accumulate_kind(kind), device),
            )),
        };
        Tables {
            cos_xtp,
            sin_xtp,
            sight,
        }
    }
}
