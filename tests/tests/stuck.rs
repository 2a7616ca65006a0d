//! A rank that stands still in the middle of a step, while its process lives on and says so.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use supra_tests::process::POLL;
use supra_tests::{Failure, Result, TinyRecipe};

use crate::{LIMIT, Stage, preloaded};

#[test]
fn a_rank_that_hangs_is_named_and_not_those_that_wait_for_it() -> Result<()> {
    let stage = Stage::new()?;
    let still = stage.directory.path().join("stands.still");
    let library = preloaded(stage.directory.path(), "stuck", include_str!("stuck.cpp"))?;
    let mut cluster = stage.cluster("cluster", 0)?;
    for name in ["w0", "w1", "w2"] {
        let mut worker = cluster.worker_command(name);
        worker
            .env("LD_PRELOAD", &library)
            .env("STANDS_STILL", &still);
        cluster.adopt_worker(name, worker)?;
    }
    cluster.wait_attached(3, LIMIT)?;
    // Long enough for it to go on until the rank hangs, however fast the processor is; and not in a checkpoint, which may take
    // longer than this test.
    let recipe = TinyRecipe {
        budget: 400_010,
        repeat: true,
        checkpoint_every: 1_000_000,
        workers: (3, 3),
        ..TinyRecipe::default()
    };
    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait(&run, "in training", LIMIT, |status| status.step >= 5)?;

    let workers = cluster.supra_json(&["workers"])?;
    let mut workers = workers.as_array().into_iter().flatten();
    let hangs = workers.find(|worker| worker["name"] == "w1");
    let pid = hangs.map(|worker| worker["pid"].to_string());
    let pid = pid.ok_or_else(|| Failure::new("w1 is not attached"))?;
    fs::write(still.with_extension("next"), &pid)?;
    // Nobody may read half a number.
    fs::rename(still.with_extension("next"), &still)?;

    let void = wait_told(Duration::from_secs(120), || {
        let lines = cluster.log_lines(&run)?;
        Ok(lines.into_iter().find(|line| line.contains("is void")))
    })?;
    assert!(
        void.starts_with("generation 1 is void: rank 1 (w1) is stuck: training step ")
            && void.ends_with("; 2 ranks wait for it"),
        "{void}\n{}",
        cluster.logs()
    );
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!((end.tokens, end.generation), (recipe.tokens(), 2));
    cluster.audit(&run)?;
    Ok(())
}

/// Waits until there is something to tell.
fn wait_told(limit: Duration, look: impl Fn() -> Result<Option<String>>) -> Result<String> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(told) = look()? {
            return Ok(told);
        }
        sleep(POLL);
    }
    Err(Failure::new("nothing is told"))
}
