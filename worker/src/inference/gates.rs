//! Linearisation gates: how well the attention of a model stands that it is linear now.
//!
//! Measured on a small sample of text, whole rows without regard to documents, in the kind that the model computes in:
//!
//! - *form error*: the greatest difference between logits of the parallel form and of the recurrent form, which reads the sample
//!   token by token as inference does;
//! - *drift* of a block: let x be the residual stream before it when the pretrained base reads the sample. What the base's
//!   attention adds to x is compared with what this model's attention, behind its own norm, adds to the same x: the root mean
//!   square of the difference by that of the base's, and the cosine between the two. So it is the drift of one layer alone, and not
//!   of what the layers before it have led to;
//! - *dead features*: the share of the channels of relu(W q + b), and of relu(W' k + b'), that are zero at every token;
//! - *norm input*: the root mean square of what the norm of each head reads, and the same in the model before its first step.
//!   Linear attention does not divide by the sum of its weights, so it may grow without bound.
//!
//! What is of the base and of the first step is computed once, as [`Start`], from the base's weights as they are read, a block at
//! a time: no second model is ever held.

use supra_agent::{Gates, LayerGates};
use supra_recipes::{Recipe, schema::Base};
use tch::{Device, Kind, TchError, Tensor};

use crate::model::{
    self, Form, ModelConfig, ModelError, NewWeights, ParamSpec, Params, Slots, Transformer,
    attention::{Plan, attention, features::queries_keys_values, ragged::Span},
    block::LayerParams,
    norm::rms_norm,
};

/// Rows of the sample, and most tokens of each: what time and memory the gates take is as good as none beside training's.
pub const ROWS: u64 = 2;
/// See [`ROWS`].
pub const TOKENS: i64 = 256;

/// Why there are no gates.
#[derive(Debug, thiserror::Error)]
pub enum Unmeasured {
    /// Nobody wants them any more.
    #[error("stopped before all was measured")]
    Stopped,
    /// The sample's recurrent states do not fit.
    #[error("there is no memory for the states of the sample: {0}")]
    Memory(#[from] TchError),
}

/// What gates compare with, block by block.
pub struct Start {
    layers: Vec<StartLayer>,
}

struct StartLayer {
    /// Residual stream before the block of the base, and what the base's attention adds to it: [B, T, D] each, in host memory.
    base: Option<[Tensor; 2]>,
    norm_input: f64,
}

impl Start {
    /// Has the base of `recipe`, and the model of `config` as it is before its first step, read the sample `ids_bt`; computes in
    /// `kind` on the sample's device. Of no use once `stop` has said so.
    ///
    /// # Errors
    ///
    /// The base cannot be read.
    pub fn read(
        recipe: &Recipe,
        config: &ModelConfig,
        ids_bt: &Tensor,
        kind: Kind,
        stop: &dyn Fn() -> bool,
    ) -> Result<Start, ModelError> {
        let _guard = tch::no_grad_guard();
        let base = match &recipe.base {
            Base::Pretrained(path) => Some(ModelConfig::load(path)?),
            Base::Untrained(_) | Base::Random(_) => None,
        };
        let mut reading = Reading {
            model: Stream::new(config),
            base: base.as_ref().map(Stream::new),
            options: (kind, ids_bt.device()),
            ids_bt,
            stop,
            weights: Vec::new(),
            layers: Vec::new(),
        };
        let mut take = |spec: &ParamSpec, values: Tensor| reading.take(spec, &values);
        match &recipe.base {
            Base::Pretrained(path) => {
                model::load_each(path, config, NewWeights::Seeded(recipe.seed), take)?;
            }
            Base::Untrained(_) | Base::Random(_) => {
                for spec in config.params() {
                    take(&spec, model::init_one(config, recipe.seed, &spec));
                }
            }
        }
        Ok(Start {
            layers: reading.layers,
        })
    }
}

/// Weights on their way, in canonical order: the embedding, the blocks, the rest.
struct Reading<'a> {
    model: Stream,
    /// A pretrained base.
    base: Option<Stream>,
    options: (Kind, Device),
    ids_bt: &'a Tensor,
    stop: &'a dyn Fn() -> bool,
    /// Those since the last block was done.
    weights: Vec<(String, Tensor)>,
    layers: Vec<StartLayer>,
}

