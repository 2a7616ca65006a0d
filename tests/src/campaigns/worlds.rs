//! The same recipe with 1, 2 and 4 workers: the losses agree within the error of fp32 sums.
//!
//! Adding the same numbers in another order rounds differently, and training amplifies that: a feature that rounding moves
//! over its kink changes the loss in the fourth digit some steps later. So two things are asked. In the first step, where
//! all runs still have the same weights, loss and gradient norm agree to rounding. Later the runs stay as close together
//! as single workers do that only add in another order: one process, no communication, other micro-batches.

use std::path::Path;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::programs::Programs;
use crate::report::Row;

/// What the report says above its table.
pub const ABOUT: &str = "The same recipe, data and seeds, one thread per worker. The first row is the reference. The other rows with \
    one worker are the yardstick: no communication, and only the order of fp32 additions differs, by another micro-batch. The rows \
    with 2 and 4 workers take the reference's micro-batches. Differences are relative to the reference: in the loss and the gradient \
    norm of the first step, where all weights are still equal, and the largest in the loss of any step. The campaign fails if a \
    first step differs by more than 1e-6 or any later loss by more than 2e-3.";

/// Largest relative difference of the first step's loss and gradient norm: a few units in the last place of fp32.
const ROUNDING: f64 = 1e-6;
/// Largest relative difference of any later loss. Single workers that add in another order drift by up to 4e-4 in 200
/// steps; which of them meets a kink, and when, depends on the processor.
const DRIFT: f64 = 2e-3;
const LIMIT: Duration = Duration::from_secs(600);
const MICRO_BATCH: u64 = 4;
/// Micro-batches of the yardstick, all of one worker.
const OTHER_ORDERS: [u64; 4] = [1, 2, 8, 16];
const WORLDS: [u32; 2] = [2, 4];

/// Loss and gradient norm of every step of a run.
type Curve = Vec<(f64, f64)>;

/// How far a run is from the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Distance {
    first_loss: f64,
    first_norm: f64,
    worst_loss: f64,
}

/// Runs the reference, the yardstick and the worlds for `steps` steps each.
///
/// # Errors
/// When a run does not finish, or differs by more than the order of additions explains.
pub fn run(programs: &Programs, directory: &Path, steps: u64) -> Result<Vec<Row>> {
    let study = Study {
        programs,
        directory,
        fixture: &Fixture::create(programs, directory)?,
        steps,
    };
    let reference = study.train(1, MICRO_BATCH)?;
    let yardstick = OTHER_ORDERS.map(|micro_batch| (1, micro_batch));
    let worlds = WORLDS.map(|world| (world, MICRO_BATCH));
    let mut rows = vec![row(
        (1, MICRO_BATCH),
        &reference,
        distance(&reference, &reference)?,
    )];
    for (world, micro_batch) in yardstick.into_iter().chain(worlds) {
        let curve = study.train(world, micro_batch)?;
        let distance = distance(&reference, &curve)?;
        distance.expect_small().while_doing(format_args!(
            "{world} workers with micro-batches of {micro_batch}"
        ))?;
        rows.push(row((world, micro_batch), &curve, distance));
    }
    Ok(rows)
}

/// What all runs share.
struct Study<'a> {
    programs: &'a Programs,
    directory: &'a Path,
    fixture: &'a Fixture,
    steps: u64,
}

impl Study<'_> {
    fn train(&self, world: u32, micro_batch: u64) -> Result<Curve> {
        let recipe = TinyRecipe {
            name: format!("world-{world}-micro-{micro_batch}"),
            budget: 512 * self.steps,
            workers: (world, world),
            micro_batch,
            // What is compared is the arithmetic between the ends.
            checkpoint_every: 512 * self.steps,
            repeat: true,
            // A slow one: a feature that rounding moves over its kink must not be amplified step by step.
            lr: "3e-4",
            ..TinyRecipe::default()
        };
        let cluster =
            Cluster::with_workers(self.programs, &self.directory.join(&recipe.name), world)?;
        let run = cluster.submit(&recipe.write(self.fixture)?)?;
        cluster
            .wait_finished(&run, LIMIT)
            .while_doing(&recipe.name)?;
        cluster.audit(&run)?;
        let steps = cluster.metrics(&run)?;
        Ok(steps
            .iter()
            .map(|step| (step.loss, step.grad_norm))
            .collect())
    }
}

fn row((world, micro_batch): (u32, u64), curve: &Curve, distance: Distance) -> Row {
    Row::new()
        .with("workers", world)
        .with("micro_batch", micro_batch)
        .with("steps", curve.len())
        .with("first_loss", curve[0].0)
        .with("last_loss", curve[curve.len() - 1].0)
        .with("first_loss_difference", distance.first_loss)
        .with("first_norm_difference", distance.first_norm)
        .with("worst_loss_difference", distance.worst_loss)
}

fn distance(reference: &Curve, curve: &Curve) -> Result<Distance> {
    if reference.is_empty() || reference.len() != curve.len() {
        let (one, other) = (reference.len(), curve.len());
        return Err(Failure::new(format!(
            "the reference has {one} steps, another run {other}"
        )));
    }
    let relative = |a: f64, b: f64| ((a - b) / a).abs();
    let steps = reference.iter().zip(curve);
    Ok(Distance {
        first_loss: relative(reference[0].0, curve[0].0),
        first_norm: relative(reference[0].1, curve[0].1),
        worst_loss: steps.map(|(a, b)| relative(a.0, b.0)).fold(0.0, worse),
    })
}

impl Distance {
    fn expect_small(self) -> Result<()> {
        for (what, difference, limit) in [
            ("the first loss", self.first_loss, ROUNDING),
            ("the first gradient norm", self.first_norm, ROUNDING),
            ("a later loss", self.worst_loss, DRIFT),
        ] {
            if difference.is_nan() || difference > limit {
                return Err(Failure::new(format!(
                    "{what} differs by {difference:e} of itself from the reference, {limit:e} is allowed"
                )));
            }
        }
        Ok(())
    }
}

/// The larger of the two; unlike `f64::max` it does not forget a NaN.
fn worse(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_relative_and_keep_nan() {
        let reference = vec![(2.0, 1.0), (4.0, 1.0)];
        let near = distance(&reference, &vec![(2.0, 1.5), (3.0, 9.0)]).unwrap();
        assert_eq!(
            near,
            Distance {
                first_loss: 0.0,
                first_norm: 0.5,
                worst_loss: 0.25
            }
        );
        assert!(near.expect_small().is_err());
        let lost = distance(&reference, &vec![(f64::NAN, 1.0), (4.0, 1.0)]).unwrap();
        assert!(lost.worst_loss.is_nan() && lost.expect_small().is_err());
        assert!(distance(&reference, &vec![(2.0, 1.0)]).is_err());
    }
}
