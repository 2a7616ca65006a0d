//! The program as a process: answers, errors, exit codes.

use std::{path::Path, process::Command};

use serde_json::Value;
use supra_recipes::schema::{Attention, Base, Budget, Tokens};

use crate::fixture::{Generation, LEDGER_HEAD, World};

/// Runs the program; returns exit code, stdout and stderr.
pub fn worker(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_supra-worker"))
        .args(arguments)
        // Threads of such small work would only wait for each other.
        .env("SUPRA_LOCAL_WORKERS", "4096")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap_or(-1),
        text(&output.stdout),
        text(&output.stderr),
    )
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn loss(model: &Path, data: &Path) -> f64 {
    let (code, out, err) = worker(&[
        "eval",
        "--model",
        &shown(model),
        "--data",
        &shown(data),
        "--sequence-length",
        "16",
        "--json",
    ]);
    assert_eq!(code, 0, "{err}");
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert!(answer["targets"].as_u64().unwrap() > 100);
    answer["loss"].as_f64().unwrap()
}

#[test]
fn a_base_is_pretrained_exported_converted_uptrained_and_used() {
    let world = World::new(400);
    let heldout = world.data().join("heldout.json");
    let mut recipe = world.recipe("optimizer: { lr: 2e-2, final_lr: 1e-3, warmup: 2 steps }");
    recipe.attention = Attention::Softmax;
    recipe.budget = Budget::exactly(Tokens(3200));
    let root = world.checkpoints("base");
    let ranks = Generation::new(&recipe, &root).run(1);
    let checkpoint = root.join(&ranks[0].checkpoints.last().unwrap().path);

    let base = world.dir.path().join("exported");
    let (code, out, err) = worker(&[
        "export",
        "--checkpoint",
        &shown(&checkpoint),
        "--out",
        &shown(&base),
    ]);
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains("Hugging Face model of run run-1 at step"),
        "{out}"
    );
    let origin = std::fs::read(base.join("supra_origin.json")).unwrap();
    let origin: Value = serde_json::from_slice(&origin).unwrap();
    let head: String = LEDGER_HEAD
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        (&origin["run"], &origin["ledger_head"]),
        (&"run-1".into(), &head.into())
    );
    assert_eq!(origin["tokens"], 3200);
    let base_loss = loss(&base, &heldout);
    assert!(
        (loss(&checkpoint, &heldout) - base_loss).abs() < 1e-9,
        "an export is the checkpoint"
    );

    let converted = world.dir.path().join("converted");
    let (code, out, err) = worker(&[
        "convert",
        "--base",
        &shown(&base),
        "--out",
        &shown(&converted),
    ]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("8 new ones"), "{out}");
    let converted_loss = loss(&converted, &heldout);

    recipe.attention = Attention::Supra;
    recipe.base = Base::Pretrained(base);
    recipe.budget = Budget::exactly(Tokens(1600));
    let root = world.checkpoints("uptrained");
    let ranks = Generation::new(&recipe, &root).run(1);
    let uptrained = root.join(&ranks[0].checkpoints.last().unwrap().path);
    let uptrained_loss = loss(&uptrained, &heldout);
    assert!(
        uptrained_loss < converted_loss - 0.1,
        "{base_loss} base, {converted_loss} converted, {uptrained_loss}"
    );

    let model = world.dir.path().join("model");
    let (code, _, err) = worker(&[
        "export",
        "--checkpoint",
        &shown(&uptrained),
        "--out",
        &shown(&model),
        "--dtype",
        "bf16",
    ]);
    assert_eq!(code, 0, "{err}");
    assert!((loss(&model, &heldout) - uptrained_loss).abs() < 0.05);
    let text = |seed: &str| {
        let (code, out, err) = worker(&[
            "generate",
            "--model",
            &shown(&model),
            "--prompt",
            "w5 w9",
            "--max-tokens",
            "12",
            "--seed",
            seed,
            "--json",
        ]);
        assert_eq!(code, 0, "{err}");
        let answer: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(answer["prompt_tokens"], 2);
        answer["text"].as_str().unwrap().to_owned()
    };
    let texts = ["1", "1", "2", "3"].map(text);
    assert_eq!(texts[0], texts[1]);
    // A text may end at once, but what there is goes on from the prompt.
    assert!(texts.iter().any(|text| !text.is_empty()));
    assert!(
        texts
            .iter()
            .all(|text| text.is_empty() || text.starts_with(" w")),
        "{texts:?}"
    );
    let (code, out, err) = worker(&["generate", "--model", &shown(&model), "--prompt", "w5 w9"]);
    assert_eq!(code, 0);
    assert!(
        out.starts_with("w5 w9") && err.contains("tokens/s"),
        "{out}{err}"
    );
}

#[test]
fn a_damaged_checkpoint_is_not_exported() {
    let world = World::new(120);
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(1);
    let checkpoint = root.join(&ranks[0].checkpoints[0].path);
    let weights = checkpoint.join("model-rank-000-of-001-00001.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let out = world.dir.path().join("out");
    let (code, _, err) = worker(&[
        "export",
        "--checkpoint",
        &shown(&checkpoint),
        "--out",
        &shown(&out),
    ]);
    assert_eq!(code, 4);
    assert!(
        err.starts_with("error: checkpoint damaged")
            && err.contains("model-rank-000-of-001-00001.safetensors"),
        "{err}"
    );
    assert!(!out.exists());
}

#[test]
fn bad_input_is_told_in_one_paragraph() {
    let world = World::new(120);
    let (base, data) = (shown(&world.base()), shown(&world.data()));
    let cases: &[(&[&str], i32, &str)] = &[
        (
            &["eval", "--model", "/nowhere", "--data", &data],
            2,
            "/nowhere",
        ),
        (
            &["eval", "--model", &base, "--data", &data],
            2,
            "safetensors",
        ),
        (
            &["export", "--checkpoint", &base, "--out", "/nowhere"],
            4,
            "manifest.json",
        ),
        (
            &["eval", "--model", &base, "--data", &data, "--device", "gpu"],
            2,
            "cuda:N",
        ),
        (
            &[
                "generate", "--model", &base, "--prompt", "x", "--top-p", "2",
            ],
            2,
            "at most 1",
        ),
        (&["fly"], 2, "fly"),
    ];
    for (arguments, expected, word) in cases {
        let (code, out, err) = worker(arguments);
        assert_eq!(code, *expected, "{arguments:?}: {err}");
        assert!(err.contains(word), "{arguments:?}: {err}");
        assert!(
            out.is_empty() && !err.contains("panicked"),
            "{arguments:?}: {err}"
        );
    }
}

#[test]
fn cuda_is_refused_where_there_is_none() {
    if Path::new("/proc/driver/nvidia").exists() {
        return;
    }
    let world = World::new(60);
    let (base, data) = (shown(&world.base()), shown(&world.data()));
    let (code, _, err) = worker(&[
        "eval", "--model", &base, "--data", &data, "--device", "cuda:0",
    ]);
    assert_eq!(code, 1);
    assert!(
        err.starts_with("error: cuda:0") && err.contains("cpu") | err.contains("nvidia-smi"),
        "{err}"
    );
}

#[test]
fn help_and_version_need_nothing() {
    assert_eq!(worker(&["--version"]).0, 0);
    for command in ["run", "generate", "replay"] {
        let (code, out, _) = worker(&[command, "--help"]);
        assert_eq!(code, 0);
        assert!(out.contains("Usage"), "{out}");
    }
}