impl Reading<'_> {
    fn take(&mut self, spec: &ParamSpec, values: &Tensor) {
        if (self.stop)() {
            return;
        }
        let block = self.layers.len() as i64;
        if block == self.model.transformer.config().layers {
            // The last norm and the output layer.
            return;
        }
        let (kind, device) = self.options;
        let weight = values.to_kind(kind).to_device(device);
        self.weights.push((spec.name.clone(), weight));
        if spec.name == "tok_embeddings.weight" {
            let weights = Params::new(std::mem::take(&mut self.weights));
            for stream in [&mut self.model].into_iter().chain(&mut self.base) {
                stream.begin(&weights, self.ids_bt);
            }
        } else if spec.name == model::params::in_layer(block, LAST_OF_BLOCK) {
            let weights = Params::new(std::mem::take(&mut self.weights));
            let layer = StartLayer {
                norm_input: self.model.look(&weights, block).norm_input,
                base: self
                    .base
                    .as_ref()
                    .map(|base| base.attention(&weights, block)),
            };
            for stream in [&mut self.model].into_iter().chain(&mut self.base) {
                stream.pass(&weights, block);
            }
            self.layers.push(layer);
        }
    }
}

/// The weight that comes last of a block's.
const LAST_OF_BLOCK: &str = "feed_forward.w3.weight";

/// A model that reads the sample block by block, in the parallel form.
struct Stream {
    transformer: Transformer,
    /// What the blocks share, and the residual stream [B, T, D] before the next one.
    at: Option<(Plan, Tensor)>,
}

/// What is seen in a block.
struct Look {
    norm_input: f64,
    dead_queries: f64,
    dead_keys: f64,
}

impl Stream {
    fn new(config: &ModelConfig) -> Stream {
        Stream {
            transformer: Transformer::new(config.clone()).with_form(Form::Parallel),
            at: None,
        }
    }

    fn begin(&mut self, weights: &Params, ids_bt: &Tensor) {
        let plan = self.transformer.plan(weights, ids_bt, None);
        self.at = Some((plan, self.transformer.embed(weights, ids_bt)));
    }

    fn at(&self) -> (&Plan, &Tensor) {
        let (plan, x_btd) = self
            .at
            .as_ref()
            .expect("invariant: the embedding comes before the blocks");
        (plan, x_btd)
    }

    /// Goes on through the next block.
    fn pass(&mut self, weights: &Params, block: i64) {
        let (plan, x_btd) = self.at.take().expect("invariant: as above");
        let x_btd = self.transformer.block(weights, block, &plan, &x_btd);
        self.at = Some((plan, x_btd));
    }

    /// The residual stream before the block, and what the block's attention adds to it, in host memory.
    fn attention(&self, weights: &Params, block: i64) -> [Tensor; 2] {
        let (_, x_btd) = self.at();
        [x_btd, &self.attend(weights, block, x_btd)].map(|x| x.to_device(Device::Cpu))
    }

    /// What the block's attention adds to any residual stream [B, T, D].
    fn attend(&self, weights: &Params, block: i64, x_btd: &Tensor) -> Tensor {
        let (plan, _) = self.at();
        let config = self.transformer.config();
        let layer = LayerParams::new(config, weights, block);
        let normed_btd = rms_norm(x_btd, layer.attention_norm, config.norm_eps);
        attention(config, &layer, plan, &normed_btd, None)
    }

