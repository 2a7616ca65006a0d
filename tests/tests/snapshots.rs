//! With `sharding: zero1` no rank has the whole state. What a death costs then, and that a drain and a join cost nothing.

use std::time::Duration;

use nix::sys::signal::Signal;
use supra_tests::{Cluster, Result, TinyRecipe, ledger, weights};

use crate::{LIMIT, Stage};

/// Steps from one snapshot to the next.
const EVERY: u64 = 4;

/// No checkpoint before the end.
fn recipe(workers: (u32, u32)) -> TinyRecipe {
    TinyRecipe {
        budget: 90_010,
        checkpoint_every: 1_000_000,
        repeat: true,
        sharding: "zero1",
        workers,
        more: format!("recovery: {{ snapshot_every: {EVERY} }}\n"),
        ..TinyRecipe::default()
    }
}

fn past(cluster: &Cluster, run: &str, step: u64) -> Result<u64> {
    let status = cluster.wait(run, "in the middle", LIMIT, |status| status.step >= step)?;
    Ok(status.generation)
}

fn exactly_once(cluster: &Cluster, run: &str, recipe: &TinyRecipe) -> Result<()> {
    let end = cluster.wait_finished(run, LIMIT)?;
    assert_eq!(end.tokens, recipe.tokens());
    cluster.audit(run)?;
    ledger::expect_exactly_once(&cluster.ledger(run)?, recipe.samples())
}

#[test]
fn killed_ranks_that_kept_parts_cost_the_steps_since_the_snapshot_and_no_bit() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 3)?;
    cluster.wait_attached(3, LIMIT)?;
    let recipe = recipe((3, 3));
    let quiet = stage.submit(&cluster, &recipe)?;
    cluster.wait_finished(&quiet, LIMIT)?;

    let run = stage.submit(&cluster, &recipe)?;
    // At moments that nobody chooses: whatever a rank is in the middle of, others are in the middle of it, too.
    for (kill, step) in [30, 80, 130].into_iter().enumerate() {
        past(&cluster, &run, step)?;
        std::thread::sleep(Duration::from_millis(7 * kill as u64));
        let worker = format!("w{}", kill % 3);
        cluster.worker(&worker)?.signal_children(Signal::SIGKILL);
    }
    exactly_once(&cluster, &run, &recipe)?;
    let voids = ledger::voids(&cluster.ledger(&run)?);
    for (last, stays) in &voids {
        assert!(*stays > 0, "never from the base: {voids:?}");
        assert!(last - stays <= 3 * EVERY, "{voids:?}");
    }
    assert!(cluster.status(&run)?.generation >= 4, "three kills");
    weights::expect_same(
        &cluster.last_checkpoint(&quiet)?,
        &cluster.last_checkpoint(&run)?,
    )
}

#[test]
fn workers_that_join_and_are_drained_void_no_step_of_those_that_divide_the_state() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    // Long enough for a worker to start while it goes on, however fast the processor is.
    let recipe = TinyRecipe {
        budget: 600_010,
        ..recipe((1, 4))
    };
    let run = stage.submit(&cluster, &recipe)?;
    past(&cluster, &run, 30)?;
    cluster.start_worker("w2")?;
    cluster.wait(&run, "training with three", LIMIT, |status| {
        status.world == 3
    })?;
    let before = cluster.status(&run)?.step;
    past(&cluster, &run, before + 2)?;
    cluster.supra(&["drain", "w1"])?.expect_code(0)?;
    cluster.wait(&run, "training without it", LIMIT, |status| {
        status.world == 2
    })?;
    exactly_once(&cluster, &run, &recipe)?;
    assert_eq!(ledger::voids(&cluster.ledger(&run)?), []);
    Ok(())
}
