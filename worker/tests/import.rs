//! Model directories: what goes in comes out with the same bits, and what is wrong is named.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use supra_worker::model::files::tensors::{self, TensorFiles};
use supra_worker::model::{
    AttentionKind, Decay, ModelConfig, ModelError, NewWeights, RopeFrequencies, SaveFormat,
    SupraConfig, load_params, save_model,
};
use tch::{Kind, Tensor};
use tempfile::TempDir;

const HUGGING_FACE: [&str; 3] = ["hf-llama-mha", "hf-mistral-gqa", "hf-llama-tied"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/golden")
        .join(name)
}

/// A copy of a fixture to spoil.
struct Copy {
    _guard: TempDir,
    dir: PathBuf,
}

impl Copy {
    fn of(name: &str) -> Copy {
        let guard = tempfile::tempdir().unwrap();
        let dir = guard.path().join(name);
        fs::create_dir(&dir).unwrap();
        for entry in fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
        }
        Copy { _guard: guard, dir }
    }

    fn weights(&self) -> PathBuf {
        self.dir.join(tensors::SINGLE)
    }

    /// Changes `config.json`.
    fn configure(&self, change: impl FnOnce(&mut Value)) {
        let path = self.dir.join("config.json");
        let mut json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    }

    /// Changes the tensors.
    fn rewrite(&self, change: impl FnOnce(&mut Vec<(String, Tensor)>)) {
        let mut named = stored(&self.dir);
        change(&mut named);
        tensors::write(&self.weights(), named).unwrap();
    }

    fn load(&self) -> Result<(), ModelError> {
        let config = ModelConfig::load(&self.dir)?;
        load_params(&self.dir, &config, NewWeights::Refuse).map(drop)
    }

    /// The complaint about it, which names the directory.
    #[track_caller]
    fn complaint(&self) -> String {
        let error = self.load().expect_err("should have been refused");
        let mut message = error.to_string();
        assert!(
            message.contains(&self.dir.display().to_string()),
            "{message}"
        );
        let mut source = std::error::Error::source(&error);
        while let Some(error) = source {
            message = format!("{message}: {error}");
            source = error.source();
        }
        message
    }
}

/// All tensors of a directory, sorted by name, in their stored kinds.
fn stored(dir: &Path) -> Vec<(String, Tensor)> {
    let files = TensorFiles::open(dir).unwrap();
    files
        .names()
        .map(|name| (name.to_owned(), files.read(name).unwrap().unwrap()))
        .collect()
}

fn bits(tensor: &Tensor) -> (Kind, Vec<i64>, Vec<u8>) {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    (tensor.kind(), tensor.size(), bytes)
}

#[track_caller]
fn assert_same_tensors(found: &Path, expected: &Path) {
    let (found, expected) = (stored(found), stored(expected));
    let names = |named: &[(String, Tensor)]| {
        named
            .iter()
            .map(|(name, _)| name.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&found), names(&expected));
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert_eq!(bits(found), bits(expected), "{name}");
    }
}

/// Loads a directory and writes it to a new one beside.
fn resave(from: &Path, to: &Path, format: SaveFormat) -> ModelConfig {
    let config = ModelConfig::load(from).unwrap();
    let (params, _) = load_params(from, &config, NewWeights::Refuse).unwrap();
    save_model(to, &config, &params, Some(from), format).unwrap();
    assert_eq!(ModelConfig::load(to).unwrap(), config);
    config
}

#[test]
fn an_exported_import_is_the_original() {
    for name in HUGGING_FACE {
        let dir = tempfile::tempdir().unwrap();
        let [native, exported] = ["native", "exported"].map(|name| dir.path().join(name));
        resave(&fixture(name), &native, SaveFormat::Native);
        resave(
            &native,
            &exported,
            SaveFormat::HuggingFace { kind: Kind::Float },
        );
        assert_same_tensors(&exported, &fixture(name));
        assert!(
            exported.join("generation_config.json").exists(),
            "companions travel along"
        );
    }
}

#[test]
fn half_precision_survives_the_way_through_fp32() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let copy = Copy::of("hf-mistral-gqa");
        copy.rewrite(|named| {
            named
                .iter_mut()
                .for_each(|(_, tensor)| *tensor = tensor.to_kind(kind))
        });
        let exported = copy.dir.with_file_name("exported");
        resave(&copy.dir, &exported, SaveFormat::HuggingFace { kind });
        assert_same_tensors(&exported, &copy.dir);
    }
}

