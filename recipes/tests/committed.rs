//! The recipes and the JSON Schema of this repository.

use std::path::{Path, PathBuf};

use supra_recipes::plan::{ModelShape, Needs};
use supra_recipes::{Plan, Recipe, json_schema};

fn directory() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn recipes() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "yaml")
        })
        .collect();
    paths.sort();
    assert!(paths.len() >= 5, "only {paths:?}");
    paths
}

#[test]
fn every_recipe_loads_and_reads_back() {
    for path in recipes() {
        let recipe = Recipe::load(&path).unwrap_or_else(|error| panic!("{error}"));
        let again = Recipe::parse(&recipe.to_yaml(), "resolved.yaml")
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(recipe, again, "{}", path.display());
    }
}

#[test]
fn every_header_states_the_tokens_and_steps_that_are_planned() {
    for path in recipes() {
        let text = std::fs::read_to_string(&path).unwrap();
        let plan = Plan::new(&Recipe::load(&path).unwrap(), u64::MAX, [0; 32]).unwrap();
        let header: Vec<&str> = text
            .lines()
            .take_while(|line| line.starts_with('#'))
            .collect();
        let digits: String = header.join("\n").replace(',', "");
        let step_tokens = plan.batch_samples * plan.sequence_length;
        let expected = format!("in {} steps of {step_tokens}", plan.steps);
        assert!(
            digits.contains(&expected),
            "{}: the header lacks `{expected}`",
            path.display()
        );
        let budget = Recipe::load(&path).unwrap().budget.tokens();
        assert!(
            digits.contains(&format!("Tokens:  {budget}")),
            "{}: the header lacks {budget}",
            path.display()
        );
    }
}

#[test]
fn headers_of_7b_recipes_state_the_memory_that_is_planned() {
    for (file, shape) in [
        ("mistral-7b.yaml", ModelShape::MISTRAL_7B),
        ("llama2-7b.yaml", ModelShape::LLAMA2_7B),
    ] {
        let path = directory().join(file);
        let needs = Needs::new(&Recipe::load(&path).unwrap(), &shape, 8).unwrap();
        let [_, fit] = needs.rank.cards;
        let mut plans = needs.rank.memory_per_rank.iter();
        let plan = plans.find(|plan| fit.policy == Some(plan.policy)).unwrap();
        let gib = plan.bytes as f64 / f64::from(1 << 30);
        let expected = format!("{} (H200) per worker: {gib:.0} GiB", fit.card.name);
        let header = std::fs::read_to_string(&path).unwrap();
        assert!(
            header.contains(&expected),
            "{file}: the header lacks `{expected}`"
        );
    }
}

#[test]
fn the_committed_schema_is_current() {
    let path = directory().join("recipe.schema.json");
    let current = json_schema();
    if std::fs::read_to_string(&path).unwrap_or_default() != current {
        std::fs::write(&path, &current).unwrap();
        panic!("recipes/recipe.schema.json was not current; it is now: commit it");
    }
}

#[test]
fn every_recipe_fits_the_schema_as_written_and_as_resolved() {
    let schema = serde_json::from_str(&json_schema()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    for path in recipes() {
        let written = std::fs::read_to_string(&path).unwrap();
        for text in [written, Recipe::load(&path).unwrap().to_yaml()] {
            let value: serde_json::Value = serde_yaml::from_str(&text).unwrap();
            let errors: Vec<String> = validator
                .iter_errors(&value)
                .map(|error| error.to_string())
                .collect();
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        }
    }
}

#[test]
fn the_schema_refuses_what_the_program_refuses() {
    let schema = serde_json::from_str(&json_schema()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let good = serde_json::json!({
        "name": "a", "base": { "path": "b" }, "data": { "train": "d" }, "budget": { "tokens": "1.5M" },
        "checkpoint": { "every_tokens": "auto" }, "chaos": { "kinds": ["kill"] }
    });
    assert!(validator.is_valid(&good));
    let changes = [
        ("/name", serde_json::json!("Upper")),
        ("/budget/tokens", serde_json::json!("2Q")),
        ("/budget/tokens", serde_json::json!(0)),
        (
            "/budget",
            serde_json::json!({ "pretraining_tokens": "2T", "fraction": 1.5 }),
        ),
        (
            "/base",
            serde_json::json!({ "path": "b", "wieghts": "random" }),
        ),
        ("/base", serde_json::json!({})),
        (
            "/base",
            serde_json::json!({ "path": "b", "random": "mistral-7b" }),
        ),
        ("/data", serde_json::json!({})),
        (
            "/checkpoint",
            serde_json::json!({ "every_tokens": "often" }),
        ),
        ("/chaos", serde_json::json!({ "kinds": [] })),
        ("/chaos", serde_json::json!({ "kinds": ["explode"] })),
    ];
    for (pointer, value) in changes {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        assert!(!validator.is_valid(&bad), "{bad}");
    }
}