    /// Looks into the attention of a SUPRA block.
    fn look(&self, weights: &Params, block: i64) -> Look {
        let (plan, x_btd) = self.at();
        let config = self.transformer.config();
        let layer = LayerParams::new(config, weights, block);
        let normed_btd = rms_norm(x_btd, layer.attention_norm, config.norm_eps);
        let (q_bhtd, k_bhtd, v_bhte) =
            queries_keys_values(config, &layer, &plan.rotary, &normed_btd);
        let mixed_bhte = plan.mixer.mix(&q_bhtd, &k_bhtd, &v_bhte, None);
        let (queries, keys) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let dead = |first: i64, channels: i64, map: &model::attention::features::FeatureMap<'_>| {
            let rows = layer.in_proj.narrow(0, first, channels);
            let x = normed_btd.linear(&rows, None::<&Tensor>);
            let features = x.linear(map.weight, Some(map.bias));
            let greatest = features.amax([0i64, 1].as_slice(), false);
            greatest.le(0.0).to_kind(Kind::Double).mean(None::<Kind>)
        };
        let share = |first, channels, keys: bool| {
            layer.features.as_ref().map_or(0.0, |maps| {
                let map = if keys { &maps.key } else { &maps.query };
                dead(first, channels, map).double_value(&[])
            })
        };
        Look {
            norm_input: rms(&mixed_bhte),
            dead_queries: share(0, queries, false),
            dead_keys: share(queries, keys, true),
        }
    }
}

/// Root of the mean square.
fn rms(x: &Tensor) -> f64 {
    let square = x.to_kind(Kind::Double).square().mean(None::<Kind>);
    square.sqrt().double_value(&[])
}

/// Measures a SUPRA model on the sample `ids_bt`, beside what it was at its `start`, if that is known. Step and time are left to
/// whoever knows them.
///
/// # Errors
///
/// `stop` says so, which is asked at every block and token; there is no memory for the states of the sample.
pub fn measure(
    config: &ModelConfig,
    params: &Params,
    ids_bt: &Tensor,
    start: Option<&Start>,
    stop: &dyn Fn() -> bool,
) -> Result<Gates, Unmeasured> {
    let _guard = tch::no_grad_guard();
    let mut stream = Stream::new(config);
    stream.begin(params, ids_bt);
    let mut layers = Vec::new();
    for block in 0..config.layers {
        if stop() {
            return Err(Unmeasured::Stopped);
        }
        let at_start = start.and_then(|start| start.layers.get(block as usize));
        let Look {
            norm_input,
            dead_queries,
            dead_keys,
        } = stream.look(params, block);
        let (drift, cosine) = at_start
            .and_then(|at_start| at_start.base.as_ref())
            .map(|[x_btd, base_btd]| {
                let there = |x: &Tensor| x.to_device(ids_bt.device());
                let now_btd = stream.attend(params, block, &there(x_btd));
                compare(&now_btd, &there(base_btd))
            })
            .unzip();
        layers.push(LayerGates {
            drift,
            cosine,
            dead_queries,
            dead_keys,
            norm_input,
            norm_input_at_start: at_start.map(|at_start| at_start.norm_input),
        });
        stream.pass(params, block);
    }
    let (_, x_btd) = stream.at();
    let logits_btv = stream.transformer.head(params, x_btd);
    Ok(Gates {
        step: 0,
        form_error: form_error(config, params, ids_bt, &logits_btv, stop)?,
        logit_rms: rms(&logits_btv),
        rounded: params.kind() == Kind::BFloat16,
        layers,
        seconds: 0.0,
    })
}

/// Relative difference, and cosine of the angle, of attention's output now from that of the base.
fn compare(now_btd: &Tensor, base_btd: &Tensor) -> (f64, f64) {
    let (now, base) = (
        now_btd.to_kind(Kind::Double),
        base_btd.to_kind(Kind::Double),
    );
    let norm = |x: &Tensor| x.square().sum(Kind::Double).sqrt().double_value(&[]);
    let dot = (&now * &base).sum(Kind::Double).double_value(&[]);
    (
        norm(&(&now - &base)) / norm(&base),
        dot / (norm(&now) * norm(&base)),
    )
}