#[test]
fn a_supra_model_is_exported_under_the_released_names() {
    let dir = tempfile::tempdir().unwrap();
    let exported = dir.path().join("exported");
    resave(
        &fixture("supra-gqa"),
        &exported,
        SaveFormat::HuggingFace { kind: Kind::Float },
    );
    let names: Vec<String> = stored(&exported)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.iter().all(|name| name.starts_with("model.")));
    let native = dir.path().join("native");
    resave(&exported, &native, SaveFormat::Native);
    assert_same_tensors(&native, &fixture("supra-gqa"));
}

#[test]
fn prefixes_of_training_wrappers_are_understood() {
    for prefix in [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "module.model.",
    ] {
        let copy = Copy::of("supra-mha");
        copy.rewrite(|named| {
            named
                .iter_mut()
                .for_each(|(name, _)| name.insert_str(0, prefix))
        });
        copy.load().unwrap();
    }
}

#[test]
fn configurations_survive_a_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let base = ModelConfig::load(&fixture("hf-llama-mha")).unwrap();
    assert_eq!(base.rope_theta, 500_000.0);
    assert_eq!((base.bos, base.eos.as_slice()), (Some(1), [2].as_slice()));
    let supra = |decay, rope_frequencies, qk_norm| {
        AttentionKind::Supra(SupraConfig {
            decay,
            rope_frequencies,
            qk_norm,
            ..SupraConfig::default()
        })
    };
    for attention in [
        AttentionKind::Softmax,
        supra(Decay::Alibi, RopeFrequencies::Exact, false),
        supra(Decay::Retnet, RopeFrequencies::Bf16, true),
        supra(Decay::None, RopeFrequencies::Exact, true),
    ] {
        for (sliding_window, eos) in [(None, vec![]), (Some(4096), vec![2, 7])] {
            let base = ModelConfig {
                sliding_window,
                eos,
                ..base.clone()
            };
            let config = base.with_attention(attention);
            config.save(dir.path()).unwrap();
            assert_eq!(ModelConfig::load(dir.path()).unwrap(), config);
        }
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let llama = |field: &'static str, value: Value| ("hf-llama-mha", field, value);
    let supra = |field: &'static str, value: Value| ("supra-mha", field, value);
    for (name, field, value) in [
        llama("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        llama(
            "rope_parameters",
            json!({"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        ),
        llama("attention_bias", json!(true)),
        llama("mlp_bias", json!(true)),
        llama("head_dim", json!(32)),
        llama("hidden_act", json!("gelu")),
        llama("partial_rotary_factor", json!(0.5)),
        llama("quantization_config", json!({"bits": 4})),
        llama("architectures", json!(["Qwen2ForCausalLM"])),
        supra("norm_type", json!("gain_only_lp_layer_norm")),
        supra("attn_name", json!("mamba")),
        supra("positional_embedding_type", json!("llama_rotary")),
        supra("ffn_type", json!("gelu")),
        supra("qk_head_dim", json!(8)),
        supra("decay_start", json!(0.5)),
        supra("use_decay", Value::Null),
    ] {
        let copy = Copy::of(name);
        copy.configure(|json| json[field] = value.clone());
        let complaint = copy.complaint();
        assert!(
            complaint.contains(&format!("`{field}`")) && complaint.contains("supported"),
            "{complaint}"
        );
    }
}

#[test]
fn impossible_configurations_are_refused() {
    for (field, value, word) in [
        ("vocab_size", json!(0), "vocabulary"),
        ("hidden_size", json!(-64), "width"),
        ("num_hidden_layers", json!(1u64 << 40), "layers"),
        ("num_attention_heads", json!(0), "heads"),
        ("num_attention_heads", json!(5), "5"),
        ("num_key_value_heads", json!(3), "3"),
        ("rms_norm_eps", json!(-1.0), "epsilon"),
        ("vocab_size", json!("many"), "invalid type"),
        ("vocab_size", Value::Null, "invalid type"),
    ] {
        let copy = Copy::of("hf-llama-tied");
        copy.configure(|json| json[field] = value.clone());
        let complaint = copy.complaint();
        assert!(complaint.contains(word), "{field}: {complaint}");
    }
}

#[test]
fn a_sliding_window_bounds_the_sequence() {
    let copy = Copy::of("hf-mistral-gqa");
    copy.configure(|json| json["sliding_window"] = json!(64));
    let config = ModelConfig::load(&copy.dir).unwrap();
    config.check_sequence_length(64).unwrap();
    let complaint = config.check_sequence_length(65).unwrap_err().to_string();
    assert!(
        complaint.contains("64") && complaint.contains("sliding_window"),
        "{complaint}"
    );
    let supra = AttentionKind::Supra(SupraConfig::default());
    config
        .with_attention(supra)
        .check_sequence_length(65)
        .unwrap();
    ModelConfig::load(&fixture("hf-mistral-gqa"))
        .unwrap()
        .check_sequence_length(1 << 20)
        .unwrap();
}

#[test]
fn damaged_weights_are_named() {
    type Damage = fn(&mut Vec<(String, Tensor)>);
    fn at<'a>(named: &'a mut [(String, Tensor)], name: &str) -> &'a mut (String, Tensor) {
        named.iter_mut().find(|(other, _)| other == name).unwrap()
    }
    const NORM: &str = "model.norm.weight";
    const KEYS: &str = "model.layers.1.self_attn.k_proj.weight";
    let damages: [(Damage, &[&str]); 8] = [
        (
            |named| named.retain(|(name, _)| name != NORM),
            &["missing (1)", "norm.weight"],
        ),
        (
            |named| named.retain(|(name, _)| name != KEYS),
            &["missing (1)", KEYS],
        ),
        (
            |named| {
                named.push((
                    "extra".to_owned(),
                    Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)),
                ))
            },
            &["unexpected (1)", "extra"],
        ),
        (
            |named| at(named, KEYS).1 = at(named, KEYS).1.narrow(0, 0, 31),
            &["wrong shape (1)", KEYS, "[31, 64]", "[32, 64]"],
        ),
        (
            |named| at(named, KEYS).1 = at(named, KEYS).1.transpose(0, 1).contiguous(),
            &["wrong shape (1)", KEYS],
        ),
        (
            |named| drop(at(named, NORM).1.narrow(0, 3, 2).fill_(f64::NAN)),
            &[NORM, "2 values", "NaN"],
        ),
        (
            |named| drop(at(named, KEYS).1.narrow(0, 3, 1).fill_(f64::INFINITY)),
            &[KEYS, "64 values"],
        ),
        (
            |named| at(named, NORM).1 = at(named, NORM).1.to_kind(Kind::Double),
            &[NORM, "Double", "BF16"],
        ),
    ];
    for (damage, words) in damages {
        let copy = Copy::of("hf-mistral-gqa");
        copy.rewrite(damage);
        let complaint = copy.complaint();
        for word in words {
            assert!(complaint.contains(word), "`{word}` not in: {complaint}");
        }
    }
}

