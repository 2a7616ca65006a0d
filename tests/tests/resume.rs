//! Stop and go on: the end is the same as if nothing had happened.

use std::time::Duration;

use nix::sys::signal::Signal;
use supra_proto::v1::RunState;
use supra_tests::process::Process;
use supra_tests::{Cluster, Result, TinyRecipe, ledger, weights};

use crate::{LIMIT, Stage};

/// Large enough that a stop finds it in the middle.
fn recipe() -> TinyRecipe {
    TinyRecipe {
        budget: 60_010,
        workers: (1, 4),
        ..TinyRecipe::default()
    }
}

fn cancel_in_the_middle(cluster: &Cluster, run: &str) -> Result<()> {
    cluster.wait(run, "in the middle", LIMIT, |status| status.step >= 30)?;
    cluster.supra(&["cancel", run, "--wait"])?.expect_code(0)?;
    let stopped = cluster.status(run)?;
    assert_eq!(stopped.state(), RunState::Cancelled, "{stopped:?}");
    assert!(
        stopped.step < recipe().steps(),
        "stopped before its end: {stopped:?}"
    );
    let kept = stopped.checkpoint.map(|checkpoint| checkpoint.step);
    assert_eq!(kept, Some(stopped.step), "nothing is lost by a stop");
    Ok(())
}

#[test]
fn a_cancelled_and_resumed_run_ends_with_the_same_bits() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let quiet = stage.submit(&cluster, &recipe())?;
    cluster.wait_finished(&quiet, LIMIT)?;

    let stopped = stage.submit(&cluster, &recipe())?;
    cancel_in_the_middle(&cluster, &stopped)?;
    cluster.supra(&["resume", &stopped])?.expect_code(0)?;
    cluster.wait_finished(&stopped, LIMIT)?;
    cluster.audit(&stopped)?;
    weights::expect_same(
        &cluster.last_checkpoint(&quiet)?,
        &cluster.last_checkpoint(&stopped)?,
    )
}

#[test]
fn ranks_that_keep_parts_of_the_state_stop_resume_and_end_with_the_same_bits() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let whole = stage.submit(&cluster, &recipe())?;
    cluster.wait_finished(&whole, LIMIT)?;

    let parts = TinyRecipe {
        sharding: "zero1",
        ..recipe()
    };
    let run = stage.submit(&cluster, &parts)?;
    cancel_in_the_middle(&cluster, &run)?;
    cluster.supra(&["resume", &run])?.expect_code(0)?;
    cluster.wait_finished(&run, LIMIT)?;
    cluster.audit(&run)?;
    for step in cluster.metrics(&run)? {
        assert!(step.exposed_comm_ms > 0.0, "{step:?}");
    }
    weights::expect_same(
        &cluster.last_checkpoint(&whole)?,
        &cluster.last_checkpoint(&run)?,
    )
}

#[test]
fn a_run_resumes_with_another_number_of_workers() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let run = stage.submit(&cluster, &recipe())?;
    cancel_in_the_middle(&cluster, &run)?;
    cluster.start_worker("w2")?;
    cluster.wait_attached(3, LIMIT)?;
    cluster.supra(&["resume", &run])?.expect_code(0)?;
    cluster.wait(&run, "training with all three", LIMIT, |status| {
        status.world == 3
    })?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.tokens, recipe().tokens());
    cluster.audit(&run)?;
    ledger::expect_exactly_once(&cluster.ledger(&run)?, recipe().samples())
}

#[test]
fn a_lost_worker_with_its_part_of_the_state_leaves_the_rest_to_finish() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let recipe = || TinyRecipe {
        sharding: "zero1",
        ..recipe()
    };
    let run = stage.submit(&cluster, &recipe())?;
    cluster.wait(&run, "past a checkpoint", LIMIT, |status| status.step >= 20)?;
    cluster.remove_worker("w1")?;
    cluster.wait(&run, "training alone", LIMIT, |status| status.world == 1)?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.tokens, recipe().tokens());
    cluster.audit(&run)?;
    Ok(())
}

#[test]
fn the_first_interrupt_of_up_keeps_what_a_second_call_needs() -> Result<()> {
    let stage = Stage::new()?;
    let recipe = TinyRecipe {
        budget: 400_000,
        repeat: true,
        workers: (2, 2),
        ..TinyRecipe::default()
    };
    let path = recipe.write(&stage.fixture)?;
    let state = stage.directory.path().join("up");
    let up = || {
        let mut command = stage.programs.supra();
        command
            .arg("up")
            .arg(&path)
            .args(["--workers", "2", "--device", "cpu", "--state"])
            .arg(&state);
        Process::spawn("up", command, stage.directory.path())
    };
    let mut first = up()?;
    // Its first checkpoint shows that it trains.
    let deadline = std::time::Instant::now() + LIMIT;
    while !holds_checkpoint(&state) {
        assert!(
            first.ended()?.is_none() && std::time::Instant::now() < deadline,
            "{}",
            first.output()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    first.signal(Signal::SIGINT)?;
    let end = first.wait(LIMIT)?;
    assert_eq!(end.code(), Some(75), "{}", first.output());
    assert!(first.output().contains("resume"), "{}", first.output());
    Ok(())
}

/// Whether any published checkpoint lies below a directory.
fn holds_checkpoint(directory: &std::path::Path) -> bool {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return false;
    };
    entries.flatten().any(|entry| {
        let path = entry.path();
        path.file_name().is_some_and(|name| name == "manifest.json")
            || (path.is_dir() && holds_checkpoint(&path))
    })
}
