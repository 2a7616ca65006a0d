//! Imported softmax models give the library's logits.

use supra_worker::model::{LossInput, Transformer};
use tch::{Kind, Tensor};

use super::each;
use super::fixture::{Family, Fixture};
use super::measure::{Verdict, l2_relative, max_abs, max_relative, relative};
use crate::sequences::Sequences;

fn logits(fixture: &Fixture, kind: Kind) -> Tensor {
    let params = fixture.params(kind);
    tch::no_grad(|| {
        Transformer::new(fixture.config.clone()).logits(&params, &fixture.get("input_ids"), None)
    })
}

fn loss(fixture: &Fixture, kind: Kind) -> f64 {
    let ids = fixture.get("input_ids");
    let pairs = ids.size()[1] - 1;
    let input = LossInput {
        inputs_bt: ids.narrow(1, 0, pairs),
        targets_bt: ids.narrow(1, 1, pairs),
        mask_bt: Tensor::ones([ids.size()[0], pairs], (Kind::Bool, tch::Device::Cpu)),
        documents: None,
    };
    let sum = tch::no_grad(|| {
        Transformer::new(fixture.config.clone()).loss_sum(&fixture.params(kind), &input, 0.0)
    });
    sum.cross_entropy.double_value(&[]) / sum.targets.double_value(&[])
}

#[test]
fn golden_huggingface_fp64() {
    each(Family::HuggingFace, |fixture| {
        let mut verdict = Verdict::new(format!("{} fp64", fixture.name()));
        let logits = logits(fixture, Kind::Double);
        let probed = logits.index_select(1, &fixture.get("probe_positions"));
        verdict.bound(
            "logits_f64",
            max_relative(&probed, &fixture.get("logits_f64")),
            1e-9,
        );
        verdict.bound(
            "logits",
            max_relative(&logits, &fixture.get("logits")),
            1e-6,
        );
        verdict.bound(
            "loss",
            relative(
                loss(fixture, Kind::Double),
                fixture.get("loss").double_value(&[]),
            ),
            1e-9,
        );
        verdict.close();
    });
}

#[test]
fn golden_huggingface_fp32() {
    each(Family::HuggingFace, |fixture| {
        let mut verdict = Verdict::new(format!("{} fp32", fixture.name()));
        verdict.bound(
            "logits",
            max_abs(&logits(fixture, Kind::Float), &fixture.get("logits")),
            1e-4,
        );
        verdict.bound(
            "loss",
            relative(
                loss(fixture, Kind::Float),
                fixture.get("loss").double_value(&[]),
            ),
            1e-5,
        );
        verdict.close();
    });
}

#[test]
fn golden_huggingface_bf16() {
    each(Family::HuggingFace, |fixture| {
        let mut verdict = Verdict::new(format!("{} bf16", fixture.name()));
        verdict.bound(
            "logits",
            l2_relative(&logits(fixture, Kind::BFloat16), &fixture.get("logits")),
            2e-2,
        );
        verdict.close();
    });
}

#[test]
fn golden_huggingface_cache() {
    each(Family::HuggingFace, |fixture| {
        let mut verdict = Verdict::new(format!("{} with its cache, fp64", fixture.name()));
        let (ids, params) = (fixture.get("input_ids"), fixture.params(Kind::Double));
        let model = Transformer::new(fixture.config.clone());
        let tokens = ids.size()[1];
        let (prompt, rest) = (tokens / 3, tokens / 2);
        let logits = tch::no_grad(|| {
            let mut sequences = Sequences::new(&model, &params, ids.size()[0]);
            let first = sequences.extend(&ids.narrow(1, 0, prompt));
            let second = sequences.extend(&ids.narrow(1, prompt, rest - prompt));
            let last = sequences.steps(&ids.narrow(1, rest, tokens - rest));
            Tensor::cat(&[first, second, last], 1)
        });
        let probed = logits.index_select(1, &fixture.get("probe_positions"));
        verdict.bound(
            "logits_f64",
            max_relative(&probed, &fixture.get("logits_f64")),
            1e-9,
        );
        verdict.close();
    });
}
