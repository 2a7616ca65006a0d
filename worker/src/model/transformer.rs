//! The whole network: token ids to logits, in training and in inference.

use tch::{Device, Kind, Tensor};

use super::attention::chunkwise::Chunkwise;
use super::attention::decay::slopes;
use super::attention::parallel::Parallel;
use super::attention::ragged::{Ragged, Span, next_positions};
use super::attention::rotary::Rotary;
use super::attention::softmax::Mask;
use super::attention::{Mixer, Plan};
use super::block::{LayerParams, block};
use super::norm::rms_norm;
use super::{
    AttentionKind, Documents, LossInput, LossSum, ModelConfig, Params, Slots, SupraConfig,
    accumulate_kind, loss,
};

/// Which form of SUPRA's attention computes whole sequences. All give the same result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// By chunks: linear in the number of tokens.
    #[default]
    Chunkwise,
    /// The quadratic form: the reference for tests.
    Parallel,
}

/// A network without its weights: those are given to each call, because training keeps several copies.
///
/// Token ids must lie inside the vocabulary, documents and weights on the same device as the ids.
#[derive(Clone, Debug)]
pub struct Transformer {
    config: ModelConfig,
    form: Form,
}

impl Transformer {
    /// The network of this shape.
    pub fn new(config: ModelConfig) -> Transformer {
        Transformer {
            config,
            form: Form::default(),
        }
    }

    /// The same network with another form of attention over whole sequences.
    pub fn with_form(self, form: Form) -> Transformer {
        Transformer { form, ..self }
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Logits [B, T, V] of ids [B, T], in the kind of the weights.
    pub fn logits(
        &self,
        params: &Params,
        ids_bt: &Tensor,
        documents: Option<&Documents>,
    ) -> Tensor {
        let plan = self.plan(params, ids_bt, documents);
        let mut x_btd = self.embed(params, ids_bt);
        for layer in 0..self.config.layers {
            x_btd = self.block(params, layer, &plan, &x_btd);
        }
        self.head(params, &x_btd)
    }

    /// Summed loss of a micro-batch, plus `z_loss` times the sum of squared log-normalizers. Evaluation and tests use it;
    /// training has [`crate::step`].
    pub fn loss_sum(&self, params: &Params, input: &LossInput, z_loss: f64) -> LossSum {
        let logits_btv = self.logits(params, &input.inputs_bt, input.documents.as_ref());
        loss::loss_sum(&logits_btv, &input.targets_bt, &input.mask_bt, z_loss)
    }

    /// Several sequences at once, each going on from its slot: the residual stream [n, D] behind the last block for ids [n],
    /// the tokens of all `spans` one after the other. Spans of a single token come first, and no slot is named twice. The
    /// slots move on.
    pub fn advance(
        &self,
        params: &Params,
        slots: &mut Slots,
        ids_n: &Tensor,
        spans: &[Span],
    ) -> Tensor {
        let (kind, device) = (params.kind(), params.device());
        let positions_1n = next_positions(spans, slots).to_device(device);
        let piece = |slopes_h: &[f64], chunk, tokens| {
            let options = (accumulate_kind(kind), device);
            Chunkwise::new(slopes_h, chunk, tokens, None, options)
        };
        let plan = Plan {
            rotary: Rotary::new(&self.config, &positions_1n, kind),
            mixer: Mixer::Ragged(Ragged::new(&self.config, spans, (kind, device), piece)),
        };
        let mut x_1nd = self.embed(params, &ids_n.unsqueeze(0));
        for (layer, memory) in (0..).zip(&mut slots.layers) {
            let weights = LayerParams::new(&self.config, params, layer);
            x_1nd = block(&self.config, &weights, &plan, &x_1nd, Some(memory));
        }
        x_1nd.squeeze_dim(0)
    }

    /// What the blocks share when they read whole sequences ids [B, T].
    pub fn plan(&self, params: &Params, ids_bt: &Tensor, documents: Option<&Documents>) -> Plan {
        let tokens = ids_bt.size()[1];
        let options = (params.kind(), params.device());
        let mixer = match &self.config.attention {
            AttentionKind::Softmax => Mixer::Softmax(Mask::new(tokens, documents, options.1)),
            AttentionKind::Supra(supra) => match self.form {
                Form::Chunkwise => self.chunkwise(supra, tokens, documents, options),
                Form::Parallel => Mixer::Parallel(Parallel::new(
                    &slopes(supra.decay, self.config.heads),
                    tokens,
                    documents,
                    (accumulate_kind(options.0), options.1),
                )),
            },
        };
        let positions_xt = match documents {
            Some(documents) => documents.positions_bt.shallow_clone(),
            None => Tensor::arange(tokens, (Kind::Int64, options.1)).unsqueeze(0),
        };
        Plan {
            rotary: Rotary::new(&self.config, &positions_xt, options.0),
            mixer,
        }
    }

    fn chunkwise(
        &self,
        supra: &SupraConfig,
        tokens: i64,
        documents: Option<&Documents>,
        (kind, device): (Kind, Device),
    ) -> Mixer {
        let slopes_h = slopes(supra.decay, self.config.heads);
        Mixer::Chunkwise(Chunkwise::new(
            &slopes_h,
            supra.chunk,
            tokens,
            documents.map(|documents| &documents.segments_bt),
            (accumulate_kind(kind), device),
        ))
    }

    /// Residual stream [B, T, D] before the first block.
    pub fn embed(&self, params: &Params, ids_bt: &Tensor) -> Tensor {
        Tensor::embedding(
            params.get("tok_embeddings.weight"),
            ids_bt,
            -1,
            false,
            false,
        )
    }

    /// Residual stream [B, T, D] through block `layer`.
    pub fn block(&self, params: &Params, layer: i64, plan: &Plan, x_btd: &Tensor) -> Tensor {
        block(
            &self.config,
            &LayerParams::new(&self.config, params, layer),
            plan,
            x_btd,
            None,
        )
    }

    /// Logits [B, T, V] of the residual stream [B, T, D] after the last block; likewise without B.
    pub fn head(&self, params: &Params, x_btd: &Tensor) -> Tensor {
        let output = if self.config.tied {
            "tok_embeddings.weight"
        } else {
            "output.weight"
        };
        rms_norm(x_btd, params.get("norm.weight"), self.config.norm_eps)
            .linear(params.get(output), None::<&Tensor>)
    }
}
