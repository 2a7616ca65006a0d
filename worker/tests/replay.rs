//! `supra-worker replay`: steps of a run again, from one of its checkpoints.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use supra_agent::{Outcome, StepReport};

use crate::{
    cli::worker,
    fixture::{BUILD, Generation, Rank, World},
};

/// Runs the program on the checkpoint in `dir` up to `step`.
fn replay(dir: &Path, step: &str, more: &[&str]) -> (i32, String, String) {
    let dir = dir.display().to_string();
    let arguments = ["replay", "--checkpoint", &dir, "--step", step];
    worker(&[&arguments, more].concat())
}

fn answer(dir: &Path, step: &str, more: &[&str]) -> Value {
    let (code, out, err) = replay(dir, step, &[more, &["--json"]].concat());
    assert_eq!(code, 0, "{err}");
    serde_json::from_str(&out).unwrap()
}

/// Trains four steps with checkpoints behind the second and the last one.
fn trained(world: &World, name: &str, ranks: u32) -> (Rank, PathBuf) {
    let root = world.checkpoints(name);
    let rank = Generation::new(&world.recipe(""), &root)
        .run(ranks)
        .remove(0);
    assert_eq!(rank.outcome, Outcome::Finished);
    let dir = root.join(&rank.checkpoints[0].path);
    (rank, dir)
}

fn bits(number: &Value) -> u64 {
    u64::from_str_radix(number["bits"].as_str().unwrap(), 16).unwrap()
}

fn value(number: &Value) -> f64 {
    number["value"].as_f64().unwrap()
}

/// Everything below a directory, with its bytes.
fn files(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.clone(), fs::read(path).unwrap()));
        }
    }
    found.sort();
    found
}

#[test]
fn steps_come_to_the_same_bits_again_and_nothing_is_written() {
    let world = World::new(120);
    let (rank, dir) = trained(&world, "a", 1);
    let root = world.dir.path();
    let before = files(root);
    let answer = answer(&dir, "4", &[]);
    assert!(files(root) == before, "something was written");

    let steps = answer["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 2);
    for (again, first) in steps.iter().zip(&rank.steps[2..]) {
        let loss = first.loss_sum / first.targets as f64;
        assert_eq!(again["step"], first.step);
        assert_eq!(again["digest"], hex(&first.step_digest));
        assert_eq!(bits(&again["loss"]), loss.to_bits());
        assert_eq!(bits(&again["grad_norm"]), first.grad_norm.to_bits());
        assert_eq!(bits(&again["learning_rate"]), first.learning_rate.to_bits());
    }
    // The tests' ranks have another name of the build than the program; the threads are taken from the checkpoint.
    let differences = answer["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 1, "{differences:?}");
    let expected = format!("build {BUILD} -> ");
    assert!(differences[0].as_str().unwrap().starts_with(&expected));
}

#[test]
fn the_micro_batches_of_the_last_step_make_up_its_loss() {
    let world = World::new(120);
    let (rank, dir) = trained(&world, "a", 1);
    let sum = |micro: &[Value]| -> (u64, u64, f64) {
        let of = |micro: &Value, name: &str| micro[name].as_u64().unwrap();
        let loss = |micro: &Value| micro["loss"].as_f64().unwrap() * of(micro, "targets") as f64;
        (
            micro.iter().map(|it| of(it, "samples")).sum(),
            micro.iter().map(|it| of(it, "targets")).sum(),
            micro.iter().map(loss).sum(),
        )
    };
    for (step, firsts) in [("3", vec![12, 14, 16]), ("4", vec![18])] {
        let answer = answer(&dir, step, &[]);
        let micro = answer["micro_batches"].as_array().unwrap();
        let found: Vec<_> = micro
            .iter()
            .map(|micro| micro["first_sample"].as_u64().unwrap())
            .collect();
        assert_eq!(found, firsts);
        let number: usize = step.parse().unwrap();
        let report: &StepReport = &rank.steps[number - 1];
        let (samples, targets, loss) = sum(micro);
        assert_eq!((samples, targets), (report.samples, report.targets));
        assert!((loss / report.loss_sum - 1.0).abs() < 1e-12, "{loss}");
    }
}

#[test]
fn what_two_workers_trained_is_close_and_the_difference_named() {
    let world = World::new(120);
    let (rank, dir) = trained(&world, "a", 2);
    let answer = answer(&dir, "4", &[]);
    let again = &answer["steps"][1];
    let loss = rank.steps[3].loss_sum / rank.steps[3].targets as f64;
    assert!((value(&again["loss"]) / loss - 1.0).abs() < 1e-5);
    assert_eq!(again["digest"], hex(&rank.steps[3].step_digest));
    let differences = answer["differences"].to_string();
    assert!(differences.contains("workers 2 -> 1"), "{differences}");
}

#[test]
fn data_that_moved_is_named() {
    let world = World::new(120);
    let (_, dir) = trained(&world, "a", 1);
    let moved = world.dir.path().join("moved");
    fs::rename(world.data(), &moved).unwrap();
    let (code, _, err) = replay(&dir, "3", &[]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains(&world.data().display().to_string()), "{err}");
    let moved = moved.display().to_string();
    answer(&dir, "3", &["--data", &moved]);
}

#[test]
fn a_damaged_checkpoint_ends_with_four_and_the_file() {
    let world = World::new(120);
    let (_, dir) = trained(&world, "a", 1);
    let other = blake3::hash(b"other").to_hex().to_string();
    let (code, _, err) = replay(&dir, "3", &["--manifest-hash", &other]);
    assert_eq!(code, 4, "{err}");
    assert!(err.contains("manifest.json"), "{err}");

    let weights = dir.join("optimizer-rank-000-of-001-00001.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let (code, out, err) = replay(&dir, "3", &[]);
    assert_eq!(code, 4, "{err}");
    assert!(
        out.is_empty() && err.contains("optimizer-rank-000-of-001-00001.safetensors"),
        "{err}"
    );
}

#[test]
fn a_step_that_cannot_be_run_from_there_is_bad_input() {
    let world = World::new(120);
    let (_, dir) = trained(&world, "a", 1);
    for (step, words) in [
        ("2", "the state behind step 2"),
        ("1", "earlier checkpoint"),
        ("5", "steps 1 to 4"),
    ] {
        let (code, out, err) = replay(&dir, step, &[]);
        assert_eq!(code, 2, "{err}");
        assert!(out.is_empty() && err.contains(words), "{err}");
    }
}

#[test]
fn people_get_a_line_for_every_step() {
    let world = World::new(120);
    let (_, dir) = trained(&world, "a", 1);
    let (code, out, err) = replay(&dir, "4", &[]);
    assert_eq!(code, 0, "{err}");
    for words in ["step 3: loss ", "step 4: loss ", "samples 18 to 19: loss "] {
        assert!(out.contains(words), "{out}");
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
