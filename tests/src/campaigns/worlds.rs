//! The same recipe with 1, 2 and 4 workers: the losses agree to rounding.

use std::path::Path;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::fixture::{Fixture, TinyRecipe};
use crate::programs::Programs;
use crate::report::Row;

/// What the report says above its table.
pub const ABOUT: &str = "The same recipe, data and seeds with 1, 2 and 4 worker processes on one machine. \
    Only the order of fp32 additions differs, so the losses of every step agree to rounding. \
    `worst_difference` is the largest relative difference of a step's mean loss to the run with one worker.";

/// Largest relative difference of a step's loss that rounding explains, with room to spare.
const TOLERANCE: f64 = 1e-5;
const LIMIT: Duration = Duration::from_secs(600);

/// Runs all worlds for `steps` steps each.
///
/// # Errors
/// When a run does not finish, or a loss differs by more than rounding.
pub fn run(programs: &Programs, directory: &Path, steps: u64) -> Result<Vec<Row>> {
    let fixture = Fixture::create(programs, directory)?;
    let mut rows = Vec::new();
    let mut reference: Vec<f64> = Vec::new();
    for world in [1, 2, 4] {
        let recipe = TinyRecipe {
            name: format!("world-{world}"),
            budget: 512 * steps,
            workers: (world, world),
            // What is compared is the arithmetic between the ends.
            checkpoint_every: 512 * steps,
            repeat: true,
            // A slow one: a feature that rounding moves over its kink must not be amplified step by step.
            lr: "3e-4",
            ..TinyRecipe::default()
        };
        let cluster = Cluster::with_workers(programs, &directory.join(&recipe.name), world)?;
        let run = cluster.submit(&recipe.write(&fixture)?)?;
        cluster
            .wait_finished(&run, LIMIT)
            .while_doing(format_args!("world {world}"))?;
        cluster.audit(&run)?;
        let losses: Vec<f64> = cluster
            .metrics(&run)?
            .iter()
            .map(|step| step.loss)
            .collect();
        if reference.is_empty() {
            reference.clone_from(&losses);
        }
        if losses.len() != reference.len() || losses.is_empty() {
            let (one, other) = (reference.len(), losses.len());
            return Err(Failure::new(format!(
                "{one} steps with 1 worker, {other} with {world}"
            )));
        }
        let worst = worst_difference(&reference, &losses);
        let ends = (losses[0], losses[losses.len() - 1]);
        rows.push(
            Row::new()
                .with("workers", world)
                .with("steps", losses.len())
                .with("first_loss", ends.0)
                .with("last_loss", ends.1)
                .with("worst_difference", worst),
        );
        if worst.is_nan() || worst > TOLERANCE {
            return Err(Failure::new(format!(
                "with {world} workers a loss differs by {worst:e} of itself"
            )));
        }
    }
    Ok(rows)
}

fn worst_difference(reference: &[f64], losses: &[f64]) -> f64 {
    let differences = reference
        .iter()
        .zip(losses)
        .map(|(a, b)| ((a - b) / a).abs());
    // `f64::max` would forget a NaN.
    differences.fold(0.0, |worst, next| {
        if next > worst || next.is_nan() {
            next
        } else {
            worst
        }
    })
}

#[cfg(test)]
mod tests {
    use super::worst_difference;

    #[test]
    fn the_worst_difference_is_relative_and_keeps_nan() {
        assert_eq!(worst_difference(&[2.0, 4.0], &[2.0, 3.0]), 0.25);
        assert!(worst_difference(&[2.0, 4.0], &[f64::NAN, 4.0]).is_nan());
    }
}
