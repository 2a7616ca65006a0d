//! The forms of attention agree where the fixtures do not look: other decays, query and key norms, odd head counts,
//! documents anywhere, and softmax with its cache.

use supra_worker::model::{
    AttentionKind, Decay, Documents, Form, LossInput, Params, RopeFrequencies, SupraConfig,
    Transformer,
};
use tch::{Device, Kind, Tensor};

use crate::network::{assert_close, config, ids, leaves, supra, weights};
use crate::sequences::Sequences;

/// Logits of each row's documents, each run alone; with the memory of the last one.
fn alone<'a>(
    model: &'a Transformer,
    params: &'a Params,
    ids_1t: &Tensor,
    starts: &[u32],
) -> (Tensor, Sequences<'a>) {
    let tokens = ids_1t.size()[1];
    let first = starts.first().is_none_or(|&start| start > 0).then_some(0);
    let borders: Vec<i64> = first
        .into_iter()
        .chain(starts.iter().map(|&start| i64::from(start)))
        .chain([tokens])
        .collect();
    let runs = borders.windows(2).map(|border| {
        let mut sequences = Sequences::new(model, params, 1);
        let logits = sequences.extend(&ids_1t.narrow(1, border[0], border[1] - border[0]));
        (logits, sequences)
    });
    let (logits, mut last): (Vec<Tensor>, Vec<Sequences<'_>>) = runs.unzip();
    (Tensor::cat(&logits, 1), last.pop().unwrap())
}

#[test]
fn every_variant_has_one_result() {
    tch::set_num_threads(1);
    let _guard = tch::no_grad_guard();
    for (heads, kv_heads) in [(4, 4), (4, 1), (6, 2), (5, 5)] {
        for decay in [Decay::Alibi, Decay::Retnet, Decay::None] {
            for qk_norm in [false, true] {
                let what = format!("{heads}/{kv_heads} heads, {decay:?}, qk_norm {qk_norm}");
                let config = config(heads, kv_heads, supra(decay, qk_norm, 7));
                let params = weights(&config, 5);
                let ids = ids(2, 29, heads);
                let model = Transformer::new(config.clone());
                let parallel = model
                    .clone()
                    .with_form(Form::Parallel)
                    .logits(&params, &ids, None);
                assert_close(&model.logits(&params, &ids, None), &parallel, &what);

                let steps = Sequences::new(&model, &params, 2).steps(&ids);
                assert_close(&steps, &parallel, &what);
            }
        }
    }
}

#[test]
fn query_and_key_norms_change_the_result() {
    let ids = ids(1, 12, 0);
    let [without, with] = [false, true].map(|qk_norm| {
        let config = config(4, 2, supra(Decay::Alibi, qk_norm, 64));
        Transformer::new(config.clone()).logits(&weights(&config, 1), &ids, None)
    });
    assert!((without - with).abs().max().double_value(&[]) > 1e-3);
}

#[test]
fn rounded_frequencies_change_the_result_a_little() {
    let ids = ids(1, 40, 0);
    let [exact, rounded] =
        [RopeFrequencies::Exact, RopeFrequencies::Bf16].map(|rope_frequencies| {
            let attention = AttentionKind::Supra(SupraConfig {
                rope_frequencies,
                ..SupraConfig::default()
            });
            let config = config(4, 4, attention);
            Transformer::new(config.clone()).logits(&weights(&config, 1), &ids, None)
        });
    let change = (&exact - rounded).norm().double_value(&[]) / exact.norm().double_value(&[]);
    assert!((1e-5..0.3).contains(&change), "{change:e}");
}

#[test]
fn packed_documents_are_documents_alone() {
    tch::set_num_threads(1);
    let _guard = tch::no_grad_guard();
    // Starts at the borders of chunks, beside them, in rows that go on with an earlier document, in none, behind the end.
    let rows: [Vec<u32>; 5] = [
        vec![0, 8, 16],
        vec![7, 8, 9],
        vec![],
        vec![0, 1, 22],
        vec![15, 23, 99],
    ];
    let tokens = 23;
    for attention in [
        AttentionKind::Softmax,
        supra(Decay::Alibi, false, 8),
        supra(Decay::None, true, 5),
    ] {
        let config = config(4, 2, attention);
        let params = weights(&config, 9);
        let ids = ids(5, tokens, 3);
        let documents = Documents::from_starts(&rows, tokens as usize);
        let model = Transformer::new(config.clone());
        let packed = model.logits(&params, &ids, Some(&documents));
        if config.supra().is_some() {
            let parallel =
                model
                    .clone()
                    .with_form(Form::Parallel)
                    .logits(&params, &ids, Some(&documents));
            assert_close(&parallel, &packed, "parallel form with documents");
        }
        let mut sequences = Sequences::new(&model, &params, 5);
        let read = sequences.extend_documents(&ids, &documents);
        assert_close(&read, &packed, "prefill with documents");
        let next = Tensor::from_slice(&[1i64, 2, 3, 4, 5]);
        let continued = sequences.step(&next);
        for (row, starts) in (0..).zip(&rows) {
            let inside: Vec<u32> = starts
                .iter()
                .copied()
                .filter(|&start| i64::from(start) < tokens)
                .collect();
            let (expected, mut last) = alone(&model, &params, &ids.narrow(0, row, 1), &inside);
            assert_close(
                &packed.narrow(0, row, 1),
                &expected,
                &format!("{attention:?}, row {row}"),
            );
            let expected = last.step(&next.narrow(0, row, 1));
            assert_close(
                &continued.narrow(0, row, 1),
                &expected,
                &format!("{attention:?}, after row {row}"),
            );
        }
    }
}

#[test]
fn a_document_may_go_on_in_the_next_row() {
    let _guard = tch::no_grad_guard();
    for attention in [AttentionKind::Softmax, supra(Decay::Alibi, false, 4)] {
        let config = config(2, 1, attention);
        let params = weights(&config, 4);
        let (ids, model) = (ids(1, 20, 8), Transformer::new(config.clone()));
        let whole = model.logits(
            &params,
            &ids,
            Some(&Documents::from_starts(&[vec![3, 14]], 20)),
        );
        let mut sequences = Sequences::new(&model, &params, 1);
        let parts = [(0, 10, vec![3]), (10, 10, vec![4])].map(|(from, tokens, starts)| {
            let documents = Documents::from_starts(&[starts], tokens as usize);
            sequences.extend_documents(&ids.narrow(1, from, tokens), &documents)
        });
        assert_close(&Tensor::cat(&parts, 1), &whole, &format!("{attention:?}"));
    }
}

#[test]
fn gradients_do_not_depend_on_form_chunk_or_packing() {
    tch::set_num_threads(1);
    let gradients = |attention: AttentionKind, form: Form| {
        let config = config(4, 2, attention);
        let params = leaves(&weights(&config, 2));
        let ids = ids(2, 27, 1);
        let input = LossInput {
            inputs_bt: ids.narrow(1, 0, 26),
            targets_bt: ids.narrow(1, 1, 26),
            mask_bt: Tensor::ones([2, 26], (Kind::Bool, Device::Cpu)),
            documents: Some(Documents::from_starts(&[vec![0, 9], vec![8, 16]], 26)),
        };
        let loss = Transformer::new(config)
            .with_form(form)
            .loss_sum(&params, &input, 1e-3);
        loss.objective.backward();
        Tensor::cat(
            &params
                .iter()
                .map(|(_, tensor)| tensor.grad().flatten(0, -1))
                .collect::<Vec<_>>(),
            0,
        )
    };
    let expected = gradients(supra(Decay::Alibi, true, 8), Form::Parallel);
    for chunk in [1, 5, 8, 26, 64] {
        let found = gradients(supra(Decay::Alibi, true, chunk), Form::Chunkwise);
        assert_close(&found, &expected, &format!("chunks of {chunk}"));
    }
}

#[test]
fn far_positions_are_as_exact_as_near_ones() {
    let _guard = tch::no_grad_guard();
    let config = config(2, 2, supra(Decay::Alibi, false, 16));
    let params = weights(&config, 6);
    let (ids, model) = (ids(1, 16, 2), Transformer::new(config.clone()));
    let near = model.logits(&params, &ids, None);
    let mut sequences = Sequences::new(&model, &params, 1);
    // The attention sees differences of positions only.
    sequences.slots.positions_s[0] = 1 << 17;
    let far = sequences.extend(&ids);
    let error = (&far - &near).norm().double_value(&[]) / near.norm().double_value(&[]);
    assert!(error < 1e-9, "{error:e}");
}
