//! What `supra-worker bench decode` and `flat` measure, with small models on the processor.

use supra_worker::{
    bench::decode::{decode, far, prefill, random_model},
    inference::engine::Engine,
    model::{AttentionKind, Decay},
};
use tch::{Device, Kind};

use crate::network::{config, supra};

fn engine(attention: AttentionKind) -> Engine {
    let model = random_model(config(4, 2, attention), (Kind::Float, Device::Cpu), 1).unwrap();
    Engine::new(model, 3).unwrap()
}

#[test]
fn a_state_stays_as_large_as_it_was_and_a_cache_grows() {
    let lengths = [1, 10, 100];
    let [recurrent, softmax] = [supra(Decay::Alibi, false, 8), AttentionKind::Softmax]
        .map(|attention| far(&mut engine(attention), &lengths, 2).unwrap());
    for (row, &length) in recurrent.iter().zip(&lengths) {
        assert_eq!((row.tokens, row.bytes), (length, 2 * 4 * 8 * 8 * 4));
        assert!(row.milliseconds > 0.0);
    }
    for (row, &length) in softmax.iter().zip(&lengths) {
        // Two tokens were timed; two layers, keys and values of two heads of eight channels.
        let bytes = (length as u64 + 2) * 2 * 2 * 2 * 8 * 4;
        assert_eq!((row.tokens, row.bytes), (length, bytes));
    }
}

#[test]
fn steps_and_prompts_are_timed_and_slots_given_back() {
    let mut engine = engine(supra(Decay::Alibi, false, 8));
    let row = decode(&mut engine, 3, 2).unwrap();
    assert!(row.batch == 3 && row.tokens_per_second > 0.0 && row.share_of_bound > 0.0);
    let row = prefill(&mut engine, 50).unwrap();
    assert!(row.tokens == 50 && row.seconds > 0.0);
    assert_eq!(engine.free(), 3);
    let refused = decode(&mut engine, 4, 1).unwrap_err().to_string();
    assert!(refused.contains("all 3 slots are taken"), "{refused}");
}
