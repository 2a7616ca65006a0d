//! `kill -9` of the coordinator while its workers train on.

use std::thread::sleep;
use std::time::Duration;

use supra_proto::v1::RunState;
use supra_tests::{Cluster, Result, TinyRecipe, ledger, weights};

use crate::{LIMIT, Stage};

/// Some seconds of training.
fn recipe(away: &str) -> TinyRecipe {
    TinyRecipe {
        budget: 512 * 600,
        batch: 512,
        checkpoint_every: 512 * 100,
        workers: (2, 2),
        repeat: true,
        more: format!("coordinator: {{ away: {away} }}\n"),
        ..TinyRecipe::default()
    }
}

/// What the undisturbed run of a recipe leaves.
fn quiet(stage: &Stage, cluster: &Cluster, recipe: &TinyRecipe) -> Result<String> {
    let quiet = stage.submit(cluster, recipe)?;
    cluster.wait_finished(&quiet, LIMIT)?;
    Ok(quiet)
}

/// Kills the coordinator in the middle of a new run and starts it again after a while; the run, and its step before.
fn absence(
    stage: &Stage,
    cluster: &mut Cluster,
    recipe: &TinyRecipe,
    away: Duration,
) -> Result<(String, u64)> {
    let run = stage.submit(cluster, recipe)?;
    let before = cluster.wait(&run, "in the middle", LIMIT, |status| status.step >= 100)?;
    cluster.coordinator()?.kill()?;
    sleep(away);
    cluster.start_coordinator()?;
    Ok((run, before.step))
}

/// Exactly once, nothing void, and the same bits.
fn expect_undisturbed(
    cluster: &Cluster,
    run: &str,
    quiet: &str,
    recipe: &TinyRecipe,
) -> Result<()> {
    let end = cluster.wait_finished(run, LIMIT)?;
    assert_eq!(end.tokens, recipe.tokens());
    cluster.audit(run)?;
    let records = cluster.ledger(run)?;
    ledger::expect_exactly_once(&records, recipe.samples())?;
    let log = cluster.log_lines(run)?;
    assert_eq!(ledger::voids(&records), [], "{}", log.join("\n"));
    weights::expect_same(
        &cluster.last_checkpoint(quiet)?,
        &cluster.last_checkpoint(run)?,
    )
}

#[test]
fn workers_train_on_while_the_coordinator_is_dead_and_the_next_one_takes_them_up() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let recipe = recipe("1 min");
    let quiet = quiet(&stage, &cluster, &recipe)?;
    let away = Duration::from_secs(2);
    let (run, before) = absence(&stage, &mut cluster, &recipe, away)?;
    let back = cluster.wait(&run, "taken up", LIMIT, |status| {
        matches!(status.state(), RunState::Training | RunState::Finished)
    })?;
    assert_eq!(back.generation, 1);
    let meanwhile = cluster.wait(&run, "caught up", LIMIT, |status| status.step > before + 50)?;
    assert_eq!(meanwhile.generation, 1);
    expect_undisturbed(&cluster, &run, &quiet, &recipe)?;
    assert_eq!(cluster.status(&run)?.generation, 1);
    let receipt = cluster
        .last_checkpoint(&run)?
        .with_file_name("receipt.json");
    let receipt: serde_json::Value = serde_json::from_slice(&std::fs::read(receipt)?)?;
    let incidents = receipt["incidents"].as_array();
    let absence = incidents.and_then(|incidents| incidents.first());
    let cost = absence.map(|absence| (&absence["voided_steps"], &absence["lost_seconds"]));
    assert_eq!(cost, Some((&0.into(), &0.0.into())), "{receipt}");
    let lines = cluster.log_lines(&run)?;
    let says = |text: &str| lines.iter().any(|line| line.contains(text));
    assert!(
        says("generation 1 goes on: all its workers are back"),
        "{lines:?}"
    );
    Ok(())
}

#[test]
fn workers_leave_when_the_coordinator_is_dead_for_too_long_and_go_on_from_what_they_hold()
-> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let recipe = recipe("500 ms");
    let quiet = quiet(&stage, &cluster, &recipe)?;
    let (run, _) = absence(&stage, &mut cluster, &recipe, Duration::from_secs(2))?;
    expect_undisturbed(&cluster, &run, &quiet, &recipe)?;
    assert_eq!(cluster.status(&run)?.generation, 2);
    Ok(())
}

#[test]
fn a_worker_that_dies_with_the_coordinator_costs_nobody_elses_steps() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let recipe = recipe("1 min");
    let quiet = quiet(&stage, &cluster, &recipe)?;
    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait(&run, "in the middle", LIMIT, |status| status.step >= 100)?;
    cluster.coordinator()?.kill()?;
    sleep(Duration::from_millis(500));
    cluster.worker("w1")?.kill_children()?;
    cluster.start_coordinator()?;
    expect_undisturbed(&cluster, &run, &quiet, &recipe)?;
    assert_eq!(cluster.status(&run)?.generation, 2);
    Ok(())
}
