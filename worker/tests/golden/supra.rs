//! SUPRA models, converted ones among them: every answer, in every form and precision.

use supra_worker::model::attention::decay::gammas;
use supra_worker::model::norm::head_norm;
use supra_worker::model::{LossInput, Params, Transformer};
use supra_worker::step::Policy;
use tch::{Device, Kind, Tensor};

use crate::network::{self, leaves, map};
use crate::sequences::Sequences;

use super::each;
use super::fixture::{Family, Fixture};
use super::measure::{Verdict, l2_relative, max_abs, max_relative, relative};
use super::run::{How, all_forms, inside, logits, mean_loss, mix, model, prefill, token_by_token};

fn each_supra(check: impl Fn(&Fixture)) {
    each(Family::Supra, &check);
    each(Family::Convert, &check);
}

#[test]
fn golden_supra_decay() {
    each_supra(|fixture| {
        let gammas = Tensor::from_slice(&gammas(
            fixture.config.supra().unwrap().decay,
            fixture.config.heads,
        ));
        let mut verdict = Verdict::new(fixture.name());
        verdict.bound("gamma", max_relative(&gammas, &fixture.get("gamma")), 1e-15);
        verdict.close();
    });
}

#[test]
fn golden_supra_logits_and_loss() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        let [double, single] = [Kind::Double, Kind::Float].map(|kind| fixture.params(kind));
        for how in all_forms(tokens) {
            let mut verdict = Verdict::new(format!("{} {how:?}", fixture.name()));
            for (params, loss_bound) in [(&double, 1e-9), (&single, 1e-5)] {
                let kind = params.kind();
                let logits = tch::no_grad(|| logits(fixture, params, how, tokens));
                if kind == Kind::Double {
                    let probed = logits.index_select(1, &fixture.get("probe_positions"));
                    verdict.bound(
                        "fp64 logits_f64",
                        max_relative(&probed, &fixture.get("logits_f64")),
                        1e-9,
                    );
                    verdict.bound(
                        "fp64 logits",
                        max_relative(&logits, &fixture.get("logits")),
                        1e-6,
                    );
                } else {
                    verdict.bound(
                        "fp32 logits",
                        max_abs(&logits, &fixture.get("logits")),
                        1e-4,
                    );
                }
                for (key, within) in [("loss", false), ("loss_within_documents", true)] {
                    if let Some(golden) = fixture.find(key) {
                        let found = mean_loss(fixture, &logits, within).double_value(&[]);
                        verdict.bound(
                            &format!("{kind:?} {key}"),
                            relative(found, golden.double_value(&[])),
                            loss_bound,
                        );
                    }
                }
            }
            verdict.close();
        }
    });
}

#[test]
fn golden_supra_bf16_logits() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        let params = fixture.params(Kind::BFloat16);
        let mut verdict = Verdict::new(format!("{} bf16", fixture.name()));
        for how in all_forms(tokens) {
            let logits = tch::no_grad(|| logits(fixture, &params, how, tokens));
            verdict.bound(
                &format!("logits {how:?}"),
                l2_relative(&logits, &fixture.get("logits")),
                2e-2,
            );
        }
        verdict.close();
    });
}

#[test]
fn golden_supra_states() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        for kind in [Kind::Double, Kind::Float] {
            let params = fixture.params(kind);
            let mut verdict = Verdict::new(format!("{} {kind:?}", fixture.name()));
            let mut check = |how: How, states: Vec<Tensor>| {
                for (layer, state) in states.iter().enumerate() {
                    let golden = fixture.get(&format!("state.{layer}"));
                    let exact = golden.kind() == Kind::Double;
                    let (error, bound) = match kind {
                        Kind::Double => (
                            max_relative(state, &golden),
                            if exact { 1e-9 } else { 1e-6 },
                        ),
                        _ => (l2_relative(state, &golden), 1e-5),
                    };
                    verdict.bound(&format!("state.{layer} {how:?}"), error, bound);
                }
            };
            tch::no_grad(|| {
                for how in all_forms(tokens) {
                    match how {
                        How::Parallel => {}
                        How::Recurrent => check(how, token_by_token(fixture, &params, tokens).1),
                        How::Chunks(_) => {
                            let model = model(&fixture.config, how);
                            let rows = fixture.get("input_ids").size()[0];
                            let mut sequences = Sequences::new(&model, &params, rows);
                            let _ = prefill(fixture, &mut sequences);
                            check(how, sequences.states());
                        }
                    }
                }
            });
            verdict.close();
        }
    });
}

