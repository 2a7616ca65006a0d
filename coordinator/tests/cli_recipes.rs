//! `supra validate` and `supra plan`: no coordinator is needed.

use std::fs;

use crate::support::{recipe, run};

#[test]
fn good_recipes_pass_and_bad_ones_end_with_two_and_their_report() {
    let directory = tempfile::tempdir().unwrap();
    let good = recipe(directory.path());
    let bad = directory.path().join("bad.yaml");
    fs::write(
        &bad,
        fs::read_to_string(&good)
            .unwrap()
            .replace("budget:", "bugdet:"),
    )
    .unwrap();
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());

    let answer = run(&["validate", good]).expect_code(0);
    assert!(
        answer.stdout.contains("valid: small, 10 k tokens"),
        "{}",
        answer.stdout
    );

    let answer = run(&["validate", good, bad]).expect_code(2);
    assert!(
        answer.stdout.contains("small.yaml: valid"),
        "{}",
        answer.stdout
    );
    for part in ["bad.yaml", "bugdet", "budget"] {
        assert!(
            answer.stderr.contains(part),
            "{part} is not in {}",
            answer.stderr
        );
    }
}

#[test]
fn validation_as_json_has_one_entry_per_file() {
    let directory = tempfile::tempdir().unwrap();
    let good = recipe(directory.path());
    let answer = run(&[
        "validate",
        "--json",
        good.to_str().unwrap(),
        "/nowhere.yaml",
    ])
    .expect_code(2);
    let json: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(json[0]["valid"], true);
    assert_eq!(json[0]["recipe"]["name"], "small");
    assert_eq!(json[1]["valid"], false);
    assert!(
        json[1]["error"].as_str().unwrap().contains("/nowhere.yaml"),
        "{json}"
    );
}

#[test]
fn a_plan_counts_to_the_token() {
    let directory = tempfile::tempdir().unwrap();
    let path = recipe(directory.path());
    let answer = run(&["plan", path.to_str().unwrap(), "--gpus", "2", "--json"]).expect_code(0);
    let plan: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    // 10,000 tokens hold 19 samples of 512: two full steps of 8 and one of 3.
    assert_eq!(plan["tokens"], 19 * 512);
    assert_eq!(plan["steps"], 3);
    assert_eq!(plan["last_step_tokens"], 3 * 512);
    assert_eq!(plan["samples_per_worker"], 4);
    // After 8192 tokens and at the end.
    assert_eq!(plan["checkpoints"], 2);
    assert_eq!(plan["first_checkpoint_step"], 2);
    assert!(plan["needs"].is_null() && plan["data"].is_null());
    assert_eq!(plan["notes"].as_array().unwrap().len(), 2);

    let text = run(&["plan", path.to_str().unwrap()]).expect_code(0).stdout;
    assert!(text.contains("note: there is no dataset at"), "{text}");
    assert!(
        text.contains("3 of 4,096 tokens, the last of 1,536"),
        "{text}"
    );
}

#[test]
fn a_shape_with_a_name_is_planned_without_a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("named.yaml");
    let text =
        "name: t\nbase: { random: mistral-7b }\ndata: { train: d }\nbudget: { tokens: 20B }\n";
    fs::write(&path, text).unwrap();
    let answer = run(&["plan", path.to_str().unwrap(), "--json"]).expect_code(0);
    let plan: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(plan["needs"]["parameters"], 7_812_321_280_u64);
}

#[test]
fn the_mistral_recipe_is_planned_with_its_memory() {
    let base = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "max_position_embeddings": 32768, "sliding_window": 4096,
    });
    fs::write(base.path().join("config.json"), config.to_string()).unwrap();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../recipes/mistral-7b.yaml");
    let base = base.path().to_str().unwrap();
    let answer = run(&["plan", recipe, "--base", base, "--gpus", "8", "--json"]).expect_code(0);
    let plan: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    let parameters = plan["needs"]["parameters"].as_u64().unwrap();
    assert!(
        (7_800_000_000..7_830_000_000).contains(&parameters),
        "{parameters}"
    );
    assert_eq!(plan["budget_tokens"], 100_000_000_000_u64);
    assert_eq!(plan["activations"], "auto");
    let memory = &plan["needs"]["memory_per_rank"];
    assert_eq!(memory[0]["policy"], "save");
    assert!(memory[0]["bytes"].as_u64() > memory[1]["bytes"].as_u64());
    assert_eq!(memory[2]["components"][2]["name"], "fp32 gradients");
    assert_eq!(memory[2]["components"][2]["bytes"], 4 * parameters);
    let cards = &plan["needs"]["cards"];
    assert!(cards[0]["name"] == "80 GB" && cards[0]["policy"].is_null());
    assert!(cards[1]["name"] == "141 GB" && cards[1]["policy"] == "recompute");
    let ranks = plan["needs"]["by_workers"].as_array().unwrap();
    let worlds: Vec<_> = ranks.iter().map(|rank| rank["world"].as_u64()).collect();
    assert_eq!(worlds, [1, 2, 4, 8].map(Some));
    assert_eq!(ranks[3]["memory_per_rank"], *memory);
    let text = run(&["plan", recipe, "--base", base, "--gpus", "8"])
        .expect_code(0)
        .stdout;
    for part in [
        "Memory per GPU",
        "card of 141 GB (140 GiB)",
        "taken",
        "GiB",
        "remainders of fp32 masters",
        "IN ALL: SAVE",
        "with 8 workers",
        "Learning rate",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn a_bad_recipe_cannot_be_planned() {
    run(&["plan", "/nowhere.yaml"]).expect_code(2);
}
