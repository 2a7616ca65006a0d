//! From which checkpoint a step is run again.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use supra_checkpoint::{PUBLISHED, Store};

use crate::cli::checkpoints::Checkpoint;
use crate::cli::failure::{Exit, Failure};
use crate::cli::format;
use crate::ledger::Hash;

/// What the user asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// The newest one before the step.
    Newest,
    /// That of this step.
    Step(u64),
    /// The one in this directory or at this URL: kept aside, or moved.
    Directory(PathBuf),
}

/// What stands for [`Start::Newest`]; a directory of this name is `./newest`.
pub const NEWEST: &str = "newest";

impl FromStr for Start {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Start, Self::Err> {
        Ok(match text.parse() {
            Ok(step) => Start::Step(step),
            Err(_) if text == NEWEST => Start::Newest,
            Err(_) => Start::Directory(text.into()),
        })
    }
}

/// The checkpoint from which `step` of a run can be run again. `kept` are those that the run has, oldest first, `durable` the
/// steps and hashes of all that the ledger names.
///
/// # Errors
/// Bad input when there is none, with the steps of those that there are; broken when the one in a directory is not one that
/// the ledger names.
pub fn choose(
    start: &Start,
    step: u64,
    run: &str,
    kept: &[Checkpoint],
    durable: &[(u64, Hash)],
) -> Result<Checkpoint, Failure> {
    let chosen = match start {
        Start::Directory(path) => return read(path, step, run, durable),
        Start::Newest => kept.iter().rfind(|known| known.step < step),
        Start::Step(wanted) => kept
            .iter()
            .rfind(|known| known.step == *wanted && *wanted < step),
    };
    let Some(chosen) = chosen else {
        let wanted = match start {
            Start::Step(wanted) if *wanted < step => {
                format!("of step {}", format::grouped(*wanted))
            }
            _ => format!("before step {}", format::grouped(step)),
        };
        return Err(Failure::input(format!(
            "run {run} has no checkpoint {wanted} to run the step from: {}. One that was kept elsewhere is named with \
             --rerun=DIR.",
            there_are(kept)
        )));
    };
    let store = Store::open(&chosen.path.display().to_string());
    if store.is_ok_and(|store| store.is_local()) && !chosen.path.is_dir() {
        return Err(Failure::input(format!(
            "the checkpoint of step {} is not on this machine: there is no directory {}. Run this where it is, or name it \
             with --rerun=DIR.",
            format::grouped(chosen.step),
            chosen.path.display()
        )));
    }
    Ok(chosen.clone())
}

fn there_are(kept: &[Checkpoint]) -> String {
    let steps: Vec<String> = kept
        .iter()
        .map(|known| format::grouped(known.step))
        .collect();
    match steps.as_slice() {
        [] => "it has none yet".to_owned(),
        [only] => format!("there is one, of step {only}"),
        all => format!("there are those of steps {}", all.join(", ")),
    }
}

/// The part of a checkpoint's `manifest.json` that says which one it is.
#[derive(Deserialize)]
struct Manifest {
    run: String,
    step: u64,
}

fn read(path: &Path, step: u64, run: &str, durable: &[(u64, Hash)]) -> Result<Checkpoint, Failure> {
    let file = path.join(PUBLISHED);
    let store = Store::open(&path.display().to_string());
    let bytes = store.and_then(|store| store.read_if_there(PUBLISHED));
    let bytes = bytes.map_err(|error| Failure::input(error.to_string()))?;
    let bytes = bytes.ok_or_else(|| {
        Failure::input(format!(
            "there is no {}. Name the directory or URL of one checkpoint.",
            file.display()
        ))
    })?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| Failure::Told {
        exit: Exit::Broken,
        message: format!(
            "{} is not a checkpoint's manifest: {error}.",
            file.display()
        ),
    })?;
    if manifest.run != run || manifest.step >= step {
        return Err(Failure::input(format!(
            "{} is of run {} and step {}: a checkpoint of run {run} before step {step} is needed.",
            file.display(),
            manifest.run,
            manifest.step
        )));
    }
    let manifest_hash = *blake3::hash(&bytes).as_bytes();
    if !durable.contains(&(manifest.step, manifest_hash)) {
        return Err(Failure::Told {
            exit: Exit::Broken,
            message: format!(
                "{} is not a checkpoint that the ledger of run {run} names: its BLAKE3 is {}.",
                file.display(),
                format::hex(&manifest_hash)
            ),
        });
    }
    Ok(Checkpoint {
        step: manifest.step,
        path: path.to_owned(),
        manifest_hash,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn kept(root: &Path, steps: &[u64]) -> Vec<Checkpoint> {
        steps
            .iter()
            .map(|&step| Checkpoint {
                step,
                path: root.to_owned(),
                manifest_hash: [step as u8; 32],
            })
            .collect()
    }

    #[test]
    fn the_newest_before_the_step_is_taken_unless_another_is_named() {
        let root = tempfile::tempdir().unwrap();
        let kept = kept(root.path(), &[8, 16, 24]);
        let chosen = |start, step| choose(&start, step, "r", &kept, &[]).unwrap().step;
        assert_eq!(chosen(Start::Newest, 17), 16);
        assert_eq!(chosen(Start::Newest, 16), 8);
        assert_eq!(chosen(Start::Step(8), 17), 8);
    }

    #[test]
    fn a_step_before_every_checkpoint_is_told_which_there_are() {
        let root = tempfile::tempdir().unwrap();
        let all = kept(root.path(), &[8, 1600]);
        for start in [Start::Newest, Start::Step(8), Start::Step(1600)] {
            let error = choose(&start, 8, "r", &all, &[]).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("before step 8"), "{text}");
            assert!(text.contains("steps 8, 1,600"), "{text}");
            assert!(matches!(
                error,
                Failure::Told {
                    exit: Exit::Input,
                    ..
                }
            ));
        }
        let error = choose(&Start::Newest, 8, "r", &[], &[]).unwrap_err();
        assert!(error.to_string().contains("none yet"), "{error}");
        let error = choose(&Start::Step(9), 20, "r", &all, &[]).unwrap_err();
        assert!(error.to_string().contains("of step 9"), "{error}");
    }

    #[test]
    fn a_directory_has_to_hold_what_the_ledger_names() {
        let root = tempfile::tempdir().unwrap();
        let bytes = r#"{ "run": "r", "step": 8 }"#;
        fs::write(root.path().join("manifest.json"), bytes).unwrap();
        let hash = *blake3::hash(bytes.as_bytes()).as_bytes();
        let start: Start = root.path().to_str().unwrap().parse().unwrap();
        let choose = |step, run, durable: &[_]| choose(&start, step, run, &[], durable);
        assert_eq!(choose(9, "r", &[(8, hash)]).unwrap().manifest_hash, hash);
        for (step, run, durable, words) in [
            (8, "r", hash, "before step 8"),
            (9, "other", hash, "of run r"),
            (9, "r", [7; 32], "not a checkpoint that the ledger"),
        ] {
            let error = choose(step, run, &[(8, durable)]).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }
}