#[test]
fn damaged_files_are_named() {
    let bytes = fs::read(fixture("supra-mha").join(tensors::SINGLE)).unwrap();
    for (content, word) in [
        (&bytes[..bytes.len() - 1], "truncated"),
        (&bytes[..200], "truncated"),
        (&bytes[..3], "truncated"),
        (&b""[..], "truncated"),
        (&[&bytes[..], b"more"].concat(), "damaged"),
        (
            &b"PK\x03\x04 not a safetensors file at all"[..],
            "safetensors",
        ),
        (
            &[&8u64.to_le_bytes()[..], b"{\"a\": 1}"].concat(),
            "safetensors",
        ),
    ] {
        let copy = Copy::of("supra-mha");
        fs::write(copy.weights(), content).unwrap();
        let complaint = copy.complaint();
        assert!(
            complaint.contains(word) && complaint.contains(tensors::SINGLE),
            "{complaint}"
        );
    }
}

#[test]
fn incomplete_directories_are_named() {
    let copy = Copy::of("supra-mha");
    fs::remove_file(copy.weights()).unwrap();
    assert!(copy.complaint().contains("model.safetensors.index.json"));
    fs::write(copy.dir.join("pytorch_model.bin"), b"").unwrap();
    assert!(copy.complaint().contains("not a file of PyTorch's"));
    fs::write(copy.dir.join("config.json"), b"{").unwrap();
    assert!(copy.complaint().contains("line 1"));
    fs::remove_file(copy.dir.join("config.json")).unwrap();
    assert!(copy.complaint().contains("config.json"));

    let shard = "model-00003-of-00006.safetensors";
    let copy = Copy::of("hf-llama-tied");
    fs::remove_file(copy.dir.join(shard)).unwrap();
    assert!(copy.complaint().contains(shard));

    let copy = Copy::of("hf-llama-tied");
    let index = copy.dir.join(tensors::INDEX);
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace(shard, "../elsewhere.safetensors")).unwrap();
    assert!(copy.complaint().contains("../elsewhere.safetensors"));
    fs::write(
        &index,
        text.replace(shard, "model-00001-of-00006.safetensors"),
    )
    .unwrap();
    assert!(
        copy.complaint()
            .contains("model-00001-of-00006.safetensors")
    );
}

