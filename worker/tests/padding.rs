//! Rows that fill a micro-batch up add nothing: not a bit of their own, and to the others' only what the order of sums does.

use std::rc::Rc;

use supra_worker::{
    kernels::{Kernels, Twin},
    model::{AttentionKind, Decay, Documents, LossInput, ModelConfig, Params, accumulate_kind},
    step::{Loss, Policy, Step},
};
use tch::{Device, Kind, Tensor};

use crate::network::{assert_close, config, ids, map, supra, weights};

/// Rows of `tokens` tokens, of which the first `counting` have targets that count.
pub fn input(rows: i64, counting: i64, tokens: i64, device: Device) -> LossInput {
    let ids_bt = ids(rows, tokens + 1, 3).to_device(device);
    let row_b1 = Tensor::arange(rows, (Kind::Int64, device)).unsqueeze(1);
    let starts: Vec<Vec<u32>> = (0..rows as u32).map(|row| vec![row, row + 5]).collect();
    LossInput {
        inputs_bt: ids_bt.narrow(1, 0, tokens).contiguous(),
        targets_bt: ids_bt.narrow(1, 1, tokens).contiguous(),
        mask_bt: row_b1
            .lt(counting)
            .expand([rows, tokens], false)
            .contiguous(),
        documents: Some(Documents::from_starts(&starts, tokens as usize).to_device(device)),
    }
}

/// Loss and gradients of one micro-batch.
pub fn run(
    config: &ModelConfig,
    weights: &Params,
    kernels: Rc<dyn Kernels>,
    input: &LossInput,
) -> (Loss, Params) {
    let kind = accumulate_kind(weights.kind());
    let gradients = map(weights, |weight| weight.to_kind(kind).zeros_like());
    let mut step = Step::new(config.clone(), kernels, Policy::Lean, weights.device());
    step.accumulate(weights, &gradients, input, 1e-3, &|| false)
        .unwrap();
    (step.take_loss(), gradients)
}

/// Asserts that a micro-batch without targets has neither loss nor gradient.
pub fn assert_nothing((loss, gradients): &(Loss, Params)) {
    assert_eq!((loss.cross_entropy, loss.objective), (0.0, 0.0));
    for (name, gradient) in gradients.iter() {
        assert_eq!(gradient.count_nonzero(None).int64_value(&[]), 0, "{name}");
    }
}

fn models() -> [ModelConfig; 3] {
    [
        config(4, 2, supra(Decay::Alibi, false, 6)),
        config(2, 2, supra(Decay::Retnet, true, 6)),
        config(4, 2, AttentionKind::Softmax),
    ]
}

#[test]
fn rows_whose_targets_do_not_count_have_exactly_no_gradient() {
    for config in models() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let weights = weights(&config, 5).to(Device::Cpu, kind);
            let input = input(2, 0, 22, Device::Cpu);
            assert_nothing(&run(&config, &weights, Rc::new(Twin), &input));
        }
    }
}

#[test]
fn a_filled_micro_batch_has_the_loss_and_gradients_of_its_samples() {
    for config in models() {
        let weights = weights(&config, 5);
        let whole = input(4, 3, 22, Device::Cpu);
        let first = |x: &Tensor| x.narrow(0, 0, 3);
        let documents = whole.documents.as_ref().unwrap();
        let alone = LossInput {
            inputs_bt: first(&whole.inputs_bt),
            targets_bt: first(&whole.targets_bt),
            mask_bt: first(&whole.mask_bt),
            documents: Some(Documents {
                positions_bt: first(&documents.positions_bt),
                segments_bt: first(&documents.segments_bt),
            }),
        };
        let (loss, gradients) = run(&config, &weights, Rc::new(Twin), &whole);
        let (expected_loss, expected) = run(&config, &weights, Rc::new(Twin), &alone);
        assert!((loss.objective / expected_loss.objective - 1.0).abs() < 1e-13);
        for (name, gradient) in gradients.iter() {
            assert_close(gradient, expected.get(name), name);
        }
    }
}
