//! A step seen again: its batch, and what training it once more comes to.

use std::fs;
use std::path::{Path, PathBuf};

use supra_tests::{Cluster, Result, TinyRecipe};

use crate::{LIMIT, Stage};

/// Forty steps with a checkpoint behind every eighth, by so many workers, and the recipe's path.
fn trained(stage: &Stage, workers: u32) -> Result<(Cluster, String, String)> {
    let cluster = stage.cluster("cluster", workers)?;
    let recipe = TinyRecipe {
        workers: (workers, workers),
        ..TinyRecipe::default()
    };
    let path = recipe.write(&stage.fixture)?;
    let run = cluster.submit(&path)?;
    cluster.wait_finished(&run, LIMIT)?;
    Ok((cluster, run, path.to_string_lossy().into_owned()))
}

fn checkpoint(cluster: &Cluster, run: &str, step: u64) -> Result<PathBuf> {
    let mut known = cluster.checkpoints(run)?;
    known.retain(|known| known.step == step);
    Ok(known.remove(0).path.into())
}

fn alter(file: &Path) -> Result<()> {
    let mut bytes = fs::read(file)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    Ok(fs::write(file, bytes)?)
}

#[test]
fn a_step_run_again_from_a_checkpoint_comes_to_the_logged_bits() -> Result<()> {
    let stage = Stage::new()?;
    let (cluster, run, recipe) = trained(&stage, 1)?;
    let state = cluster.state();
    let state = state.to_string_lossy();
    for (how, from) in [("--rerun", 16), ("--rerun=8", 8)] {
        for source in [["--recipe", &recipe], ["--state", &state]] {
            let asked = [&["replay", &run, "--step", "18", how], &source[..]].concat();
            let answer = cluster.supra_json(&asked)?;
            let rerun = &answer["rerun"];
            assert_eq!(answer["verdict"], "same");
            assert_eq!(rerun["verdict"], "bits", "{rerun}");
            assert_eq!(rerun["differences"], serde_json::json!([]));
            assert_eq!(rerun["from_step"], from);
            let steps = rerun["steps"].as_array().map_or(0, Vec::len);
            assert_eq!(steps as u64, 18 - from);
            let begins = &rerun["micro_batches"][0]["begins"];
            let text = begins[0]["text"].as_str().unwrap_or_default();
            assert!(text.contains('w'), "decoded: {begins}");
        }
    }
    let said = cluster
        .supra(&["replay", &run, "--step", "18", "--rerun", "--state", &state])?
        .expect_code(0)?;
    said.expect_words(&["SAME BITS", "steps 17 to 18", "to the bit", "--- sample"])?;

    // One that was kept elsewhere.
    let aside = stage.directory.path().join("aside");
    fs::rename(checkpoint(&cluster, &run, 16)?, &aside)?;
    let named = format!("--rerun={}", aside.display());
    let asked = ["replay", &run, "--step", "17", "--state", &state];
    let answer = cluster.supra_json(&[&asked[..], &[&named]].concat())?;
    assert_eq!(answer["rerun"]["verdict"], "bits");
    cluster
        .supra(&[&asked[..], &["--rerun"]].concat())?
        .expect_code(2)?
        .expect_words(&["not on this machine", "--rerun=DIR"])?;
    Ok(())
}

#[test]
fn a_step_before_every_checkpoint_cannot_be_run_again() -> Result<()> {
    let stage = Stage::new()?;
    let (cluster, run, recipe) = trained(&stage, 1)?;
    let asked = [
        "replay", &run, "--step", "8", "--rerun", "--recipe", &recipe,
    ];
    cluster
        .supra(&asked)?
        .expect_code(2)?
        .expect_words(&["before step 8", "steps 8, 16, 24, 32, 40"])?;
    Ok(())
}

#[test]
fn a_tampered_checkpoint_is_refused_and_found_by_the_audit() -> Result<()> {
    let stage = Stage::new()?;
    let (cluster, run, recipe) = trained(&stage, 1)?;
    let whole = cluster.supra_json(&["audit", &run, "--files"])?;
    assert!(whole["files"].as_u64() >= Some(15), "{whole}");

    alter(&checkpoint(&cluster, &run, 8)?.join("model-rank-000-of-001-00001.safetensors"))?;
    let asked = [
        "replay", &run, "--step", "9", "--rerun", "--recipe", &recipe,
    ];
    cluster
        .supra(&asked)?
        .expect_code(4)?
        .expect_words(&["damaged", "model-rank-000-of-001-00001.safetensors"])?;
    cluster
        .supra(&["audit", &run, "--files"])?
        .expect_code(4)?
        .expect_words(&["model-rank-000-of-001-00001.safetensors: its BLAKE3 is"])?;

    alter(&checkpoint(&cluster, &run, 16)?.join("manifest.json"))?;
    let state = cluster.state();
    let state = state.to_string_lossy();
    for source in [&[][..], &["--state", &state]] {
        cluster
            .supra(&[&["audit", &run], source].concat())?
            .expect_code(4)?
            .expect_words(&["manifest.json: its BLAKE3 is"])?;
    }
    Ok(())
}

#[test]
fn what_two_workers_trained_is_run_again_closely() -> Result<()> {
    let stage = Stage::new()?;
    let (cluster, run, recipe) = trained(&stage, 2)?;
    let asked = [
        "replay", &run, "--step", "12", "--rerun", "--recipe", &recipe,
    ];
    let rerun = &cluster.supra_json(&asked)?["rerun"];
    assert!(
        rerun["verdict"] == "close" || rerun["verdict"] == "bits",
        "{rerun}"
    );
    assert_eq!(rerun["differences"], serde_json::json!(["workers 2 -> 1"]));
    assert_eq!(rerun["bound"], 1e-3);
    Ok(())
}
