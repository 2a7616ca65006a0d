//! The campaigns of `scripts/prove`, small.

use std::time::Duration;

use supra_tests::campaigns::big::Big;
use supra_tests::campaigns::chaos::Chaos;
use supra_tests::campaigns::checkpoint_kills::CheckpointKills;
use supra_tests::campaigns::corruption::Corruption;
use supra_tests::campaigns::kills::Kills;
use supra_tests::campaigns::precision::Precision;
use supra_tests::campaigns::simulation::Simulation;
use supra_tests::campaigns::uptrain::Uptrain;
use supra_tests::campaigns::{checkpoint, curves::Curves, worlds};
use supra_tests::models::quickstart;
use supra_tests::{Device, Programs, Result};

#[test]
fn kills_at_random_moments_change_nothing() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let kills = Kills {
        kills: 6,
        steps: 200,
        pause: Duration::from_secs(2),
        seed: 5,
    };
    let rows = kills.run(&Programs::find()?, scratch.path())?;
    assert!(!rows.is_empty());
    Ok(())
}

#[test]
fn kills_while_a_checkpoint_is_written_leave_nothing_wrong_and_lose_nothing_good() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let rows = CheckpointKills::small().run(&Programs::find()?, scratch.path())?;
    assert!(!rows.is_empty());
    Ok(())
}

#[test]
fn faults_at_random_moments_change_nothing() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let rows = Chaos::schedules(2).run(&Programs::find()?, scratch.path())?;
    assert!(!rows.is_empty());
    Ok(())
}

#[test]
fn a_checkpoints_cost_can_be_measured() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let rows = checkpoint::run(&Programs::find()?, scratch.path(), Device::Cpu, true)?;
    assert_eq!(rows.len(), 2, "disk and memory");
    Ok(())
}

#[test]
fn damage_at_random_places_is_found() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let corruption = Corruption { cases: 40, seed: 5 };
    let rows = corruption.run(&Programs::find()?, scratch.path())?;
    assert!(!rows.is_empty());
    Ok(())
}

#[test]
fn world_sizes_give_the_same_losses() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    worlds::run(&Programs::find()?, scratch.path(), 20).map(drop)
}

#[test]
fn uptraining_beats_random_weights() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let plot = scratch.path().join("curves.svg");
    let curves = Curves {
        shorter: 40,
        checkpoints: 2,
        windows: Some(32),
        plot: plot.clone(),
    };
    curves.run(&Programs::find()?, scratch.path())?;
    assert!(plot.is_file());
    Ok(())
}

#[test]
fn a_model_from_random_weights_learns_as_planned() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let big = Big {
        quick: true,
        device: Device::Cpu,
    };
    big.run(&Programs::find()?, scratch.path()).map(drop)
}

#[test]
fn uptraining_on_a_twentieth_of_the_tokens_is_worth_it_with_one_rank_and_two() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let uptrain = Uptrain {
        quick: true,
        device: Device::Cpu,
        text: quickstart("text"),
    };
    uptrain.run(&Programs::find()?, scratch.path()).map(drop)
}

#[test]
fn bf16_learns_like_fp32() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let precision = Precision {
        quick: true,
        device: Device::Cpu,
    };
    precision.run(&Programs::find()?, scratch.path()).map(drop)
}

#[test]
fn simulated_faults_lose_and_repeat_no_sample_and_every_mutant_is_found() -> Result<()> {
    let rows = Simulation::SMALL.run()?;
    assert!(!rows.is_empty());
    Ok(())
}
