//! SUPRA models, converted ones among them: every answer, in every form and precision.

use supra_worker::model::attention::decay::{gammas, slopes};
use supra_worker::model::attention::recurrent::Recurrent;
use supra_worker::model::attention::{Mixer, features};
use supra_worker::model::block::{LayerParams, block};
use supra_worker::model::norm::{head_norm, rms_norm};
use supra_worker::model::state::LayerState;
use supra_worker::model::{
    AttentionKind, Form, ModelConfig, Params, State, SupraConfig, Transformer, accumulate_kind,
    loss,
};
use tch::{Device, Kind, Tensor};

use super::each;
use super::fixture::{Family, Fixture};
use super::measure::{Verdict, l2_relative, max_abs, max_relative, relative};

fn each_supra(check: impl Fn(&Fixture)) {
    each(Family::Supra, &check);
    each(Family::Convert, &check);
}

/// How whole sequences are computed.
#[derive(Clone, Copy, Debug)]
enum How {
    Parallel,
    Chunks(i64),
    Recurrent,
}

/// Chunks that divide T or do not, of one token, and longer than the row.
fn all_forms(tokens: i64) -> Vec<How> {
    let chunks = [1, 3, 16, 64, tokens, tokens + 5].map(How::Chunks);
    [How::Parallel, How::Recurrent]
        .into_iter()
        .chain(chunks)
        .collect()
}

fn model(config: &ModelConfig, how: How) -> Transformer {
    let supra = *config.supra().unwrap();
    let chunk = match how {
        How::Chunks(chunk) => chunk,
        How::Parallel | How::Recurrent => supra.chunk,
    };
    let form = if matches!(how, How::Parallel) {
        Form::Parallel
    } else {
        Form::Chunkwise
    };
    let attention = AttentionKind::Supra(SupraConfig { chunk, ..supra });
    Transformer::new(config.clone().with_attention(attention)).with_form(form)
}

/// Logits of the first `tokens` tokens of each row.
fn logits(fixture: &Fixture, params: &Params, how: How, tokens: i64) -> Tensor {
    let ids = fixture.get("input_ids").narrow(1, 0, tokens);
    match how {
        How::Recurrent => token_by_token(fixture, params, tokens).0,
        _ => {
            model(&fixture.config, how).logits(params, &ids, fixture.documents(0, tokens).as_ref())
        }
    }
}

/// Logits, and the states after the last document, one token after the other, every document alone.
fn token_by_token(fixture: &Fixture, params: &Params, tokens: i64) -> (Tensor, Vec<Tensor>) {
    let ids = fixture.get("input_ids").narrow(1, 0, tokens);
    let model = Transformer::new(fixture.config.clone());
    let read = |ids_bt: Tensor| {
        let mut state = State::new(
            &fixture.config,
            ids_bt.size()[0],
            Device::Cpu,
            params.kind(),
        );
        let steps: Vec<Tensor> = (0..ids_bt.size()[1])
            .map(|t| model.step(params, &mut state, &ids_bt.select(1, t)))
            .collect();
        (Tensor::stack(&steps, 1), states(&state))
    };
    let Some(starts) = fixture.starts() else {
        return read(ids);
    };
    let mut rows = Vec::new();
    for (row, starts) in (0..).zip(starts) {
        let borders: Vec<i64> = starts
            .iter()
            .map(|&start| i64::from(start))
            .chain([tokens])
            .collect();
        let documents = borders.windows(2).map(|border| {
            read(
                ids.narrow(0, row, 1)
                    .narrow(1, border[0], border[1] - border[0]),
            )
        });
        let (logits, mut states): (Vec<Tensor>, Vec<Vec<Tensor>>) = documents.unzip();
        rows.push((Tensor::cat(&logits, 1), states.pop().unwrap()));
    }
    let (logits, states): (Vec<Tensor>, Vec<Vec<Tensor>>) = rows.into_iter().unzip();
    let layer =
        |layer: usize| Tensor::cat(&states.iter().map(|row| &row[layer]).collect::<Vec<_>>(), 0);
    (
        Tensor::cat(&logits, 0),
        (0..states[0].len()).map(layer).collect(),
    )
}

fn states(state: &State) -> Vec<Tensor> {
    let of = |layer: &LayerState| match layer {
        LayerState::Supra { state_bhde } => state_bhde.shallow_clone(),
        LayerState::Softmax { .. } => panic!("not a SUPRA model"),
    };
    state.layers.iter().map(of).collect()
}

/// Logits and states from one call, in chunks.
fn prefill(fixture: &Fixture, params: &Params, chunk: i64) -> (Tensor, State) {
    let ids = fixture.get("input_ids");
    let (b, t) = ids.size2().unwrap();
    let mut state = State::new(&fixture.config, b, Device::Cpu, params.kind());
    let documents = fixture.documents(0, t);
    let logits = model(&fixture.config, How::Chunks(chunk)).extend(
        params,
        &mut state,
        &ids,
        documents.as_ref(),
    );
    (logits, state)
}

/// Mean loss over all pairs, or without those whose target begins a document.
fn mean_loss(fixture: &Fixture, logits_btv: &Tensor, within_documents: bool) -> Tensor {
    let ids = fixture.get("input_ids");
    let (b, t) = ids.size2().unwrap();
    let mut mask = Tensor::ones([b, t], (Kind::Bool, Device::Cpu));
    if within_documents {
        mask = fixture.documents(0, t).unwrap().positions_bt.ne(0);
    }
    let logits_btv = logits_btv.narrow(1, 0, t - 1);
    let sum = loss::loss_sum(
        &logits_btv,
        &ids.narrow(1, 1, t - 1),
        &mask.narrow(1, 1, t - 1),
        0.0,
    );
    sum.objective / sum.targets
}

