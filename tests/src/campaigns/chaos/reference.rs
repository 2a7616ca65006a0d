//! A run that nobody disturbed, and how much another one may differ from it.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::programs::Programs;
use crate::weights::{self, Hashes, Weights};

use super::kills;

/// Largest distance of final weights when the number of ranks has changed, in steps: the length of the way that the last
/// steps went, per step. A step that is lost, repeated or weighted wrongly counts one, more or less.
const BOUND: f64 = 0.01;

/// For the run.
const LIMIT: Duration = Duration::from_secs(300);

/// What a run left that nobody disturbed.
pub(super) struct Reference {
    hashes: Hashes,
    weights: Weights,
    /// Length of the way from the last checkpoint but one to the last, per step.
    step: f64,
}

/// How a run is like its reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Likeness {
    /// In every bit.
    Equal,
    /// In as many steps.
    Near(f64),
}

impl Reference {
    /// Trains the recipe in peace.
    pub fn train(
        programs: &Programs,
        directory: &Path,
        fixture: &Fixture,
        recipe: &TinyRecipe,
    ) -> Result<Self> {
        let cluster = Cluster::with_workers(programs, directory, recipe.workers.1)?;
        let run = cluster.submit(&recipe.write(fixture)?)?;
        cluster.wait_finished(&run, LIMIT)?;
        kills::check(&cluster, &run, recipe)?;
        let checkpoints = cluster.checkpoints(&run)?;
        let [.., before, last] = checkpoints.as_slice() else {
            return Err(Failure::new("it wrote fewer than two checkpoints"));
        };
        let path = Path::new(&last.path);
        let weights = weights::model(path)?;
        let way = weights::distance(&weights, &weights::model(Path::new(&before.path))?)?;
        Ok(Self {
            hashes: weights::hashes(path)?,
            weights,
            step: way / (last.step - before.step) as f64,
        })
    }

    /// Fails unless a checkpoint is like this run's last: in every bit if all its steps had as many ranks.
    pub fn compare(&self, checkpoint: &Path, same_worlds: bool) -> Result<Likeness> {
        if same_worlds {
            weights::expect(&self.hashes, checkpoint)?;
            return Ok(Likeness::Equal);
        }
        let distance = weights::distance(&self.weights, &weights::model(checkpoint)?);
        let steps = distance.while_doing(checkpoint.display())? / self.step;
        if steps.is_nan() || steps > BOUND {
            return Err(Failure::new(format!(
                "the final weights are {steps:.2e} steps from those of an undisturbed run, {BOUND:e} is allowed"
            )));
        }
        Ok(Likeness::Near(steps))
    }
}

impl Likeness {
    pub fn bit_equal(self) -> bool {
        self == Likeness::Equal
    }
}

impl fmt::Display for Likeness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Likeness::Equal => f.write_str("the same bits"),
            Likeness::Near(steps) => write!(f, "{steps:.1e} steps away"),
        }
    }
}
