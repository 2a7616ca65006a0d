//! `supra-worker export` as a process: what it writes for whom, and what it refuses.

use std::{fs, path::Path};

use serde_json::Value;
use supra_worker::model::files::tensors::TensorFiles;

use crate::{
    cli::worker,
    fixture::{Generation, World},
};

fn golden(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
        .display()
        .to_string()
}

/// Runs an export of a model directory that must succeed; its JSON answer.
fn export(model: &str, out: &Path, more: &[&str]) -> Value {
    let out = out.display().to_string();
    let arguments = ["export", "--model", model, "--out", &out, "--json"];
    let (code, answer, err) = worker(&[&arguments[..], more].concat());
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&answer).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_format_accounts_for_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let supra = dir.path().join("supra");
    let answer = export(&golden("supra-gqa"), &supra, &[]);
    let weights = answer["read"]["matched"].as_array().unwrap().len();
    assert_eq!(answer["written"]["tensors"], weights);
    assert_eq!(
        (&answer["run"], &answer["layout"]),
        (&Value::Null, &"SUPRA".into())
    );
    let config = json(&supra.join("config.json"));
    assert_eq!(config["model_type"], "supra");
    let code = config["auto_map"]["AutoModelForCausalLM"].as_str().unwrap();
    let (module, class) = code.split_once('.').unwrap();
    let code = fs::read_to_string(supra.join(format!("{module}.py"))).unwrap();
    assert!(code.contains(&format!("class {class}(")), "{class}");
    assert_eq!(
        json(&supra.join("generation_config.json"))["use_cache"],
        true
    );
    let card = fs::read_to_string(supra.join("README.md")).unwrap();
    assert!(
        card.contains("None recorded: the weights come from a model directory"),
        "{card}"
    );

    let softmax = dir.path().join("softmax");
    let answer = export(&golden("hf-mistral-gqa"), &softmax, &["--dtype", "bf16"]);
    // Two layers whose q, k, v and gate, up were each one weight.
    assert_eq!(answer["written"]["reshaped"].as_object().unwrap().len(), 4);
    assert_eq!(
        json(&softmax.join("config.json"))["torch_dtype"],
        "bfloat16"
    );
    assert!(!softmax.join("modeling_supra.py").exists());

    // Tied: the wrapper wants the output matrix all the same.
    let openlm = dir.path().join("openlm");
    let answer = export(&golden("supra-gqa"), &openlm, &["--format", "openlm"]);
    assert_eq!(answer["written"]["repeated"][0], "model.output.weight");
    let config = json(&openlm.join("config.json"));
    assert_eq!(config["architectures"][0], "OpenLMForCausalLM");
    assert_eq!(config["n_heads_kv"], 2);
    let files = TensorFiles::open(&openlm).unwrap();
    assert!(files.names().all(|name| name.starts_with("model.")));

    let training = dir.path().join("training");
    export(&golden("supra-gqa"), &training, &["--format", "openlm-pt"]);
    assert_eq!(json(&training.join("config.json"))["hidden_dim"], 128);
    assert!(training.join("epoch_0.pt").exists());
}

#[test]
fn what_a_format_cannot_say_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let six = golden("supra-heads6");
    for (arguments, word) in [
        (&["--model", &six, "--format", "openlm"][..], "power of two"),
        (&["--model", &six, "--format", "torch"][..], "openlm"),
        (&["--model", &six, "--checkpoint", &six][..], "--checkpoint"),
        (&[][..], "--checkpoint"),
    ] {
        let (code, _, err) = worker(&[&["export", "--out", &out][..], arguments].concat());
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(word) && !err.contains("panicked"), "{err}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn the_card_of_a_trained_model_says_how_it_was_trained() {
    let world = World::new(120);
    let recipe = world.recipe("");
    fs::write(world.base().join("README.md"), "---\nlicense: mit\n---\n").unwrap();
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(1);
    let checkpoint = root.join(&ranks[0].checkpoints[0].path);
    let out = world.dir.path().join("out");
    let [from, to] = [&checkpoint, &out].map(|path| path.display().to_string());
    let (code, told, err) = worker(&["export", "--checkpoint", &from, "--out", &to]);
    assert_eq!(code, 0, "{err}");
    assert!(told.contains("none missing, none unexpected"), "{told}");
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    let origin = json(&out.join("supra_origin.json"));
    for fact in ["dataset", "ledger_head", "manifest_hash", "run"] {
        assert!(
            card.contains(origin[fact].as_str().unwrap()),
            "{fact}: {card}"
        );
    }
    assert!(
        card.contains("license: mit\n") && card.contains("## Recipe"),
        "{card}"
    );
    assert!(out.join("tokenizer_config.json").exists());

    // The same model written once more knows as much; in another format it keeps its origin.
    let [again, openlm] = ["again", "openlm"].map(|name| world.dir.path().join(name));
    export(&to, &again, &["--dtype", "bf16"]);
    export(&to, &openlm, &["--format", "openlm"]);
    let text = |dir: &Path| fs::read_to_string(dir.join("README.md")).unwrap();
    assert_eq!(text(&again), card);
    assert!(!text(&openlm).contains("library_name"));
    for dir in [again, openlm] {
        assert_eq!(json(&dir.join("supra_origin.json")), origin);
    }
}

#[test]
fn a_model_is_proved_by_the_hashes_that_were_written_with_it() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("model");
    export(&golden("supra-gqa"), &dir, &[]);
    let shown = dir.display().to_string();
    let (code, told, err) = worker(&["verify", &shown, "--json"]);
    assert_eq!(code, 0, "{err}");
    let told: Value = serde_json::from_str(&told).unwrap();
    let files = fs::read_dir(&dir).unwrap().count();
    assert_eq!(told["files"], files - 1);

    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (code, _, err) = worker(&["verify", &shown]);
    assert_eq!(code, 4, "{err}");
    assert!(err.contains("model.safetensors was altered"), "{err}");
    let (code, _, err) = worker(&["verify", &golden("supra-gqa")]);
    assert_eq!(code, 2, "{err}");
}
