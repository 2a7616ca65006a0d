//! A checkpoint that is not what was written: found, named, and the run goes on from an older one, or not, as it was told.

use std::fs;
use std::path::Path;

use supra_proto::v1::RunState;
use supra_tests::{Cluster, Result, TinyRecipe, ledger};

use crate::{LIMIT, Stage};

/// Large enough that a stop finds it in the middle; a checkpoint every eight steps.
fn recipe() -> TinyRecipe {
    TinyRecipe {
        budget: 60_010,
        workers: (1, 4),
        ..TinyRecipe::default()
    }
}

/// Stops a run in the middle of its training. Steps of its two newest checkpoints, the older one first.
fn stopped(cluster: &Cluster, run: &str) -> Result<[u64; 2]> {
    cluster.wait(run, "in the middle", LIMIT, |status| status.step >= 30)?;
    cluster.supra(&["cancel", run, "--wait"])?.expect_code(0)?;
    let known = cluster.checkpoints(run)?;
    let [.., older, newest] = &known[..] else {
        panic!("two checkpoints: {known:?}");
    };
    let model = Path::new(&newest.path).join("model-rank-000-of-002-00001.safetensors");
    let mut bytes = fs::read(&model)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(model, bytes)?;
    Ok([older.step, newest.step])
}

#[test]
fn a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_unless_it_is_strict()
-> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 2)?;
    cluster.wait_attached(2, LIMIT)?;
    let run = stage.submit(&cluster, &recipe())?;
    let [older, newest] = stopped(&cluster, &run)?;
    cluster
        .supra(&["checkpoints", &run, &newest.to_string(), "--verify"])?
        .expect_code(4)?
        .expect_words(&[
            "DAMAGED",
            "model-rank-000-of-002-00001.safetensors: its BLAKE3 is",
        ])?;
    cluster
        .supra(&["checkpoints", &run, &older.to_string(), "--verify"])?
        .expect_code(0)?;

    cluster
        .supra(&["resume", &run, "--strict", "--watch"])?
        .expect_code(4)?
        .expect_words(&["model-rank-000", "--strict"])?;
    let refused = cluster.status(&run)?;
    assert_eq!((refused.step, refused.damaged.len()), (newest, 0));

    cluster.supra(&["resume", &run])?.expect_code(0)?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.state(), RunState::Finished);
    assert_eq!(end.tokens, recipe().tokens());
    let damaged = &end.damaged[0];
    assert_eq!(damaged.step, newest);
    assert!(damaged.damaged.contains("model-rank-000"), "{damaged:?}");
    let verdict = cluster.audit(&run)?;
    assert_eq!(verdict["damaged_checkpoints"], 1, "{verdict}");
    assert_eq!(verdict["voided_steps"], newest - older, "{verdict}");
    ledger::expect_exactly_once(&cluster.ledger(&run)?, recipe().samples())?;

    let pruned = cluster.supra_json(&["checkpoints", "prune", &run])?;
    assert_eq!(pruned[0]["step"], newest, "{pruned}");
    assert!(Path::new(&damaged.path).exists(), "only shown");
    cluster
        .supra(&["checkpoints", "prune", &run, "--yes"])?
        .expect_code(0)?;
    assert!(cluster.status(&run)?.damaged.is_empty());
    Ok(())
}
