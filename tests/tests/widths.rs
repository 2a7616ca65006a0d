//! Killed and resumed at the widths of a 7B model on a GPU, and at small ones on the processor: the same bits as if
//! nothing had happened. Checkpoints lie below the directory for temporary files (`TMPDIR`): two of 26 GB on a GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use supra_tests::models::{Shape, Text, quickstart};
use supra_tests::{Cluster, Device, Programs, Result, ledger, weights};

use crate::gpu::gpu_is_missing;

/// For loading, training and writing 2.1 B parameters, each of which takes seconds.
const LIMIT: Duration = Duration::from_secs(300);
const STEPS: u64 = 7;
/// Steps from one checkpoint to the next: the last step has another.
const EVERY: u64 = 4;

/// A model, and how it is trained.
struct Sizes {
    device: Device,
    shape: Shape,
    /// Samples of a step.
    samples: u64,
    length: u64,
}

#[test]
fn a_killed_run_at_7b_widths_ends_with_the_same_bits() -> Result<()> {
    if gpu_is_missing() {
        return Ok(());
    }
    kill_and_compare(&Sizes {
        device: Device::Cuda,
        shape: Shape {
            vocab: 32000,
            dim: 4096,
            layers: 8,
            heads: 32,
            kv_heads: 8,
            ffn: 14336,
        },
        samples: 16,
        length: 2048,
    })
}

#[test]
fn a_killed_run_in_bf16_ends_with_the_same_bits() -> Result<()> {
    kill_and_compare(&Sizes {
        device: Device::Cpu,
        shape: Shape::TINY,
        samples: 64,
        length: 128,
    })
}

fn kill_and_compare(sizes: &Sizes) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let directory = directory.path();
    let programs = Programs::find()?;
    let text = Text::tokenize(&programs, &quickstart("text"), directory)?;
    let recipe = sizes.recipe(&text, directory)?;
    let start = |name| Cluster::on(sizes.device, &programs, &directory.join(name), 1);

    let quiet = start("quiet")?;
    let run = quiet.submit(&recipe)?;
    quiet.wait_finished(&run, LIMIT)?;
    let expected = weights::hashes(&quiet.last_checkpoint(&run)?)?;
    let state = quiet.state();
    drop(quiet);
    // There is room for two checkpoints, and the other run needs both.
    fs::remove_dir_all(state)?;

    let mut killed = start("killed")?;
    let run = killed.submit(&recipe)?;
    let before = killed.wait(&run, "past a checkpoint", LIMIT, |status| {
        let kept = status.checkpoint.as_ref();
        kept.is_some_and(|checkpoint| checkpoint.published)
    })?;
    killed.remove_worker("w0")?;
    assert!(before.step < STEPS, "killed too late: {before:?}");
    killed.start_worker_on(sizes.device, 0, 1)?;
    let end = killed.wait_finished(&run, LIMIT)?;
    assert!(end.generation > before.generation, "{end:?}");
    killed.audit(&run)?;
    ledger::expect_exactly_once(&killed.ledger(&run)?, STEPS * sizes.samples)?;
    weights::expect(&expected, &killed.last_checkpoint(&run)?)
}

impl Sizes {
    fn recipe(&self, text: &Text, directory: &Path) -> Result<PathBuf> {
        let shape = directory.join("shape");
        self.shape.write(&shape)?;
        let batch = self.samples * self.length;
        let recipe = format!(
            "name: widths\n\
             base: {{ path: {shape}, weights: random }}\n\
             data: {{ train: {data} }}\n\
             budget: {{ tokens: {budget} }}\n\
             batch: {{ tokens: {batch}, micro_batch: 2, sequence_length: {length} }}\n\
             optimizer: {{ warmup: 2 steps }}\n\
             checkpoint: {{ every_tokens: {every}, keep: 1 }}\n\
             workers: {{ min: 1, max: 1 }}\n",
            shape = shape.display(),
            data = text.train.display(),
            budget = STEPS * batch,
            length = self.length,
            every = EVERY * batch,
        );
        let path = directory.join("widths.yaml");
        fs::write(&path, recipe)?;
        Ok(path)
    }
}
