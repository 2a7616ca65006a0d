//! A SUPRA model of a fixture, computed in one form or another.

use supra_worker::model::attention::decay::slopes;
use supra_worker::model::attention::recurrent::Recurrent;
use supra_worker::model::attention::{Mixer, features};
use supra_worker::model::block::{LayerParams, block};
use supra_worker::model::norm::{head_norm, rms_norm};
use supra_worker::model::{
    AttentionKind, Form, ModelConfig, Params, SupraConfig, Transformer, accumulate_kind, loss,
};
use tch::{Device, Kind, Tensor};

use super::fixture::Fixture;
use crate::sequences::Sequences;

/// How whole sequences are computed.
#[derive(Clone, Copy, Debug)]
pub enum How {
    Parallel,
    Chunks(i64),
    Recurrent,
}

/// Chunks that divide T or do not, of one token, and longer than the row.
pub fn all_forms(tokens: i64) -> Vec<How> {
    let chunks = [1, 3, 16, 64, tokens, tokens + 5].map(How::Chunks);
    [How::Parallel, How::Recurrent]
        .into_iter()
        .chain(chunks)
        .collect()
}

pub fn model(config: &ModelConfig, how: How) -> Transformer {
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
pub fn logits(fixture: &Fixture, params: &Params, how: How, tokens: i64) -> Tensor {
    let ids = fixture.get("input_ids").narrow(1, 0, tokens);
    match how {
        How::Recurrent => token_by_token(fixture, params, tokens).0,
        _ => {
            model(&fixture.config, how).logits(params, &ids, fixture.documents(0, tokens).as_ref())
        }
    }
}

/// Logits, and the states after the last document, one token after the other, every document alone.
pub fn token_by_token(fixture: &Fixture, params: &Params, tokens: i64) -> (Tensor, Vec<Tensor>) {
    let ids = fixture.get("input_ids").narrow(1, 0, tokens);
    let model = Transformer::new(fixture.config.clone());
    let read = |ids_bt: Tensor| {
        let mut sequences = Sequences::new(&model, params, ids_bt.size()[0]);
        let logits_btv = sequences.steps(&ids_bt);
        (logits_btv, sequences.states())
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

/// Logits of whole rows, read at once.
pub fn prefill(fixture: &Fixture, sequences: &mut Sequences<'_>) -> Tensor {
    let ids = fixture.get("input_ids");
    match fixture.documents(0, ids.size()[1]) {
        Some(documents) => sequences.extend_documents(&ids, &documents),
        None => sequences.extend(&ids),
    }
}

/// Mean loss over all pairs, or without those whose target begins a document.
pub fn mean_loss(fixture: &Fixture, logits_btv: &Tensor, within_documents: bool) -> Tensor {
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
pub fn inside(fixture: &Fixture, params: &Params, how: How) -> Vec<[Tensor; 5]> {
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
pub fn mix(fixture: &Fixture, kind: Kind, how: How, [q, k, v]: [&Tensor; 3]) -> Tensor {
    let tokens = q.size()[2];
    if let How::Recurrent = how {
        let slopes = slopes(fixture.config.supra().unwrap().decay, fixture.config.heads);
        let kind = accumulate_kind(kind);
        let form = Recurrent::new(&slopes, (kind, Device::Cpu));
        let (b, h, _, d) = q.size4().unwrap();
        let slots: Vec<i64> = (0..b).collect();
        let mut state = Tensor::zeros([b, h, d, d], (kind, Device::Cpu));
        let positions = fixture
            .documents(0, tokens)
            .map(|documents| documents.positions_bt);
        let step = |t| {
            // A document begins with nothing.
            if let Some(positions_bt) = &positions {
                state = &state * positions_bt.select(1, t).ne(0).view([-1, 1, 1, 1]);
            }
            let qkv = [q, k, v].map(|x| x.narrow(2, t, 1).to_kind(kind));
            form.advance(qkv.each_ref(), &mut state, &slots)
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
