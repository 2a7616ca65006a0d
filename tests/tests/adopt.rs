//! The head node is lost with its journal: a run is rebuilt from its checkpoints.

use std::fs;
use std::path::Path;

use supra_proto::v1::RunState;
use supra_tests::{Result, TinyRecipe, ledger, weights};

use crate::{LIMIT, Stage};

/// With checkpoints that are not in the state directory.
fn recipe(folder: &Path) -> TinyRecipe {
    let folder = folder.display();
    TinyRecipe {
        budget: 60_010,
        checkpoint: Some(format!("{{ every_tokens: 4096, keep: 100, to: {folder} }}")),
        ..TinyRecipe::default()
    }
}

#[test]
fn a_run_whose_head_node_is_lost_is_adopted_and_ends_with_the_same_bits() -> Result<()> {
    let stage = Stage::new()?;
    let folder = stage.directory.path().join("checkpoints");
    let recipe = recipe(&folder);
    let mut first = stage.cluster("first", 2)?;
    first.wait_attached(2, LIMIT)?;
    let quiet = stage.submit(&first, &recipe)?;
    first.wait_finished(&quiet, LIMIT)?;
    let quiet = first.last_checkpoint(&quiet)?;

    let run = stage.submit(&first, &recipe)?;
    first.wait(&run, "in the middle", LIMIT, |status| status.step >= 30)?;
    first.coordinator()?.kill_tree()?;
    for worker in first.worker_names() {
        first.remove_worker(&worker)?;
    }
    fs::remove_dir_all(first.state())?;
    drop(first);
    let folder = folder.join(&run);
    let url = folder.to_string_lossy();
    let mut published: Vec<_> = fs::read_dir(&folder)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("manifest.json").exists())
        .collect();
    published.sort();
    let newest = published.last().expect("a checkpoint was written");
    fs::write(newest.join("model-rank-001-of-002-00001.safetensors"), "")?;

    let second = stage.cluster("second", 2)?;
    second.wait_attached(2, LIMIT)?;
    second
        .supra(&["resume", "--adopt", &url, "--strict"])?
        .expect_code(4)?
        .expect_words(&["model-rank-001", "--strict"])?;
    assert!(
        second
            .supra_json(&["runs"])?
            .as_array()
            .is_some_and(Vec::is_empty)
    );
    second
        .supra(&["resume", "--adopt", &url])?
        .expect_code(0)?
        .expect_words(&[&run, "is adopted", "nothing starts from", "model-rank-001"])?;
    second
        .supra(&["resume", "--adopt", &url])?
        .expect_code(2)?
        .expect_words(&["knows run", "supra resume"])?;

    let end = second.wait_finished(&run, LIMIT)?;
    assert_eq!(
        (end.state(), end.tokens),
        (RunState::Finished, recipe.tokens())
    );
    assert!(end.generation > 1000, "{end:?}");
    let verdict = second.supra_json(&["audit", &run, "--files"])?;
    assert_eq!(verdict["finished"], true, "{verdict}");
    ledger::expect_exactly_once(&second.ledger(&run)?, recipe.samples())?;
    weights::expect_same(&quiet, &second.last_checkpoint(&run)?)?;
    // What was trained before the head node was lost can still be rebuilt; what it was logged as is gone with the node.
    let state = second.state();
    second
        .supra(&[
            "replay",
            &run,
            "--step",
            "3",
            "--recipe",
            &stage.fixture.root.join("tiny.yaml").to_string_lossy(),
        ])?
        .expect_code(0)?;
    assert!(state.join("journal.db").exists());
    Ok(())
}
