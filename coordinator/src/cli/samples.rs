//! The training data of a recipe, read again in the order of its plan.

use std::ops::Range;
use std::path::Path;

use supra_data::{DataError, Loader, Manifest, Reader, Sample};
use supra_recipes::{Digest, Plan, Recipe};

use super::failure::{Failure, chain};

/// The samples of a run.
pub struct Samples {
    loader: Loader,
}

impl Samples {
    /// Plans the recipe over the dataset at `data`, which is the recipe's own wherever it is reachable.
    ///
    /// # Errors
    /// Data that cannot be read or does not serve the recipe.
    pub fn open(recipe: &Recipe, data: &Path) -> Result<Samples, Failure> {
        let length = u64::from(recipe.batch.sequence_length);
        let open = || {
            let manifest = Manifest::load(data)?;
            let plan = Plan::new(recipe, manifest.windows(length), manifest.hash())?;
            Ok(Samples {
                loader: Loader::new(Reader::open(data, length)?, plan),
            })
        };
        open().map_err(|error: DataError| Failure::input(chain(&error)))
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        self.loader.plan()
    }

    /// The dataset.
    pub fn manifest(&self) -> &Manifest {
        self.loader.manifest()
    }

    /// One sample.
    ///
    /// # Errors
    /// As [`Loader::sample`], on one line.
    pub fn sample(&mut self, number: u64) -> Result<Sample, String> {
        self.loader.sample(number).map_err(|error| chain(&error))
    }

    /// The sum of the digests of samples.
    ///
    /// # Errors
    /// As [`Samples::sample`].
    pub fn digest(&mut self, samples: Range<u64>) -> Result<Digest, String> {
        let mut sum = Digest::ZERO;
        for number in samples {
            let sample = self.sample(number)?;
            sum += Digest::of_sample(sample.id, &sample.tokens);
        }
        Ok(sum)
    }
}