#[test]
fn golden_supra_inside_the_blocks() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        for how in [How::Parallel, How::Chunks(16), How::Chunks(tokens)] {
            for kind in [Kind::Double, Kind::Float] {
                let mut verdict = Verdict::new(format!("{} {how:?} {kind:?}", fixture.name()));
                let blocks = tch::no_grad(|| inside(fixture, &fixture.params(kind), how));
                for (layer, [.., normed]) in blocks.iter().enumerate() {
                    // [B, H, T, e] to [B, P, H, e].
                    let probed = normed
                        .transpose(1, 2)
                        .index_select(1, &fixture.get("probe_positions"));
                    let (key, golden) = (
                        format!("attn_normed.{layer}"),
                        fixture.get(&format!("attn_normed.{layer}")),
                    );
                    match kind {
                        Kind::Double => verdict.bound(&key, max_relative(&probed, &golden), 1e-6),
                        _ => verdict.bound(&key, max_abs(&probed, &golden), 5e-5),
                    }
                }
                for (name, found) in ["q", "k", "v", "o"].into_iter().zip(&blocks[0]) {
                    let golden = fixture.find(&format!("layer0.{name}"));
                    if let Some(golden) = golden.filter(|_| kind == Kind::Double) {
                        verdict.bound(
                            &format!("layer0.{name}"),
                            max_relative(found, &golden),
                            1e-6,
                        );
                    }
                }
                verdict.close();
            }
        }
    });
}

#[test]
fn golden_supra_forms_agree() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        let blocks = tch::no_grad(|| inside(fixture, &fixture.params(Kind::Double), How::Parallel));
        let mut verdict =
            Verdict::new(format!("{} fp64 against the parallel form", fixture.name()));
        for (layer, [q, k, v, o, _]) in blocks.iter().enumerate() {
            for how in all_forms(tokens) {
                let found = mix(fixture, Kind::Double, how, [q, k, v]);
                verdict.bound(
                    &format!("step 5 of block {layer}, {how:?}"),
                    l2_relative(&found, o),
                    1e-10,
                );
            }
        }
        verdict.close();
    });
}

#[test]
fn golden_supra_bf16_attention() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        let Some(golden) = fixture.find("layer0.o") else {
            return;
        };
        let qkv = ["q", "k", "v"].map(|name| {
            fixture
                .get(&format!("layer0.{name}"))
                .to_kind(Kind::BFloat16)
        });
        let mut verdict = Verdict::new(format!("{} bf16", fixture.name()));
        for how in all_forms(tokens) {
            let found = mix(fixture, Kind::BFloat16, how, qkv.each_ref());
            let rounded = |x: &Tensor| x.to_kind(Kind::BFloat16);
            verdict.bound(
                &format!("step 5 {how:?}"),
                l2_relative(&rounded(&found), &golden),
                5e-3,
            );
            let normed = (
                rounded(&head_norm(&found)),
                head_norm(&golden.to_kind(Kind::Double)),
            );
            verdict.bound(
                &format!("steps 5 and 6 {how:?}"),
                l2_relative(&normed.0, &normed.1),
                5e-3,
            );
        }
        verdict.close();
    });
}

#[test]
fn golden_supra_states_are_handed_over_anywhere() {
    each_supra(|fixture| {
        let ids = fixture.get("input_ids");
        let (b, tokens) = ids.size2().unwrap();
        let params = fixture.params(Kind::Double);
        let model = model(&fixture.config, How::Chunks(16));
        // Tokens that are read at once and tokens that are read one by one, in turn.
        for borders in [
            [1, 2, tokens - 1],
            [tokens / 3, tokens / 2, tokens - 5],
            [16, 23, 24],
        ] {
            let mut sequences = Sequences::new(&model, &params, b);
            let borders = [vec![0], borders.to_vec(), vec![tokens]].concat();
            let mut parts = Vec::new();
            tch::no_grad(|| {
                for (turn, border) in borders.windows(2).enumerate() {
                    let stride = if turn % 2 == 0 {
                        border[1] - border[0]
                    } else {
                        1
                    };
                    for from in (border[0]..border[1]).step_by(stride as usize) {
                        let (ids, documents) = (
                            ids.narrow(1, from, stride),
                            fixture.documents(from, from + stride),
                        );
                        parts.push(match documents {
                            Some(documents) => sequences.extend_documents(&ids, &documents),
                            None => sequences.extend(&ids),
                        });
                    }
                }
            });
            let mut verdict = Verdict::new(format!(
                "{} fp64, handed over at {borders:?}",
                fixture.name()
            ));
            let probed = Tensor::cat(&parts, 1).index_select(1, &fixture.get("probe_positions"));
            verdict.bound(
                "logits_f64",
                max_relative(&probed, &fixture.get("logits_f64")),
                1e-9,
            );
            for (layer, state) in sequences.states().iter().enumerate() {
                let golden = fixture.get(&format!("state.{layer}"));
                let bound = if golden.kind() == Kind::Double {
                    1e-9
                } else {
                    1e-6
                };
                verdict.bound(
                    &format!("state.{layer}"),
                    max_relative(state, &golden),
                    bound,
                );
            }
            verdict.close();
        }
    });
}

