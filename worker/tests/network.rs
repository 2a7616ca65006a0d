//! Small networks with weights and tokens, and their gradients by hand.

use std::rc::Rc;

use supra_worker::{
    kernels::Twin,
    model::{
        AttentionKind, Decay, LossInput, ModelConfig, Params, SupraConfig, accumulate_kind,
        init_all,
    },
    step::{Loss, Policy, Step},
};
use tch::{Device, Kind, Tensor};

/// V.
pub const VOCAB: i64 = 31;

pub fn config(heads: i64, kv_heads: i64, attention: AttentionKind) -> ModelConfig {
    ModelConfig {
        vocab: VOCAB,
        dim: heads * 8,
        layers: 2,
        heads,
        kv_heads,
        head_dim: 8,
        ffn: 40,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        tied: true,
        attention,
        max_positions: 256,
        sliding_window: None,
        bos: None,
        eos: Vec::new(),
    }
}

pub fn supra(decay: Decay, qk_norm: bool, chunk: i64) -> AttentionKind {
    AttentionKind::Supra(SupraConfig {
        decay,
        qk_norm,
        chunk,
        ..SupraConfig::default()
    })
}

/// Weights in fp64, gains away from 1.
pub fn weights(config: &ModelConfig, seed: u64) -> Params {
    let params = init_all(config, seed).to(Device::Cpu, Kind::Double);
    let vary = |tensor: &Tensor| match tensor.dim() {
        1 => {
            tensor
                * (Tensor::arange(tensor.numel() as i64, (Kind::Double, Device::Cpu)) * 0.7).sin()
                * 0.3
                + tensor
        }
        _ => tensor.copy(),
    };
    map(&params, vary)
}

/// The same names with other tensors.
pub fn map(params: &Params, new: impl Fn(&Tensor) -> Tensor) -> Params {
    let named = params
        .iter()
        .map(|(name, tensor)| (name.to_owned(), new(tensor)));
    Params::new(named.collect())
}

/// Copies for autograd.
pub fn leaves(params: &Params) -> Params {
    map(params, |tensor| tensor.copy().set_requires_grad(true))
}

/// Loss and gradients of a micro-batch by hand.
pub fn by_hand(
    config: &ModelConfig,
    weights: &Params,
    input: &LossInput,
    z_loss: f64,
    policy: Policy,
) -> (Loss, Params) {
    let kind = accumulate_kind(weights.kind());
    let gradients = map(weights, |weight| weight.to_kind(kind).zeros_like());
    let mut step = Step::new(config.clone(), Rc::new(Twin), policy, Device::Cpu);
    step.accumulate(weights, &gradients, input, z_loss, &mut || false)
        .unwrap();
    (step.take_loss(), gradients)
}

pub fn ids(rows: i64, tokens: i64, seed: i64) -> Tensor {
    let number = Tensor::arange(rows * tokens, (Kind::Int64, Device::Cpu)) + seed;
    (&number * &number * 7 + number * 3)
        .remainder(VOCAB)
        .view([rows, tokens])
}

#[track_caller]
pub fn assert_close(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let error = (found - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
    assert!(error <= 1e-10, "{what}: relative difference {error:e}");
}
