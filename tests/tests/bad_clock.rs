//! A wall clock that steps back: nobody may decide by it, and what is shown stays sane.

use std::fs;
use std::path::{Path, PathBuf};

use supra_tests::{Programs, Result, TinyRecipe};

use crate::{LIMIT, Stage, preloaded};

/// Far more than any limit of the programs.
const HOUR: i64 = 3600;

/// The wall clock of some programs, which can be moved while they run.
struct Clock {
    library: PathBuf,
    seconds: PathBuf,
}

impl Clock {
    /// Compiles the library that moves it, in `directory`.
    fn new(directory: &Path) -> Result<Self> {
        let clock = Self {
            library: preloaded(directory, "clock", include_str!("bad_clock.cpp"))?,
            seconds: directory.join("clock.seconds"),
        };
        clock.step(0)?;
        Ok(clock)
    }

    /// The programs, with this clock.
    fn of(&self, programs: &Programs) -> Programs {
        programs
            .with("LD_PRELOAD", &self.library)
            .with("STEPPED_CLOCK", &self.seconds)
    }

    /// Moves it to so many seconds from the true time.
    fn step(&self, seconds: i64) -> Result<()> {
        // Nobody may read half a number.
        let next = self.seconds.with_extension("next");
        fs::write(&next, seconds.to_string())?;
        fs::rename(next, &self.seconds)?;
        Ok(())
    }
}

/// Fails if a text for people has a negative number or a time of hours: all here takes seconds.
fn expect_sane(text: &str) {
    let negative = text.split_whitespace().any(|word| {
        word.strip_prefix('-')
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    });
    assert!(!negative && !text.contains(" h "), "{text}");
}

#[test]
fn a_clock_that_steps_back_disturbs_no_run_and_shows_nothing_absurd() -> Result<()> {
    let mut stage = Stage::new()?;
    let clock = Clock::new(stage.directory.path())?;
    stage.programs = clock.of(&stage.programs);
    let mut cluster = stage.cluster("cluster", 2)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        ..TinyRecipe::default()
    };
    let first = stage.submit(&cluster, &recipe)?;
    cluster.wait(&first, "in training", LIMIT, |status| status.step >= 10)?;
    clock.step(-HOUR)?;
    let status = cluster.wait(&first, "past the step of the clock", LIMIT, |status| {
        status.step >= 20
    })?;
    assert!(
        status.tokens_per_second > 0.0 && status.eta_seconds >= 0.0,
        "{status:?}"
    );
    for command in ["status", "runs", "workers", "checkpoints"] {
        expect_sane(&cluster.supra(&[command])?.expect_code(0)?.stdout);
    }
    let end = cluster.wait_finished(&first, LIMIT)?;
    assert_eq!(
        (end.tokens, end.generation),
        (recipe.tokens(), 1),
        "nobody was lost"
    );
    assert!(
        end.ended_unix_ms < end.submitted_unix_ms,
        "the clock did step: {end:?}"
    );
    expect_sane(&cluster.supra(&["watch", &first])?.expect_code(0)?.stdout);
    cluster.audit(&first)?;

    // A coordinator that starts with a journal from the future, and workers that it finds again.
    cluster.coordinator()?.kill()?;
    clock.step(-2 * HOUR)?;
    cluster.start_coordinator()?;
    cluster.wait_attached(2, LIMIT)?;
    let second = stage.submit(&cluster, &TinyRecipe::default())?;
    assert_eq!(
        cluster.supra_json(&["status"])?["run"],
        second.as_str(),
        "the newest run"
    );
    cluster.wait_finished(&second, LIMIT)?;
    cluster.audit(&second)?;
    Ok(())
}