/// The greatest difference of the logits of the recurrent form from these.
fn form_error(
    config: &ModelConfig,
    params: &Params,
    ids_bt: &Tensor,
    logits_btv: &Tensor,
    stop: &dyn Fn() -> bool,
) -> Result<f64, Unmeasured> {
    let transformer = Transformer::new(config.clone());
    let (rows, tokens) = (ids_bt.size()[0], ids_bt.size()[1]);
    let mut slots = Slots::new(config, rows as usize, params.device(), params.kind())?;
    let spans: Vec<Span> = (0..rows as usize)
        .map(|slot| Span { slot, tokens: 1 })
        .collect();
    let mut worst = Tensor::zeros([], (Kind::Float, params.device()));
    for token in 0..tokens {
        if stop() {
            return Err(Unmeasured::Stopped);
        }
        let ids_b = ids_bt.select(1, token);
        let x_bd = transformer.advance(params, &mut slots, &ids_b, &spans);
        let logits_bv = transformer.head(params, &x_bd).to_kind(Kind::Float);
        let error = (logits_bv - logits_btv.select(1, token).to_kind(Kind::Float)).abs();
        // NaN is handed on.
        worst = worst.maximum(&error.max());
    }
    Ok(worst.double_value(&[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AttentionKind, SupraConfig, config::tests::small, init_all};

    fn ids(vocab: i64) -> Tensor {
        (Tensor::arange(46, (Kind::Int64, Device::Cpu)) * 7)
            .remainder(vocab)
            .view([2, 23])
    }

    fn supra() -> ModelConfig {
        small(AttentionKind::Supra(SupraConfig {
            chunk: 8,
            ..SupraConfig::default()
        }))
    }

    #[test]
    fn a_sound_model_passes_and_each_fault_shows_in_its_block() {
        let config = supra();
        let mut params = init_all(&config, 3);
        let ids_bt = ids(config.vocab);
        let before = measure(&config, &params, &ids_bt, None, &|| false).unwrap();
        assert!(before.form_error < 1e-5, "{before:?}");
        assert!(before.logit_rms > 0.0 && !before.rounded);
        assert_eq!(before.layers.len() as i64, config.layers);
        for layer in &before.layers {
            assert!(layer.norm_input > 0.0 && layer.drift.is_none(), "{layer:?}");
        }
        let last = config.layers - 1;
        let name = model::params::in_layer(last, "attention._totrain_embed.bias");
        let bias = params.get(&name).shallow_clone();
        let _ = tch::no_grad(|| bias.shallow_clone().fill_(-1e3));
        let dead = measure(&config, &params, &ids_bt, None, &|| false).unwrap();
        let layer = dead.layers[last as usize];
        assert_eq!(layer.dead_queries, 1.0);
        assert_eq!(layer.norm_input, 0.0, "nothing is left to mix");
        assert_eq!(dead.layers[0], before.layers[0]);
        params = params.to(Device::Cpu, Kind::BFloat16);
        assert!(
            measure(&config, &params, &ids_bt, None, &|| false)
                .unwrap()
                .rounded
        );
        assert!(measure(&config, &params, &ids_bt, None, &|| true).is_err());
    }

    #[test]
    fn what_is_equal_has_no_drift_and_what_is_opposite_has_twice_its_size() {
        let x_btd = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([1, 3, 4]);
        let (drift, cosine) = compare(&x_btd, &x_btd);
        assert!(drift == 0.0 && (cosine - 1.0).abs() < 1e-12);
        let (drift, cosine) = compare(&-&x_btd, &x_btd);
        assert!((drift - 2.0).abs() < 1e-12 && (cosine + 1.0).abs() < 1e-12);
    }
}
