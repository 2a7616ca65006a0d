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

/// Distance of final weights that is allowed in any case when the number of ranks has changed, in steps: the length of the
/// way that the last steps went, per step.
const BOUND: f64 = 0.01;

/// How much further off a run may be than undisturbed runs of other numbers of ranks are from each other. How far those get
/// depends on the processor: where its products round a row by the rows beside it, a feature or two end on the other side of
/// their kink.
const YARDSTICKS: f64 = 2.0;

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

    /// Fails unless a checkpoint is this run's last in every bit, as when all its steps had as many ranks.
    pub fn expect_bits(&self, checkpoint: &Path) -> Result<Likeness> {
        weights::expect(&self.hashes, checkpoint)?;
        Ok(Likeness::Equal)
    }

    /// Fails when a checkpoint is further from this run's last than `others`, undisturbed runs of other numbers of ranks,
    /// explain.
    pub fn expect_near<'a>(
        &self,
        checkpoint: &Path,
        others: impl Iterator<Item = &'a Reference>,
    ) -> Result<Likeness> {
        let mut allowed = BOUND;
        for other in others {
            allowed = allowed.max(YARDSTICKS * self.steps_to(&other.weights)?);
        }
        let steps = self
            .steps_to(&weights::model(checkpoint)?)
            .while_doing(checkpoint.display())?;
        if steps.is_nan() || steps > allowed {
            return Err(Failure::new(format!(
                "the final weights are {steps:.2e} steps from those of an undisturbed run, {allowed:.2e} are allowed"
            )));
        }
        Ok(Likeness::Near(steps))
    }

    fn steps_to(&self, weights: &Weights) -> Result<f64> {
        Ok(weights::distance(&self.weights, weights)? / self.step)
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
