//! Models as other programs save them: the same bits as the golden ones, and the same logits.

use std::{
    fs,
    path::{Path, PathBuf},
};

use supra_worker::model::{
    LoadReport, ModelConfig, NewWeights, Params, Transformer,
    files::tensors::{self, TensorFiles},
    load_params,
};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use crate::cli::worker;

fn golden(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    root.join(name)
}

fn copy_all(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A folder of tests/golden/pytorch to work on, with the configuration of a golden model where it has none of its own.
fn foreign(name: &str, configuration: Option<&str>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_all(&golden("pytorch").join(name), dir.path());
    if let Some(name) = configuration {
        fs::copy(
            golden(name).join("config.json"),
            dir.path().join("config.json"),
        )
        .unwrap();
    }
    dir
}

fn load(model: &Path) -> (ModelConfig, Params, LoadReport) {
    let config = ModelConfig::load(model).unwrap();
    let (params, report) = load_params(model, &config, NewWeights::Refuse).unwrap();
    (config, params, report)
}

fn complaint(model: &Path) -> String {
    let config = ModelConfig::load(model);
    let loaded = config.and_then(|config| load_params(model, &config, NewWeights::Refuse));
    loaded.expect_err("should have been refused").to_string()
}

#[track_caller]
fn assert_same(found: &Params, expected: &Params) {
    assert_eq!(found.len(), expected.len());
    for ((name, found), (other, expected)) in found.iter().zip(expected.iter()) {
        assert_eq!(name, other);
        // The kinds are fp32 and every value finite: equal values are equal bits but for the sign of zero.
        assert!(found == expected, "{name}");
    }
}

#[track_caller]
fn assert_golden_logits(config: &ModelConfig, params: &Params, name: &str) {
    let answers = TensorFiles::open_file(&golden(name).join("golden.safetensors")).unwrap();
    let answer = |key| answers.read(key).unwrap().unwrap();
    let logits = tch::no_grad(|| {
        Transformer::new(config.clone()).logits(params, &answer("input_ids"), None)
    });
    let difference = (logits - answer("logits")).abs().max().double_value(&[]);
    assert!(difference <= 1e-4, "{name}: {difference}");
}

#[test]
fn every_layout_gives_the_golden_bits_and_logits() {
    for (folder, configuration, name, said) in [
        (
            "supra-heads6",
            None,
            "supra-heads6",
            "open_lm, behind `module.` layout in one PyTorch file: 23 tensors matched, 0 weights missing, 0 tensors \
             unexpected, 2 ignored, 0 reshaped",
        ),
        (
            "supra-heads6-released",
            Some("supra-heads6"),
            "supra-heads6",
            "open_lm, behind `model.` layout in one PyTorch file: 23 tensors matched, 0 weights missing, 0 tensors \
             unexpected, 0 ignored, 0 reshaped",
        ),
        (
            "meta-mistral-gqa",
            None,
            "hf-mistral-gqa",
            "Meta layout in one PyTorch file: 21 tensors matched, 0 weights missing, 0 tensors unexpected, 0 ignored, \
             10 reshaped",
        ),
        (
            "meta-llama-mha",
            None,
            "hf-llama-mha",
            "Meta layout in 2 PyTorch files: 21 tensors matched, 0 weights missing, 0 tensors unexpected, 1 ignored, \
             16 reshaped",
        ),
    ] {
        let dir = foreign(folder, configuration);
        let (config, params, report) = load(dir.path());
        assert_eq!(report.to_string(), said);
        let (_, expected, _) = load(&golden(name));
        assert_same(&params, &expected);
        assert_golden_logits(&config, &params, name);
    }
}

#[test]
fn half_precision_is_read_to_the_bit() {
    for (folder, kind) in [
        ("hf-llama-tied", Kind::BFloat16),
        ("hf-mistral-gqa", Kind::Half),
    ] {
        let dir = foreign(folder, Some(folder));
        let (_, params, _) = load(dir.path());
        let (_, expected, _) = load(&golden(folder));
        let rounded = expected.to(Device::Cpu, kind).to(Device::Cpu, Kind::Float);
        assert_same(&params, &rounded);
    }
}

#[test]
fn mistral_s_own_safetensors_are_read_as_its_pickle_is() {
    let dir = foreign("meta-mistral-gqa", None);
    let (_, expected, _) = load(dir.path());
    let pickle = dir.path().join("consolidated.00.pth");
    let files = TensorFiles::open_file(&pickle).unwrap();
    let named: Vec<(String, Tensor)> = files
        .names()
        .map(|name| (name.to_owned(), files.read(name).unwrap().unwrap()))
        .collect();
    tensors::write(&dir.path().join("consolidated.safetensors"), named).unwrap();
    fs::remove_file(pickle).unwrap();
    let (_, params, report) = load(dir.path());
    assert_same(&params, &expected);
    assert!(report.layout.contains("safetensors"), "{report}");
}

#[test]
fn one_checkpoint_of_several_is_named() {
    let run = foreign("supra-heads6", None);
    let checkpoints = run.path().join("checkpoints");
    fs::create_dir(&checkpoints).unwrap();
    let epoch = checkpoints.join("epoch_1.pt");
    fs::rename(run.path().join("epoch_1.pt"), &epoch).unwrap();
    let (_, expected, _) = load(run.path());
    fs::copy(&epoch, checkpoints.join("epoch_12.pt")).unwrap();
    let complaint = complaint(run.path());
    assert!(
        complaint.contains("2 checkpoints") && complaint.contains("epoch_12.pt"),
        "{complaint}"
    );
    let (config, params, _) = load(&epoch);
    assert_same(&params, &expected);
    assert_golden_logits(&config, &params, "supra-heads6");
}

#[test]
fn what_is_missing_or_does_not_belong_is_named() {
    let dir = foreign("meta-llama-mha", None);
    let [first, second] =
        ["consolidated.00.pth", "consolidated.01.pth"].map(|name| dir.path().join(name));
    fs::rename(&first, dir.path().join("kept")).unwrap();
    assert!(complaint(dir.path()).contains("consolidated.00.pth is missing"));
    fs::rename(dir.path().join("kept"), &first).unwrap();
    let whole = fs::read(&second).unwrap();
    fs::write(&second, &whole[..whole.len() - 9]).unwrap();
    let found = complaint(dir.path());
    assert!(
        found.contains("consolidated.01.pth") && found.contains("ends early"),
        "{found}"
    );
    // One byte of a weight: its CRC-32 tells.
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    fs::write(&second, flipped).unwrap();
    let found = complaint(dir.path());
    assert!(
        found.contains("consolidated.01.pth") && found.contains("CRC-32"),
        "{found}"
    );
    fs::copy(
        golden("pytorch/meta-mistral-gqa/consolidated.00.pth"),
        &second,
    )
    .unwrap();
    let found = complaint(dir.path());
    assert!(found.contains("not the parts of one model"), "{found}");
    fs::remove_file(&second).unwrap();
    let found = complaint(dir.path());
    assert!(
        found.contains("wrong shape") && found.contains("Meta layout"),
        "{found}"
    );

    let dir = foreign("supra-heads6", None);
    fs::remove_file(dir.path().join("linear_heads6.json")).unwrap();
    assert!(complaint(dir.path()).contains("the model `linear_heads6`; copy its configuration"));
}

#[test]
fn a_model_of_meta_s_is_converted_and_its_tokenizer_asked_for() {
    let dir = foreign("meta-llama-mha", None);
    fs::write(dir.path().join("tokenizer.model"), b"SentencePiece").unwrap();
    let out = dir.path().join("out");
    let shown = |path: &Path| path.display().to_string();
    let (code, _, err) = worker(&[
        "convert",
        "--base",
        &shown(dir.path()),
        "--out",
        &shown(&out),
    ]);
    assert_eq!(code, 0, "{err}");
    assert!(
        err.contains("Meta layout in 2 PyTorch files: 21 tensors matched"),
        "{err}"
    );
    assert!(err.contains("tokenizer.json"), "{err}");
    let (code, _, err) = worker(&["generate", "--model", &shown(&out), "--prompt", "x"]);
    assert!(code == 2 && err.contains("save_pretrained"), "{err}");
    let (_, converted, _) = load(&out);
    let (_, base, _) = load(&golden("hf-llama-mha"));
    for (name, expected) in base.iter() {
        assert!(converted.get(name) == expected, "{name}");
    }
}
