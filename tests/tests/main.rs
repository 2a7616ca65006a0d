//! Whole-system tests with real processes. They run one at a time (`.config/nextest.toml`).
//!
//! The programs are those beside this executable: `cargo nextest run --workspace` builds them.

mod adopt;
mod away;
mod bad_clock;
mod bad_disk;
mod bad_input;
mod bad_network;
mod campaigns;
mod chaos;
mod damage;
mod diff;
mod end_to_end;
mod gpu;
mod object_store;
mod replay;
mod resume;
mod s3_server;
mod serve;
mod setup;
mod silence;
mod snapshots;
mod stuck;
mod widths;

use std::time::Duration;

use supra_tests::preload::preloaded;
use supra_tests::{Cluster, Fixture, Programs, Result, TinyRecipe};
use tempfile::TempDir;

/// For anything that takes seconds.
const LIMIT: Duration = Duration::from_secs(90);

/// Programs, a small world and a directory that goes away.
struct Stage {
    programs: Programs,
    fixture: Fixture,
    directory: TempDir,
}

impl Stage {
    fn new() -> Result<Self> {
        let programs = Programs::find()?;
        let directory = tempfile::tempdir()?;
        let fixture = Fixture::create(&programs, &directory.path().join("world"))?;
        Ok(Self {
            programs,
            fixture,
            directory,
        })
    }

    /// A cluster with its state below `name`.
    fn cluster(&self, name: &str, workers: u32) -> Result<Cluster> {
        Cluster::with_workers(&self.programs, &self.directory.path().join(name), workers)
    }

    fn submit(&self, cluster: &Cluster, recipe: &TinyRecipe) -> Result<String> {
        cluster.submit(&recipe.write(&self.fixture)?)
    }
}
