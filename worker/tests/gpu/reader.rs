//! Prompts through the kernels of training against libtorch in fp64 on the same rounded weights, beside what libtorch makes of
//! them in bf16.

use std::rc::Rc;

use supra_worker::{
    inference::reader::Reader,
    model::{AttentionKind, Slots, SupraConfig, Transformer, attention::ragged::Span},
};
use tch::{Kind, Tensor};

use super::bench::{GPU, distance};
use super::decode::{config, states, weights};
use super::gpu;

/// How much further off than libtorch in bf16 it may be.
const FURTHER: f64 = 1.5;

/// Spans of three turns: slots, and how many tokens each gets.
const TURNS: [&[(usize, i64)]; 3] = [
    &[(2, 700)],
    &[(0, 1), (2, 1), (3, 129), (1, 300)],
    &[(3, 1), (1, 500), (2, 64), (0, 128)],
];

#[test]
fn gpu_prompts_are_read_as_well_as_by_libtorch() {
    if gpu("gpu_prompts_are_read_as_well_as_by_libtorch").is_none() {
        return;
    }
    let _guard = tch::no_grad_guard();
    let (supra, softmax) = (
        AttentionKind::Supra(SupraConfig::default()),
        AttentionKind::Softmax,
    );
    for (attention, head_dim, heads, kv_heads) in [
        (supra, 128, 4, 2),
        (supra, 64, 4, 4),
        (supra, 32, 4, 2),
        (softmax, 64, 4, 2),
    ] {
        let config = config(attention, head_dim, heads, kv_heads, false);
        let model = Transformer::new(config.clone());
        let rounded = weights(&config);
        let kinds = [Kind::BFloat16, Kind::BFloat16, Kind::Double];
        let params = kinds.map(|kind| rounded.to(GPU, kind));
        let mut slots = kinds.map(|kind| Slots::new(&config, 4, GPU, kind).unwrap());
        let reader = Reader::new(Rc::new(gpu("the reader").unwrap()));
        for turn in TURNS {
            let what = format!("{attention:?}, heads of {head_dim}, {turn:?}");
            let spans: Vec<Span> = turn
                .iter()
                .map(|&(slot, tokens)| Span { slot, tokens })
                .collect();
            let n = spans.iter().map(|span| span.tokens).sum::<i64>();
            let ids_n = Tensor::randint(config.vocab, [n], (Kind::Int64, GPU));
            let [ours, libtorch, exact] = &mut slots;
            let read = reader.advance(&config, &params[0], ours, &ids_n, &spans);
            let streams = [
                read.unwrap(),
                model.advance(&params[1], libtorch, &ids_n, &spans),
                model.advance(&params[2], exact, &ids_n, &spans),
            ];
            let off = |at: usize| {
                let logits = [at, 2].map(|at| model.head(&params[at], &streams[at]));
                let states = [at, 2].map(|at| states(&slots[at]));
                [logits, states].map(|[found, right]| distance(&found, &right))
            };
            for ((ours, libtorch), of) in off(0).into_iter().zip(off(1)).zip(["logits", "states"]) {
                println!("{what}: {of} are {ours:.2e} off, libtorch's {libtorch:.2e}");
                assert!(ours < FURTHER * libtorch, "{what}: {of}");
            }
        }
    }
}