#[test]
fn golden_supra_generate() {
    each_supra(|fixture| {
        let golden = fixture.get("generate");
        for kind in [Kind::Double, Kind::Float] {
            let params = fixture.params(kind);
            let model = Transformer::new(fixture.config.clone());
            let (mut tokens, mut gaps) = (Vec::new(), Vec::new());
            tch::no_grad(|| {
                let rows = fixture.get("input_ids").size()[0];
                let mut sequences = Sequences::new(&model, &params, rows);
                let mut logits_bv = prefill(fixture, &mut sequences).select(1, -1);
                for _ in 0..golden.size()[1] {
                    let (best_two, _) = logits_bv.topk(2, -1, true, true);
                    gaps.push(best_two.select(1, 0) - best_two.select(1, 1));
                    let next_b = logits_bv.argmax(-1, false);
                    logits_bv = sequences.step(&next_b);
                    tokens.push(next_b);
                }
            });
            assert_eq!(
                Tensor::stack(&tokens, 1),
                golden,
                "{} {kind:?}",
                fixture.name()
            );
            let mut verdict = Verdict::new(format!("{} {kind:?}", fixture.name()));
            let bound = if kind == Kind::Double { 1e-9 } else { 1e-4 };
            verdict.bound(
                "generate_gap",
                max_relative(&Tensor::stack(&gaps, 1), &fixture.get("generate_gap")),
                bound,
            );
            verdict.close();
        }
    });
}

#[test]
fn golden_supra_gradients_fp64() {
    each_supra(|fixture| check_gradients_of_all_forms(fixture, Kind::Double));
}

#[test]
fn golden_supra_gradients_fp32() {
    each_supra(|fixture| check_gradients_of_all_forms(fixture, Kind::Float));
}

fn check_gradients_of_all_forms(fixture: &Fixture, kind: Kind) {
    let weights = fixture.params(kind);
    let tokens = fixture.get("input_ids").size()[1];
    let chunks = [1, 16, tokens].map(How::Chunks);
    // The recurrent form moves its states in place: it is for inference only.
    for how in [How::Parallel].into_iter().chain(chunks) {
        let gradients = autograd(fixture, &weights, how, tokens);
        check_gradients(fixture, &format!("{how:?}"), &weights, &gradients);
    }
    for how in chunks {
        let gradients = by_hand(fixture, &weights, how, tokens);
        check_gradients(fixture, &format!("{how:?} by hand"), &weights, &gradients);
    }
}

/// Gradients of the mean loss, by autograd.
fn autograd(fixture: &Fixture, weights: &Params, how: How, tokens: i64) -> Params {
    let leaves = leaves(weights);
    mean_loss(fixture, &logits(fixture, &leaves, how, tokens - 1), false).backward();
    map(&leaves, Tensor::grad)
}

/// The same by the training step.
fn by_hand(fixture: &Fixture, weights: &Params, how: How, tokens: i64) -> Params {
    let (ids, pairs) = (fixture.get("input_ids"), tokens - 1);
    let input = LossInput {
        inputs_bt: ids.narrow(1, 0, pairs),
        targets_bt: ids.narrow(1, 1, pairs),
        mask_bt: Tensor::ones([ids.size()[0], pairs], (Kind::Bool, Device::Cpu)),
        documents: fixture.documents(0, pairs),
    };
    let config = model(&fixture.config, how).config().clone();
    let (_, gradients) = network::by_hand(&config, weights, &input, 0.0, Policy::Lean);
    let targets = input.targets_bt.numel() as f64;
    map(&gradients, |gradient| gradient / targets)
}

fn check_gradients(fixture: &Fixture, how: &str, weights: &Params, gradients: &Params) {
    let kind = weights.kind();
    let mut verdict = Verdict::new(format!("{} {kind:?} {how}", fixture.name()));
    let stored = fixture.names("grad.");
    assert!(!stored.is_empty());
    for name in &stored {
        let (found, golden) = (gradients.get(name), fixture.get(&format!("grad.{name}")));
        match kind {
            Kind::Double => {
                verdict.bound(&format!("grad.{name}"), max_relative(found, &golden), 1e-6)
            }
            _ => verdict.bound(&format!("grad.{name}"), l2_relative(found, &golden), 1e-4),
        }
    }
    assert_eq!(
        fixture.names("grad_stats.").len(),
        weights.len(),
        "gradient statistics of every tensor"
    );
    for (name, weight) in weights.iter().filter(|_| kind == Kind::Double) {
        let golden = Vec::<f64>::try_from(fixture.get(&format!("grad_stats.{name}"))).unwrap();
        let gradient = gradients.get(name);
        let norm = gradient.norm().double_value(&[]);
        let sum = (gradient * weight).sum(Kind::Double).double_value(&[]);
        let scale = golden[0] * weight.norm().double_value(&[]);
        verdict.bound(
            &format!("norm of grad.{name}"),
            relative(norm, golden[0]),
            1e-9,
        );
        verdict.bound(
            &format!("grad.{name} * weight"),
            (sum - golden[1]).abs() / scale,
            1e-9,
        );
    }
    verdict.close();
}
