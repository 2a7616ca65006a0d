//! Ranks on a GPU, which they share: correct over NCCL, and as hard to stop as on CPUs. Without a GPU the tests say
//! "skipped" and pass.

use std::path::Path;
use std::time::{Duration, Instant};

use supra_tests::{Cluster, Result, TinyRecipe, ledger};

use crate::{LIMIT, Stage};

/// How long the survivors of a killed rank may take to train again.
const RECOVERY: Duration = Duration::from_secs(5);

pub fn gpu_is_missing() -> bool {
    let driver = ["/proc/driver/nvidia/version", "/dev/nvidiactl"];
    let missing = !driver.iter().any(|path| Path::new(path).exists());
    if missing {
        println!("skipped: this machine has no driver for an NVIDIA GPU");
    }
    missing
}

/// A cluster whose workers all compute on the first GPU.
fn cluster(stage: &Stage, workers: u32) -> Result<Cluster> {
    let directory = stage.directory.path().join(format!("gpu-{workers}"));
    let mut cluster = Cluster::start(&stage.programs, &directory)?;
    for worker in 0..workers {
        let name = format!("w{worker}");
        cluster.adopt_worker(&name, cluster.worker_command_on("cuda:0", &name))?;
    }
    cluster.wait_attached(workers as usize, LIMIT)?;
    Ok(cluster)
}

#[test]
fn ranks_that_share_a_gpu_have_the_losses_of_one() -> Result<()> {
    if gpu_is_missing() {
        return Ok(());
    }
    let stage = Stage::new()?;
    let mut alone: Option<Vec<f64>> = None;
    for (workers, reduction) in [(1, "nccl"), (2, "nccl"), (3, "ordered"), (4, "nccl")] {
        let cluster = cluster(&stage, workers)?;
        let recipe = TinyRecipe {
            workers: (workers, workers),
            more: format!("reduction: {reduction}"),
            // A slow one: a feature that rounding moves over its kink must not be amplified step by step.
            lr: "3e-4",
            ..TinyRecipe::default()
        };
        let run = stage.submit(&cluster, &recipe)?;
        let end = cluster.wait_finished(&run, LIMIT)?;
        assert_eq!(end.tokens, recipe.tokens());
        cluster.audit(&run)?;
        let losses: Vec<f64> = cluster
            .metrics(&run)?
            .iter()
            .map(|step| step.loss)
            .collect();
        let first = alone.get_or_insert_with(|| losses.clone());
        for (step, (loss, single)) in losses.iter().zip(&*first).enumerate() {
            assert!(
                (loss - single).abs() < 1e-4 * single,
                "step {}: {loss} with {workers} ranks, {single} with one",
                step + 1
            );
        }
    }
    Ok(())
}

#[test]
fn survivors_of_a_killed_gpu_rank_go_on_within_seconds() -> Result<()> {
    if gpu_is_missing() {
        return Ok(());
    }
    let stage = Stage::new()?;
    let mut cluster = cluster(&stage, 3)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        workers: (2, 3),
        ..TinyRecipe::default()
    };
    let run = stage.submit(&cluster, &recipe)?;
    let before = cluster.wait(&run, "past a checkpoint", LIMIT, |status| status.step >= 20)?;
    assert_eq!(before.world, 3);

    let killed = Instant::now();
    cluster.remove_worker("w2")?;
    cluster.wait(&run, "training in another generation", LIMIT, |status| {
        status.world == 2 && status.generation > before.generation && status.step > before.step
    })?;
    let took = killed.elapsed();
    assert!(took < RECOVERY, "it took {took:?}\n{}", cluster.logs());
    for survivor in ["w0", "w1"] {
        let output = cluster.worker(survivor)?.output();
        assert!(!output.contains("the worker process ended"), "{output}");
    }
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.tokens, recipe.tokens());
    cluster.audit(&run)?;
    ledger::expect_exactly_once(&cluster.ledger(&run)?, recipe.samples())
}
