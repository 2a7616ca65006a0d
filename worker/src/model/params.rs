//! Names, shapes and values of the weights.
//!
//! Inside the program every weight has its published name (those of the reference training code), whatever the
//! attention; Hugging Face names exist only at the border, in [`super::files`]. All matrices are [out, in].

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::ModelConfig;

/// What a weight is called and looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Published name.
    pub name: String,
    /// Shape.
    pub shape: Vec<i64>,
    /// Whether weight decay shrinks it: matrices, not norms and biases.
    pub decayed: bool,
    /// Whether a softmax base lacks it, so that conversion has to make it.
    pub new: bool,
}

impl ParamSpec {
    fn base(name: impl Into<String>, shape: &[i64]) -> ParamSpec {
        ParamSpec {
            name: name.into(),
            shape: shape.to_vec(),
            decayed: shape.len() > 1,
            new: false,
        }
    }

    fn new(name: impl Into<String>, shape: &[i64]) -> ParamSpec {
        ParamSpec {
            new: true,
            ..ParamSpec::base(name, shape)
        }
    }

    /// Number of values.
    pub fn elements(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// Name of a weight of one block: `in_layer(0, "w")` is `layers.0.w`.
pub fn in_layer(layer: i64, name: &str) -> String {
    format!("layers.{layer}.{name}")
}

impl ModelConfig {
    /// All weights in canonical order: embedding, blocks from the first, last norm, output.
    pub fn params(&self) -> Vec<ParamSpec> {
        let mut specs = vec![ParamSpec::base(
            "tok_embeddings.weight",
            &[self.vocab, self.dim],
        )];
        (0..self.layers).for_each(|layer| self.layer_params(layer, &mut specs));
        specs.push(ParamSpec::base("norm.weight", &[self.dim]));
        if !self.tied {
            specs.push(ParamSpec::base("output.weight", &[self.vocab, self.dim]));
        }
        specs
    }

    fn layer_params(&self, layer: i64, specs: &mut Vec<ParamSpec>) {
        let name = |name| in_layer(layer, name);
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        specs.push(ParamSpec::base(name("attention_norm.weight"), &[self.dim]));
        specs.push(ParamSpec::base(
            name("attention.in_proj.weight"),
            &[queries + 2 * keys, self.dim],
        ));
        if let Some(supra) = self.supra() {
            specs.push(ParamSpec::new(
                name("attention._totrain_embed.weight"),
                &[queries, queries],
            ));
            specs.push(ParamSpec::new(
                name("attention._totrain_embed.bias"),
                &[queries],
            ));
            if self.kv_heads != self.heads {
                specs.push(ParamSpec::new(
                    name("attention._totrain_embed_kv.weight"),
                    &[keys, keys],
                ));
                specs.push(ParamSpec::new(
                    name("attention._totrain_embed_kv.bias"),
                    &[keys],
                ));
            }
            if supra.qk_norm {
                specs.push(ParamSpec::new(
                    name("attention._totrain_q_norm.weight"),
                    &[queries],
                ));
                specs.push(ParamSpec::new(
                    name("attention._totrain_k_norm.weight"),
                    &[queries],
                ));
            }
        }
        specs.push(ParamSpec::base(
            name("attention.out_proj.weight"),
            &[self.dim, queries],
        ));
        specs.push(ParamSpec::base(name("ffn_norm.weight"), &[self.dim]));
        specs.push(ParamSpec::base(
            name("feed_forward.w12.weight"),
            &[2 * self.ffn, self.dim],
        ));
        specs.push(ParamSpec::base(
            name("feed_forward.w3.weight"),
            &[self.dim, self.ffn],
        ));
    }
}

/// Values of the weights by name.
#[derive(Debug)]
pub struct Params {
    named: Vec<(String, Tensor)>,
    index: HashMap<String, usize>,
}

impl Params {
    /// Keeps the order that is given.
    pub fn new(named: Vec<(String, Tensor)>) -> Params {
        let index = named
            .iter()
            .enumerate()
            .map(|(at, (name, _))| (name.clone(), at))
            .collect();
        Params { named, index }
    }

    /// The weight of this name.
    ///
    /// # Panics
    /// If there is none. Weights that come from a file were compared with the configuration when they were loaded.
    pub fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| {
            panic!("invariant: no weight `{name}`, although all were checked on loading")
        })
    }

    /// The weight of this name, if there is one.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.index.get(name).map(|&at| &self.named[at].1)
    }

    /// Names and values, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Tensor)> {
        self.named
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Number of weights (tensors).
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Whether there is no weight.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Number of values in all weights.
    pub fn elements(&self) -> i64 {
        self.named
            .iter()
            .map(|(_, tensor)| tensor.numel() as i64)
            .sum()
    }

    /// A copy elsewhere or in another kind; shares storage where nothing changes.
    pub fn to(&self, device: Device, kind: Kind) -> Params {
        let convert = |tensor: &Tensor| tensor.to_device(device).to_kind(kind);
        Params::new(
            self.named
                .iter()
                .map(|(name, tensor)| (name.clone(), convert(tensor)))
                .collect(),
        )
    }

    /// The kind of the weights: that of the first.
    pub fn kind(&self) -> Kind {
        self.named
            .first()
            .map_or(Kind::Float, |(_, tensor)| tensor.kind())
    }

    /// The device of the weights: that of the first.
    pub fn device(&self) -> Device {
        self.named
            .first()
            .map_or(Device::Cpu, |(_, tensor)| tensor.device())
    }
}
