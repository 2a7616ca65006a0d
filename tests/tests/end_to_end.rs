//! The main road: submit, train, watch, finish exactly on the budget, audit, use the model.

use std::fs;

use supra_proto::v1::ledger_record::Body;
use supra_proto::v1::{RunState, StepMetrics};
use supra_tests::process::run;
use supra_tests::{Cluster, Result, TinyRecipe, ledger};

use crate::{LIMIT, Stage};

#[test]
fn a_run_ends_exactly_on_its_budget_and_its_audit_agrees() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 2)?;
    let recipe = TinyRecipe {
        heldout: true,
        more: "eval: { every_tokens: 2048, windows: 6, target_loss: 0.5 }\n".to_owned(),
        ..TinyRecipe::default()
    };
    let path = recipe.write(&stage.fixture)?;
    let id = cluster.submit(&path)?;

    let training = cluster.wait(&id, "training", LIMIT, |status| status.step > 0)?;
    assert_eq!(training.world, 2);
    let end = cluster.wait_finished(&id, LIMIT)?;
    assert_eq!((end.step, end.tokens), (recipe.steps(), recipe.tokens()));
    assert_eq!(end.skipped_steps, 0);

    let metrics = cluster.metrics(&id)?;
    let (first, last) = (&metrics[0], &metrics[metrics.len() - 1]);
    assert_eq!(metrics.len() as u64, recipe.steps());
    assert!(
        last.loss < first.loss - 0.5,
        "it learns: {} to {}",
        first.loss,
        last.loss
    );

    cluster.audit(&id)?;
    cluster
        .supra(&["audit", &id, "--data", &path.to_string_lossy()])?
        .expect_code(0)?;
    ledger::expect_exactly_once(&cluster.ledger(&id)?, recipe.samples())?;
    let state = cluster.state();
    let offline = cluster.supra_json(&["audit", &id, "--state", &state.to_string_lossy()])?;
    assert_eq!(offline["verdict"], "ok");
    let checkpoints = cluster.checkpoints(&id)?.len();
    assert_eq!(
        offline["checkpoints"], checkpoints,
        "all remember the ledger"
    );

    let replayed = cluster.supra_json(&[
        "replay",
        &id,
        "--step",
        "2",
        "--recipe",
        &path.to_string_lossy(),
    ])?;
    assert_eq!(replayed["verdict"], "same");

    let status = cluster.supra_json(&["status", &id])?;
    assert_eq!(status["state"], "finished");
    assert_eq!(status["tokens"], recipe.tokens());
    measured(&cluster, &id, &status, &metrics)?;
    let receipt = fs::read(cluster.last_checkpoint(&id)?.with_file_name("receipt.json"))?;
    let receipt: serde_json::Value = serde_json::from_slice(&receipt)?;
    assert_eq!(receipt["goodput"], status["goodput"]);
    assert_eq!(receipt["ledger_head"], offline["head"]);
    let runs = cluster.supra_json(&["runs"])?;
    assert_eq!(runs[0]["run"], id);
    let watched = cluster.supra(&["watch", &id])?.expect_code(0)?;
    assert!(!watched.stdout.is_empty());
    Ok(())
}

/// The held-out loss is in ledger, status and metrics, the gates are in the status.
fn measured(
    cluster: &Cluster,
    id: &str,
    status: &serde_json::Value,
    metrics: &[StepMetrics],
) -> Result<()> {
    let losses: Vec<(u64, f64)> = cluster
        .ledger(id)?
        .into_iter()
        .filter_map(|record| match record.body {
            Some(Body::Evaluated(it)) => Some((it.step, it.loss_sum / it.targets as f64)),
            _ => None,
        })
        .collect();
    let steps: Vec<u64> = losses.iter().map(|(step, _)| *step).collect();
    // Every 4 of 40 steps, the first and the last among them.
    assert_eq!(steps, (0..=40).step_by(4).collect::<Vec<_>>());
    let (_, before) = losses[0];
    let (step, after) = losses[losses.len() - 1];
    assert!(after < before - 0.5, "{before} to {after}");
    let evaluation = &status["evaluation"];
    assert_eq!(
        (&evaluation["step"], &evaluation["loss"]),
        (&step.into(), &after.into())
    );
    let known: Vec<(u64, f64)> = metrics
        .iter()
        .filter_map(|row| Some((row.step, row.heldout_loss?)))
        .collect();
    assert_eq!(known, losses[1..]);
    let gates = &status["gates"];
    assert_eq!(
        (&gates["step"], &gates["warnings"]),
        (&step.into(), &serde_json::json!([]))
    );
    let drift = gates["layers"][1]["drift"].as_f64().unwrap_or_default();
    assert!(drift > 0.0, "{gates}");
    let lines = cluster.log_lines(id)?;
    let word = lines
        .iter()
        .filter(|line| line.contains("will not reach eval.target_loss"));
    assert_eq!(word.count(), 1, "{lines:#?}");
    Ok(())
}

#[test]
fn a_checkpoint_is_a_model_that_generates() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 1)?;
    let recipe = TinyRecipe {
        workers: (1, 1),
        budget: 5_120,
        ..TinyRecipe::default()
    };
    let id = stage.submit(&cluster, &recipe)?;
    cluster.wait_finished(&id, LIMIT)?;

    let mut generate = stage.programs.worker();
    generate
        .arg("generate")
        .arg("--model")
        .arg(cluster.last_checkpoint(&id)?);
    generate.args(["--prompt", "w3 w24", "--max-tokens", "8"]);
    let output = run(generate, LIMIT)?.expect_code(0)?;
    assert!(output.stdout.contains('w'), "{output}");
    Ok(())
}

#[test]
fn runs_queue_and_train_one_after_the_other() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 2)?;
    let recipe = |name: &str| TinyRecipe {
        name: name.to_owned(),
        ..TinyRecipe::default()
    };
    let first = stage.submit(&cluster, &recipe("first"))?;
    let second = stage.submit(&cluster, &recipe("second"))?;
    cluster.wait(&first, "training", LIMIT, |status| status.step > 0)?;
    assert_eq!(cluster.status(&second)?.state(), RunState::Queued);
    cluster.wait_finished(&first, LIMIT)?;
    cluster.wait_finished(&second, LIMIT)?;
    cluster.audit(&second)?;
    Ok(())
}

#[test]
fn up_trains_a_recipe_with_processes_of_its_own() -> Result<()> {
    let stage = Stage::new()?;
    let recipe = TinyRecipe::default();
    let path = recipe.write(&stage.fixture)?;
    let state = stage.directory.path().join("up");
    let up = || {
        let mut command = stage.programs.supra();
        command
            .arg("up")
            .arg(&path)
            .args(["--workers", "2", "--device", "cpu", "--state"])
            .arg(&state);
        run(command, LIMIT)
    };
    up()?.expect_code(0)?.expect_words(&["finished"])?;
    // What is finished stays finished: a second call is quick and trains nothing.
    up()?.expect_code(0)?;
    Ok(())
}
