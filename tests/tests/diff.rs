//! Runs that are packed, and compared.

use std::fs;

use supra_tests::{Result, TinyRecipe};

use crate::{LIMIT, Stage};

#[test]
fn a_repeated_run_is_the_same_and_one_of_another_recipe_is_explained() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 1)?;
    let recipe = TinyRecipe {
        budget: 4_096,
        checkpoint_every: 2_048,
        workers: (1, 1),
        ..TinyRecipe::default()
    };
    let steps = recipe.steps();
    let faster = TinyRecipe {
        lr: "1e-2",
        ..recipe.clone()
    };
    let mut runs = Vec::new();
    for recipe in [&recipe, &recipe, &faster] {
        let run = stage.submit(&cluster, recipe)?;
        cluster.wait_finished(&run, LIMIT)?;
        runs.push(run);
    }
    let [first, again, faster] = [&runs[0], &runs[1], &runs[2]];

    let folder = stage.directory.path().join("capsule");
    let packed = folder.to_string_lossy();
    let answer = cluster.supra_json(&["capsule", first, "--out", &packed])?;
    assert_eq!(answer["missing"], serde_json::json!({}));
    let versions = fs::read(folder.join("versions.json"))?;
    let versions: serde_json::Value = serde_json::from_slice(&versions)?;
    let environments = versions["environments"].as_array().map_or(0, Vec::len);
    assert_eq!(environments, 2, "{versions}");
    assert!(versions["environments"][0]["libtorch"].is_string());
    cluster
        .supra(&["audit", "--capsule", &packed])?
        .expect_code(0)?;

    cluster
        .supra(&["diff", &packed, again])?
        .expect_code(0)?
        .expect_words(&[&format!("The same bits in all {steps} steps.")])?;
    cluster
        .supra(&["diff", again, faster])?
        .expect_code(4)?
        .expect_words(&["Step 1 differs in learning rate: optimizer.lr 0.003 in A, 0.01 in B."])?;
    Ok(())
}
