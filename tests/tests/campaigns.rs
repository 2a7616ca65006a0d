//! The campaigns of `scripts/prove`, small.

use std::time::Duration;

use supra_tests::campaigns::kills::Kills;
use supra_tests::campaigns::{curves::Curves, worlds};
use supra_tests::{Programs, Result};

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
