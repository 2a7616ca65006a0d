//! Texts from models.

mod command;
mod texts;

use std::path::{Path, PathBuf};

use supra_worker::{
    inference::{
        engine::{Engine, Output, Piece, Slot, Want},
        load::LoadedModel,
    },
    model::{
        AttentionKind, Decay, ModelConfig, RopeFrequencies, SaveFormat, SupraConfig, Transformer,
        init_all, save_model,
    },
};
use tch::{Device, Kind};

use crate::{fixture::World, network::map};

/// Several chunks in short texts.
const SUPRA: AttentionKind = AttentionKind::Supra(SupraConfig {
    decay: Decay::Alibi,
    qk_norm: false,
    rope_frequencies: RopeFrequencies::Exact,
    chunk: 8,
});

/// Writes a model of the tiny shape with random weights that have opinions.
fn model_dir(world: &World, attention: AttentionKind, seed: u64) -> PathBuf {
    let config = ModelConfig::load(&world.base())
        .unwrap()
        .with_attention(attention);
    let params = map(&init_all(&config, seed), |weight| match weight.dim() {
        1 => weight.copy(),
        _ => weight * 3.0,
    });
    let name = format!(
        "{}-{seed}",
        if config.supra().is_some() {
            "supra"
        } else {
            "softmax"
        }
    );
    let dir = world.dir.path().join(name);
    let format = SaveFormat::HuggingFace { kind: Kind::Float };
    save_model(&dir, &config, &params, Some(&world.base()), format).unwrap();
    dir
}

fn engine(dir: &Path, kind: Kind, slots: usize) -> Engine {
    tch::set_num_threads(1);
    let mut model = LoadedModel::open(dir, Device::Cpu, kind).unwrap();
    let config = model.transformer.config().clone();
    if config.supra().is_some() {
        // A directory does not say how long chunks are.
        model.transformer = Transformer::new(config.with_attention(SUPRA));
    }
    Engine::new(model, slots).unwrap()
}

fn logits(engine: &mut Engine, slot: &Slot, tokens: &[u32]) -> Vec<f32> {
    let want = Want::Logits;
    match engine
        .advance(&[Piece { slot, tokens, want }])
        .unwrap()
        .pop()
    {
        Some(Output::Logits(logits)) => logits,
        other => panic!("{other:?}"),
    }
}

/// Tokens that look like a text.
fn text(length: u32, seed: u32) -> Vec<u32> {
    (0..length)
        .map(|at| 3 + (at * at * 7 + at * 5 + seed) % 58)
        .collect()
}
