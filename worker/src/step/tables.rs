//! What the blocks share about the rows of a micro-batch.

use tch::{Device, Kind, Tensor};

use crate::{
    kernels::DecayTables,
    model::{
        AttentionKind, Documents, ModelConfig,
        attention::{
            decay::slopes,
            ragged::{Ragged, Span},
            rotary::Rotary,
            softmax::Mask,
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
    /// Either, of sequences that go on from slots.
    Slots(Ragged<DecayTables>),
}

impl Tables {
    /// For whole rows of `tokens` tokens, of a model that computes in `kind` on `device`.
    pub fn new(config: &ModelConfig, tokens: i64, (kind, device): (Kind, Device)) -> Tables {
        let positions_1t = Tensor::arange(tokens, (Kind::Int64, device)).unsqueeze(0);
        let (cos_xtp, sin_xtp) = Rotary::new(config, &positions_1t, kind).tables();
        Tables {
            sight: Sight::new(config, &cos_xtp, None),
            cos_xtp,
            sin_xtp,
        }
    }

    /// For one row of pieces of sequences, whose tokens are at `positions_1n` of them.
    pub fn of_pieces(
        config: &ModelConfig,
        spans: &[Span],
        positions_1n: &Tensor,
        kind: Kind,
    ) -> Tables {
        let (cos_xtp, sin_xtp) = Rotary::new(config, positions_1n, kind).tables();
        let options = (kind, positions_1n.device());
        let decay = |slopes_h: &[f64], chunk, tokens| {
            let options = (cos_xtp.kind(), options.1);
            DecayTables::new(slopes_h.to_vec(), chunk, tokens, None, options)
        };
        Tables {
            sight: Sight::Slots(Ragged::new(config, spans, options, decay)),
            cos_xtp,
            sin_xtp,
        }
    }

    /// The same for rows that are packed documents.
    pub fn within(&self, config: &ModelConfig, documents: &Documents) -> Tables {
        // Positions inside documents are positions of the row, so their angles are there.
        let positions_n = documents.positions_bt.flatten(0, 1);
        let rows = documents.positions_bt.size();
        let pick = |table_1tp: &Tensor| {
            let picked_np = table_1tp.squeeze_dim(0).index_select(0, &positions_n);
            picked_np.view([rows[0], rows[1], -1])
        };
        Tables {
            cos_xtp: pick(&self.cos_xtp),
            sin_xtp: pick(&self.sin_xtp),
            sight: Sight::new(config, &self.cos_xtp, Some(documents)),
        }
    }
}

impl Sight {
    /// For rows as long as the rotary table, and in its kind and on its device.
    fn new(config: &ModelConfig, cos_xtp: &Tensor, documents: Option<&Documents>) -> Sight {
        let tokens = cos_xtp.size()[1];
        match &config.attention {
            AttentionKind::Softmax => {
                Sight::Softmax(Mask::new(tokens, documents, cos_xtp.device()))
            }
            AttentionKind::Supra(supra) => Sight::Supra(DecayTables::new(
                slopes(supra.decay, config.heads),
                supra.chunk,
                tokens,
                documents.map(|documents| documents.segments_bt.shallow_clone()),
                (cos_xtp.kind(), cos_xtp.device()),
            )),
        }
    }
}