/// q, k, v into and o out of step 5 of every block, and o after step 6.
fn inside(fixture: &Fixture, params: &Params, how: How) -> Vec<[Tensor; 5]> {
    let ids = fixture.get("input_ids");
    let config = &fixture.config;
    let model = model(config, how);
    let plan = model.plan(params, &ids, fixture.documents(0, ids.size()[1]).as_ref());
    let mut x_btd = model.embed(params, &ids);
    let mut blocks = Vec::new();
    for layer in 0..config.layers {
        let weights = LayerParams::new(config, params, layer);
        let normed = rms_norm(&x_btd, weights.attention_norm, config.norm_eps);
        let (q, k, v) = features::queries_keys_values(config, &weights, &plan.rotary, &normed);
        let o = plan.mixer.mix(&q, &k, &v, None);
        let o_normed = head_norm(&o);
        blocks.push([q, k, v, o, o_normed]);
        x_btd = block(config, &weights, &plan, &x_btd, None);
    }
    blocks
}

/// Step 5 alone.
fn mix(fixture: &Fixture, kind: Kind, how: How, [q, k, v]: [&Tensor; 3]) -> Tensor {
    let tokens = q.size()[2];
    if let How::Recurrent = how {
        let slopes = slopes(fixture.config.supra().unwrap().decay, fixture.config.heads);
        let form = Recurrent::new(&slopes, (accumulate_kind(kind), Device::Cpu));
        let zero = q
            .select(2, 0)
            .unsqueeze(-1)
            .matmul(&v.select(2, 0).unsqueeze(-2))
            .zeros_like();
        let mut state = zero.to_kind(accumulate_kind(kind));
        let positions = fixture
            .documents(0, tokens)
            .map(|documents| documents.positions_bt);
        let step = |t| {
            // A document begins with nothing.
            if let Some(positions_bt) = &positions {
                state = &state * positions_bt.select(1, t).ne(0).view([-1, 1, 1, 1]);
            }
            let [q, k, v] = [q, k, v].map(|x| x.narrow(2, t, 1));
            let (o, after) = form.step(&q, &k, &v, &state);
            state = after;
            o
        };
        return Tensor::cat(&(0..tokens).map(step).collect::<Vec<_>>(), 2);
    }
    let params = Params::new(vec![(
        "kind".to_owned(),
        Tensor::zeros([1], (kind, Device::Cpu)),
    )]);
    let plan = model(&fixture.config, how).plan(
        &params,
        &fixture.get("input_ids").narrow(1, 0, tokens),
        fixture.documents(0, tokens).as_ref(),
    );
    match plan.mixer {
        Mixer::Parallel(form) => form.mix(q, k, v),
        Mixer::Chunkwise(form) => form.mix(q, k, v),
        other => panic!("not a form for whole sequences: {other:?}"),
    }
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
                        How::Chunks(chunk) => {
                            check(how, states(&prefill(fixture, &params, chunk).1))
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
            let mut state = State::new(&fixture.config, b, Device::Cpu, Kind::Double);
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
                        parts.push(model.extend(&params, &mut state, &ids, documents.as_ref()));
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
            for (layer, state) in states(&state).iter().enumerate() {
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
                let (logits_btv, mut state) = prefill(fixture, &params, 64);
                let mut logits_bv = logits_btv.select(1, -1);
                for _ in 0..golden.size()[1] {
                    let (best_two, _) = logits_bv.topk(2, -1, true, true);
                    gaps.push(best_two.select(1, 0) - best_two.select(1, 1));
                    let next_b = logits_bv.argmax(-1, false);
                    logits_bv = model.step(&params, &mut state, &next_b);
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
fn golden_supra_gradients() {
    each_supra(|fixture| {
        let tokens = fixture.get("input_ids").size()[1];
        for kind in [Kind::Double, Kind::Float] {
            for how in [
                How::Parallel,
                How::Recurrent,
                How::Chunks(1),
                How::Chunks(16),
                How::Chunks(tokens),
            ] {
                check_gradients(fixture, kind, how, tokens);
            }
        }
    });
}

fn check_gradients(fixture: &Fixture, kind: Kind, how: How, tokens: i64) {
    let values = fixture.params(kind);
    let leaf = |tensor: &Tensor| tensor.copy().set_requires_grad(true);
    let params = Params::new(
        values
            .iter()
            .map(|(name, tensor)| (name.to_owned(), leaf(tensor)))
            .collect(),
    );
    mean_loss(fixture, &logits(fixture, &params, how, tokens - 1), false).backward();

    let mut verdict = Verdict::new(format!("{} {kind:?} {how:?}", fixture.name()));
    let stored = fixture.names("grad.");
    assert!(!stored.is_empty());
    for name in &stored {
        let (found, golden) = (
            params.get(name).grad(),
            fixture.get(&format!("grad.{name}")),
        );
        match kind {
            Kind::Double => {
                verdict.bound(&format!("grad.{name}"), max_relative(&found, &golden), 1e-6)
            }
            _ => verdict.bound(&format!("grad.{name}"), l2_relative(&found, &golden), 1e-4),
        }
    }
    assert_eq!(
        fixture.names("grad_stats.").len(),
        params.len(),
        "gradient statistics of every tensor"
    );
    for (name, weight) in params.iter().filter(|_| kind == Kind::Double) {
        let golden = Vec::<f64>::try_from(fixture.get(&format!("grad_stats.{name}"))).unwrap();
        let gradient = weight.grad();
        let norm = gradient.norm().double_value(&[]);
        let sum = (&gradient * weight.detach())
            .sum(Kind::Double)
            .double_value(&[]);
        let scale = golden[0] * weight.detach().norm().double_value(&[]);
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
