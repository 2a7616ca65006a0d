//! Recorded token steps against libtorch in fp64 on the same rounded weights: logits, states and the likeliest token, for few
//! rows and for many, in slots that do not lie side by side.

use supra_worker::{
    kernels::cuda::decode::{Decoder, Row, misfit},
    model::{
        AttentionKind, ModelConfig, Params, Slots, SupraConfig, Transformer,
        attention::ragged::Span,
    },
};
use tch::{Device, Kind, Tensor};

use super::bench::{GPU, distance};
use super::gpu;

/// Root of the mean square error relative to that of the right values: of logits, and of states.
const LOGITS: f64 = 2e-2;
const STATES: f64 = 1e-2;
const STEPS: usize = 4;

pub fn config(
    attention: AttentionKind,
    head_dim: i64,
    heads: i64,
    kv_heads: i64,
    tied: bool,
) -> ModelConfig {
    ModelConfig {
        vocab: 1000,
        dim: heads * head_dim,
        layers: 3,
        heads,
        kv_heads,
        head_dim,
        ffn: 1152,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        tied,
        attention,
        max_positions: 2048,
        sliding_window: None,
        bos: None,
        eos: Vec::new(),
    }
}

/// Weights near those of a trained model, rounded to bf16.
pub fn weights(config: &ModelConfig) -> Params {
    tch::manual_seed(7);
    let draw = |spec: supra_worker::model::ParamSpec| {
        let options = (Kind::Float, Device::Cpu);
        let weight = match spec.shape[..] {
            [_, inner] => Tensor::randn(&spec.shape, options) / (inner as f64).sqrt(),
            _ if spec.name.ends_with("norm.weight") => Tensor::rand(&spec.shape, options) + 0.5,
            _ => Tensor::randn(&spec.shape, options) * 0.1,
        };
        (spec.name, weight.to_kind(Kind::BFloat16))
    };
    Params::new(config.params().into_iter().map(draw).collect())
}

/// All that the slots remember.
pub fn states(slots: &Slots) -> Tensor {
    let numbers = |slot| {
        let tensors = slots.tensors(slot).into_iter();
        tensors.map(|(_, tensor)| tensor.reshape([-1]).to_kind(Kind::Double))
    };
    let all: Vec<Tensor> = (0..slots.positions_s.len()).flat_map(numbers).collect();
    Tensor::cat(&all, 0)
}

#[test]
fn recorded_steps_are_those_of_the_model() {
    if gpu("recorded_steps_are_those_of_the_model").is_none() {
        return;
    }
    let _guard = tch::no_grad_guard();
    let (supra, softmax) = (
        AttentionKind::Supra(SupraConfig::default()),
        AttentionKind::Softmax,
    );
    for (attention, head_dim, heads, kv_heads, tied) in [
        (supra, 128, 4, 2, false),
        (supra, 64, 4, 4, true),
        (softmax, 128, 4, 1, false),
        (softmax, 64, 4, 2, true),
        (softmax, 64, 4, 4, true),
    ] {
        let config = config(attention, head_dim, heads, kv_heads, tied);
        assert_eq!(misfit(&config, Kind::BFloat16), None);
        let model = Transformer::new(config.clone());
        let rounded = weights(&config);
        let (params, exact) = (
            rounded.to(GPU, Kind::BFloat16),
            rounded.to(GPU, Kind::Double),
        );
        let mut slots = Slots::new(&config, 80, GPU, Kind::BFloat16).unwrap();
        let mut right = Slots::new(&config, 80, GPU, Kind::Double).unwrap();
        let mut decoder = Decoder::new(0, &config, &params, &slots).unwrap();
        // Sequences of different lengths, one of which the blocks of a softmax model divide among them.
        for (slot, tokens) in [(0, 300), (2, 3)] {
            let ids: Vec<i64> = (0..tokens).map(|t| t * 31 % 1000).collect();
            let (ids_n, spans) = (
                Tensor::from_slice(&ids).to_device(GPU),
                [Span { slot, tokens }],
            );
            let _ = model.advance(&params, &mut slots, &ids_n, &spans);
            let _ = model.advance(&exact, &mut right, &ids_n, &spans);
        }
        for n in [1, 3, 16, 23, 32, 40, 70] {
            // Every other slot first, then those between them.
            let order: Vec<usize> = (0..80)
                .step_by(2)
                .chain((1..80).step_by(2))
                .take(n)
                .collect();
            for step in 0..STEPS {
                let what = format!("{attention:?}, heads of {head_dim}, {n} rows, step {step}");
                let token = |slot: &usize| ((slot * 37 + step * 101 + n) % 1000) as i64;
                let ids: Vec<i64> = order.iter().map(token).collect();
                let rows: Vec<Row> = order
                    .iter()
                    .zip(&ids)
                    .map(|(&slot, &token)| Row {
                        token: token as i32,
                        slot: slot as i32,
                    })
                    .collect();
                let chosen = decoder.step(&rows, &mut slots).unwrap();
                let spans: Vec<Span> = order.iter().map(|&slot| Span { slot, tokens: 1 }).collect();
                let ids_n = Tensor::from_slice(&ids).to_device(GPU);
                let x_nd = model.advance(&exact, &mut right, &ids_n, &spans);
                let logits_nv = model.head(&exact, &x_nd);
                let error = distance(&decoder.logits(n), &logits_nv);
                assert!(error < LOGITS, "{what}: logits are {error:.2e} off");
                let error = distance(&states(&slots), &states(&right));
                assert!(error < STATES, "{what}: states are {error:.2e} off");
                let likeliest = decoder.logits(n).to_kind(Kind::Float).argmax(-1, false);
                let chosen: Vec<i64> = chosen.into_iter().map(i64::from).collect();
                let chosen = Tensor::from_slice(&chosen).to_device(GPU);
                let best = |token: &Tensor| decoder.logits(n).gather(1, &token.unsqueeze(1), false);
                assert_eq!(best(&chosen), best(&likeliest), "{what}: not the likeliest");
            }
        }
        assert_eq!(slots.positions_s, right.positions_s);
    }
}

#[test]
fn logits_that_are_not_numbers_choose_nothing() {
    if gpu("logits_that_are_not_numbers_choose_nothing").is_none() {
        return;
    }
    let _guard = tch::no_grad_guard();
    let config = config(
        AttentionKind::Supra(SupraConfig::default()),
        64,
        2,
        1,
        false,
    );
    let params = weights(&config).to(GPU, Kind::BFloat16);
    let mut norm = params.get("norm.weight").shallow_clone();
    let _ = norm.fill_(f64::NAN);
    let mut slots = Slots::new(&config, 1, GPU, Kind::BFloat16).unwrap();
    let mut decoder = Decoder::new(0, &config, &params, &slots).unwrap();
    let row = Row { token: 1, slot: 0 };
    assert_eq!(decoder.step(&[row], &mut slots).unwrap(), [-1]);
}
