//! A converted model is the expected one, bit for bit, in memory and on disk.

use std::fs;

use serde_json::Value;
use supra_worker::model::{AttentionKind, NewWeights, Params, SaveFormat, load_params, save_model};
use tch::Kind;

use super::each;
use super::fixture::{Family, Fixture};

/// The softmax fixture that a converted one was made from: the one with its embeddings.
fn base_of(fixture: &Fixture, expected: &Params) -> Fixture {
    let embeddings = |params: &Params| params.get("tok_embeddings.weight").shallow_clone();
    let is_base = |base: &Fixture| {
        base.family == Family::HuggingFace
            && embeddings(&base.params(Kind::Float)) == embeddings(expected)
    };
    Fixture::all()
        .into_iter()
        .chain(Fixture::copies())
        .find(is_base)
        .unwrap_or_else(|| panic!("no base of {} among the fixtures", fixture.name()))
}

fn assert_same(found: &Params, expected: &Params) {
    assert_eq!(found.len(), expected.len());
    for ((name, found), (expected_name, expected)) in found.iter().zip(expected.iter()) {
        assert_eq!(name, expected_name);
        assert_eq!(bits(found), bits(expected), "{name}");
    }
}

fn bits(tensor: &tch::Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * 4];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

#[test]
fn golden_conversion_is_exact() {
    each(Family::Convert, |fixture| {
        let expected = fixture.params(Kind::Float);
        let base = base_of(fixture, &expected);
        let supra = AttentionKind::Supra(*fixture.config.supra().unwrap());
        let config = base.config.clone().with_attention(supra);
        let file = fixture.dir.join("supra_init.safetensors");
        let (converted, report) = load_params(&base.dir, &config, NewWeights::File(&file)).unwrap();
        assert!(report.missing.iter().all(|name| name.contains("_totrain_")));
        assert_same(&converted, &expected);

        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("converted");
        save_model(
            &out,
            &config,
            &converted,
            Some(&base.dir),
            SaveFormat::Native,
        )
        .unwrap();
        let json = |path: &std::path::Path| -> Value {
            serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap()
        };
        let written = json(&out);
        for (field, value) in json(&fixture.dir).as_object().unwrap() {
            assert_eq!(&written[field], value, "{field}");
        }
        let (read, _) = load_params(&out, &config, NewWeights::Refuse).unwrap();
        assert_same(&read, &expected);
    });
}

#[test]
fn golden_conversion_draws_only_what_is_new() {
    each(Family::Convert, |fixture| {
        let expected = fixture.params(Kind::Float);
        let base = base_of(fixture, &expected);
        let config = base.config.clone().with_attention(fixture.config.attention);
        let (drawn, _) = load_params(&base.dir, &config, NewWeights::Seeded(17)).unwrap();
        for (spec, (name, tensor)) in config.params().iter().zip(drawn.iter()) {
            assert_eq!(spec.new, tensor != expected.get(name), "{name}");
        }
    });
}
