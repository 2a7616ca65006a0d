//! Ranks on a GPU, which they share: correct over NCCL, and as hard to stop as on CPUs. Without a GPU the tests say
//! "skipped" and pass.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use supra_tests::{Cluster, Failure, Result, TinyRecipe, ledger, weights};

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
    let alone = losses(&stage, &cluster(&stage, 1)?, 1, "nccl", "none")?;
    for (workers, reduction) in [(2, "nccl"), (3, "ordered"), (4, "nccl")] {
        let cluster = cluster(&stage, workers)?;
        let [whole, parts] = ["none", "zero1"]
            .map(|sharding| losses(&stage, &cluster, workers, reduction, sharding));
        let (whole, parts) = (whole?, parts?);
        expect_near(&whole, &alone, workers);
        expect_near(&parts, &alone, workers);
        if reduction == "ordered" {
            assert_eq!(whole, parts, "the order of additions is the same");
        }
    }
    Ok(())
}

#[test]
fn ranks_on_gpus_of_their_own_have_the_losses_of_one() -> Result<()> {
    if gpu_is_missing() {
        return Ok(());
    }
    if !Path::new("/dev/nvidia1").exists() {
        println!("skipped: this machine has one GPU");
        return Ok(());
    }
    let stage = Stage::new()?;
    let alone = losses(&stage, &cluster(&stage, 1)?, 1, "nccl", "none")?;
    let mut cluster = Cluster::start(&stage.programs, &stage.directory.path().join("two"))?;
    for worker in 0..2 {
        let name = format!("w{worker}");
        let mut command = cluster.worker_command_on(&format!("cuda:{worker}"), &name);
        command.env_remove("NCCL_HOSTID");
        cluster.adopt_worker(&name, command)?;
    }
    cluster.wait_attached(2, LIMIT)?;
    for (reduction, sharding) in [
        ("nccl", "none"),
        ("nccl", "zero1"),
        ("ordered", "none"),
        ("ordered", "zero1"),
    ] {
        expect_near(
            &losses(&stage, &cluster, 2, reduction, sharding)?,
            &alone,
            2,
        );
    }
    Ok(())
}

/// The losses of a run on all workers of a cluster.
fn losses(
    stage: &Stage,
    cluster: &Cluster,
    workers: u32,
    reduction: &str,
    sharding: &'static str,
) -> Result<Vec<f64>> {
    let recipe = TinyRecipe {
        workers: (workers, workers),
        more: format!("reduction: {reduction}"),
        sharding,
        // A slow one: a feature that rounding moves over its kink must not be amplified step by step.
        lr: "3e-4",
        ..TinyRecipe::default()
    };
    let run = stage.submit(cluster, &recipe)?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.tokens, recipe.tokens());
    cluster.audit(&run)?;
    let metrics = cluster.metrics(&run)?;
    if workers > 1 {
        for step in &metrics {
            let exposed = step.exposed_comm_ms;
            assert!(exposed > 0.0 && exposed < step.seconds * 1e3, "{step:?}");
        }
    }
    Ok(metrics.iter().map(|step| step.loss).collect())
}

fn expect_near(losses: &[f64], alone: &[f64], workers: u32) {
    assert_eq!(losses.len(), alone.len());
    for (step, (loss, single)) in losses.iter().zip(alone).enumerate() {
        assert!(
            (loss - single).abs() < 1e-4 * single,
            "step {}: {loss} with {workers} ranks, {single} with one",
            step + 1
        );
    }
}

#[test]
fn survivors_of_a_killed_gpu_rank_go_on_within_seconds() -> Result<()> {
    if gpu_is_missing() {
        return Ok(());
    }
    survive("none")?;
    survive("zero1")
}

fn survive(sharding: &'static str) -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = cluster(&stage, 3)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        workers: (2, 3),
        sharding,
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

/// What is written then is in pinned memory of the process that dies, and its copy may still be under way.
#[test]
fn a_gpu_rank_killed_while_a_checkpoint_is_written_changes_no_bit() -> Result<()> {
    if gpu_is_missing() {
        return Ok(());
    }
    kill_while_writing("none")?;
    kill_while_writing("zero1")
}

fn kill_while_writing(sharding: &'static str) -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = cluster(&stage, 2)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        workers: (2, 2),
        sharding,
        more: "reduction: ordered".to_owned(),
        ..TinyRecipe::default()
    };
    let quiet = stage.submit(&cluster, &recipe)?;
    cluster.wait_finished(&quiet, LIMIT)?;

    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait(&run, "past a checkpoint", LIMIT, |status| {
        status.checkpoint.as_ref().is_some_and(|it| it.published)
    })?;
    let newest = cluster.last_checkpoint(&run)?;
    let root = newest
        .parent()
        .ok_or_else(|| Failure::new("a checkpoint without a root"))?;
    let mut known = BTreeSet::new();
    let mut met = 0;
    for victim in ["w1", "w0", "w1"] {
        let half = wait_unpublished(root, &known)?;
        cluster.worker(victim)?.kill_children()?;
        met += u32::from(!half.join("manifest.json").exists());
        known.insert(half);
        let dead = cluster.status(&run)?;
        cluster.wait(&run, "training again", LIMIT, |status| {
            status.generation > dead.generation && status.step > dead.step
        })?;
    }
    assert!(met > 0, "no kill met a checkpoint that was half written");
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.tokens, recipe.tokens());
    cluster.audit(&run)?;
    ledger::expect_exactly_once(&cluster.ledger(&run)?, recipe.samples())?;
    cluster
        .supra(&["checkpoints", &run, "--verify"])?
        .expect_code(0)?;
    weights::expect_same(
        &cluster.last_checkpoint(&quiet)?,
        &cluster.last_checkpoint(&run)?,
    )
}

/// The first folder of a checkpoint that has no manifest yet, and is not known to have been left so.
fn wait_unpublished(root: &Path, known: &BTreeSet<PathBuf>) -> Result<PathBuf> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let folders = fs::read_dir(root)
            .map_err(|error| Failure::new(format!("cannot list {}: {error}", root.display())))?;
        let half = folders.flatten().map(|entry| entry.path()).find(|folder| {
            folder.is_dir() && !known.contains(folder) && !folder.join("manifest.json").exists()
        });
        if let Some(half) = half {
            return Ok(half);
        }
        thread::sleep(Duration::from_millis(1));
    }
    Err(Failure::new("no checkpoint was begun"))
}
