//! Models that another library made and computed: the same logits, the same greedy tokens, the same bits when written back.
//!
//! `scripts/test-parity` makes the fixtures anew. Of a SUPRA model the other library is transformers with the code that an
//! export brings along.

use std::path::Path;

use supra_worker::model::files::tensors::TensorFiles;
use supra_worker::model::{ModelConfig, NewWeights};
use supra_worker::model::{SaveFormat, Transformer, load_params, save_model};
use tch::{Kind, Tensor};

use super::fixture::{Family, Fixture};
use super::measure::{Verdict, max_abs};
use super::run::token_by_token;
use crate::sequences::Sequences;

fn each(check: impl Fn(&Fixture)) {
    tch::set_num_threads(1);
    let fixtures = Fixture::parity();
    for family in [Family::HuggingFace, Family::Supra] {
        let count = fixtures
            .iter()
            .filter(|fixture| fixture.family == family)
            .count();
        assert!(count >= 3, "{count} fixtures of the family {family:?}");
    }
    fixtures.iter().for_each(check);
}

#[test]
fn golden_parity_logits() {
    each(|fixture| {
        let (ids, params) = (fixture.get("input_ids"), fixture.params(Kind::Float));
        let model = Transformer::new(fixture.config.clone());
        let golden = fixture.get("logits");
        let mut verdict = Verdict::new(fixture.name());
        let whole = tch::no_grad(|| model.logits(&params, &ids, None));
        verdict.bound("logits", max_abs(&whole, &golden), 1e-4);
        if fixture.family == Family::Supra {
            let (steps, _) = tch::no_grad(|| token_by_token(fixture, &params, ids.size()[1]));
            verdict.bound("recurrent", max_abs(&steps, &golden), 1e-4);
        }
        verdict.close();
    });
}

#[test]
fn golden_parity_greedy_tokens() {
    each(|fixture| {
        let params = fixture.params(Kind::Float);
        let model = Transformer::new(fixture.config.clone());
        let golden = fixture.get("generate");
        let tokens: Vec<Tensor> = tch::no_grad(|| {
            let ids_bt = fixture.get("input_ids");
            let mut sequences = Sequences::new(&model, &params, ids_bt.size()[0]);
            let logits_btv = sequences.extend(&ids_bt);
            let mut next_b = logits_btv.select(1, -1).argmax(-1, false);
            (0..golden.size()[1])
                .map(|_| {
                    let token_b = next_b.shallow_clone();
                    next_b = sequences.step(&token_b).argmax(-1, false);
                    token_b
                })
                .collect()
        });
        assert_eq!(Tensor::stack(&tokens, 1), golden, "{}", fixture.name());
    });
}

/// All tensors of a directory by name, with kind, shape and bytes.
fn stored(dir: &Path) -> Vec<(String, Kind, Vec<i64>, Vec<u8>)> {
    let files = TensorFiles::open(dir).unwrap();
    let read = |name: &str| {
        let tensor = files.read(name).unwrap().unwrap();
        let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.copy_data_u8(&mut bytes, tensor.numel());
        (name.to_owned(), tensor.kind(), tensor.size(), bytes)
    };
    files.names().map(read).collect()
}

/// Loads a model and writes it again.
fn rewrite(from: &Path, to: &Path, format: SaveFormat) {
    let config = ModelConfig::load(from).unwrap();
    let (params, _) = load_params(from, &config, NewWeights::Refuse).unwrap();
    save_model(to, &config, &params, None, format).unwrap();
}

#[test]
fn golden_parity_weights_come_back_with_the_same_bits() {
    each(|fixture| {
        let dir = tempfile::tempdir().unwrap();
        let original = stored(&fixture.dir);
        let kind = original[0].1;
        let [ours, back, openlm, again] =
            ["ours", "back", "openlm", "again"].map(|name| dir.path().join(name));
        rewrite(&fixture.dir, &ours, SaveFormat::Native);
        rewrite(&ours, &back, SaveFormat::HuggingFace { kind });
        assert!(stored(&back) == original, "{}", fixture.name());
        assert_eq!(ModelConfig::load(&back).unwrap(), fixture.config);

        rewrite(&ours, &openlm, SaveFormat::OpenLm { kind });
        rewrite(&openlm, &again, SaveFormat::OpenLm { kind });
        assert!(stored(&again) == stored(&openlm), "{}", fixture.name());
        assert_eq!(ModelConfig::load(&again).unwrap(), fixture.config);
        let output = TensorFiles::open(&openlm)
            .unwrap()
            .contains("model.output.weight");
        assert!(
            output,
            "its reader wants the output matrix of tied models, too"
        );
    });
}