#[test]
fn a_tied_output_matrix_may_be_stored_but_not_differ() {
    let copy = Copy::of("supra-gqa");
    let same = |named: &[(String, Tensor)]| {
        let (_, embedding) = named
            .iter()
            .find(|(name, _)| name == "tok_embeddings.weight")
            .unwrap();
        ("output.weight".to_owned(), embedding.copy())
    };
    copy.rewrite(|named| named.push(same(named)));
    copy.load().unwrap();
    copy.rewrite(|named| {
        named
            .iter_mut()
            .filter(|(name, _)| name == "output.weight")
            .for_each(|(_, output)| *output += 1)
    });
    assert!(copy.complaint().contains("`output.weight`"));
}

#[test]
fn stored_rotary_tables_are_ignored() {
    let copy = Copy::of("hf-llama-mha");
    copy.rewrite(|named| {
        let table = Tensor::ones([8], (Kind::Float, tch::Device::Cpu));
        named.push((
            "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
            table,
        ));
    });
    copy.load().unwrap();
}

#[test]
fn new_weights_are_all_there_or_all_made() {
    let supra = ModelConfig::load(&fixture("convert-mistral-gqa")).unwrap();
    let base = fixture("hf-mistral-gqa");
    let complaint = load_params(&base, &supra, NewWeights::Refuse)
        .unwrap_err()
        .to_string();
    assert!(
        complaint.contains("supra-worker convert") && complaint.contains("missing (8)"),
        "{complaint}"
    );
    let (_, report) = load_params(&base, &supra, NewWeights::Seeded(1)).unwrap();
    assert_eq!((report.missing.len(), report.matched.len()), (8, 15));

    let copy = Copy::of("convert-mistral-gqa");
    copy.rewrite(|named| {
        named.retain(|(name, _)| !name.contains("layers.0.attention._totrain_embed."))
    });
    let complaint = load_params(&copy.dir, &supra, NewWeights::Seeded(1))
        .unwrap_err()
        .to_string();
    assert!(complaint.contains("missing (2)"), "{complaint}");

    let init = copy.dir.join("supra_init.safetensors");
    let mut maps: Vec<(String, Tensor)> = {
        let files = TensorFiles::open_file(&init).unwrap();
        files
            .names()
            .map(|name| (name.to_owned(), files.read(name).unwrap().unwrap()))
            .collect()
    };
    let (name, _) = maps.pop().unwrap();
    tensors::write(&init, maps).unwrap();
    let complaint = load_params(&base, &supra, NewWeights::File(&init))
        .unwrap_err()
        .to_string();
    assert!(
        complaint.contains(&name) && complaint.contains("supra_init.safetensors"),
        "{complaint}"
    );

    let softmax = ModelConfig::load(&base).unwrap();
    let complaint = load_params(
        &fixture("convert-mistral-gqa"),
        &softmax,
        NewWeights::Refuse,
    )
    .unwrap_err()
    .to_string();
    assert!(complaint.contains("unexpected (8)"), "{complaint}");
}

#[test]
fn a_model_is_written_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::load(&fixture("supra-mha")).unwrap();
    let (params, _) = load_params(&fixture("supra-mha"), &config, NewWeights::Refuse).unwrap();
    let write = |out: &Path| save_model(out, &config, &params, None, SaveFormat::Native);

    let taken = dir.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("file"), b"mine").unwrap();
    assert!(matches!(write(&taken), Err(ModelError::Occupied { .. })));
    assert!(matches!(
        write(&taken.join("file")),
        Err(ModelError::Occupied { .. })
    ));

    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    write(&empty).unwrap();
    write(&dir.path().join("deep/new")).unwrap();
    let entries = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert!(
        entries
            .into_iter()
            .all(|name| !name.to_string_lossy().contains("partial"))
    );
}
