//! What a reader finds: whether every checkpoint that can be read is right, and the last good one still there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use supra_checkpoint::{PUBLISHED, Store, verify};
use supra_coordinator::machine::{Checkpoint, Run};

use super::phase::Eye;
use crate::failure::{Failure, Result, While};
use crate::weights::{self, Hashes};

/// The tensors of the checkpoints of a recipe, by step: those of the run that nobody disturbed, and of steps that it wrote no
/// checkpoint of, those that the first run had. All runs of it must come to the same bits.
#[derive(Default)]
pub(super) struct Truth(Mutex<BTreeMap<u64, Hashes>>);

impl Truth {
    /// Fails unless a checkpoint of a step has the right tensors.
    pub fn expect(&self, step: u64, directory: &Path) -> Result<()> {
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = known().get(&step).cloned();
        match expected {
            Some(expected) => weights::expect(&expected, directory),
            None => {
                let found = weights::hashes(directory)?;
                // Not one that lost a file meanwhile.
                if directory.join(PUBLISHED).exists() {
                    known().entry(step).or_insert(found);
                }
                Ok(())
            }
        }
    }
}

/// What is wrong, in words.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Findings {
    /// Checkpoints that a reader would take and that are not what was trained.
    pub wrong_reads: Vec<String>,
    /// Checkpoints that were called good, and are not there any more though nothing took their place.
    pub lost_good: Vec<String>,
}

impl Findings {
    pub fn add(&mut self, other: Findings) {
        self.wrong_reads.extend(other.wrong_reads);
        self.lost_good.extend(other.lost_good);
    }

    pub fn is_empty(&self) -> bool {
        self == &Findings::default()
    }
}

impl std::fmt::Display for Findings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for wrong in &self.wrong_reads {
            writeln!(f, "wrong, but can be read: {wrong}")?;
        }
        for lost in &self.lost_good {
            writeln!(f, "lost: {lost}")?;
        }
        Ok(())
    }
}

/// Whoever reads the checkpoints of a run.
pub(super) struct Witness<'a> {
    truth: &'a Truth,
    /// The newest one that the journal has called published so far.
    good: Option<Checkpoint>,
}

impl<'a> Witness<'a> {
    pub fn new(truth: &'a Truth) -> Self {
        Self { truth, good: None }
    }

    /// Reads everything that can be read, while it may be written on.
    pub fn examine(&mut self, eye: &Eye) -> Result<Findings> {
        let mut findings = Findings::default();
        for directory in readable(eye.root())? {
            let proved =
                prove(&directory, None).and_then(|step| self.truth.expect(step, &directory));
            // A retired one loses its manifest first.
            if let (Err(problem), true) = (proved, directory.join(PUBLISHED).exists()) {
                let place = directory.display();
                findings.wrong_reads.push(format!("{place}: {problem}"));
            }
        }
        let known = eye.journal()?;
        for checkpoint in published(&known) {
            let directory = eye.root().join(&checkpoint.path);
            let proved = prove(&directory, Some(&checkpoint.manifest_hash));
            if let Err(problem) = proved
                && published(&eye.journal()?).any(|still| still == checkpoint)
            {
                let (step, place) = (checkpoint.step, directory.display());
                let lost =
                    format!("{place}, which the journal calls published at step {step}: {problem}");
                findings.lost_good.push(lost);
            }
        }
        findings
            .lost_good
            .extend(self.remember(published(&known).last()));
        Ok(findings)
    }

    /// The newest good one may only give way to a newer one; else says what is lost.
    fn remember(&mut self, newest: Option<&Checkpoint>) -> Option<String> {
        let step = newest.map(|newest| newest.step);
        let good = self.good.as_ref().filter(|good| step < Some(good.step));
        let lost = good.map(|good| {
            let now = step.map_or("none is".to_owned(), |step| format!("step {step} is"));
            format!("{} was the newest published one, now {now}", good.path)
        });
        self.good = newest.cloned().or(self.good.take());
        lost
    }
}

fn published(run: &Run) -> impl Iterator<Item = &Checkpoint> {
    run.checkpoints.iter().filter(|known| known.published)
}

/// Directories with a manifest that readers trust.
fn readable(root: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(root) else {
        return Ok(Vec::new());
    };
    let mut directories = Vec::new();
    for entry in entries {
        let path = entry.while_doing(root.display())?.path();
        if path.join(PUBLISHED).exists() {
            directories.push(path);
        }
    }
    Ok(directories)
}

/// Proves every file of a checkpoint, as a reader does; with `hash`, that of the journal, the manifest too. Returns its step.
fn prove(directory: &Path, hash: Option<&[u8; 32]>) -> Result<u64> {
    let store = Store::open(&directory.to_string_lossy())?;
    let manifest = verify::manifest(&store, "", hash)?;
    for (name, stored) in &manifest.files {
        verify::file(&store, name, stored)?;
    }
    if manifest.files.is_empty() {
        return Err(Failure::new("it names no files"));
    }
    Ok(manifest.step)
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    use serde_json::json;
    use supra_checkpoint::manifest::FORMAT;

    use super::*;

    /// A checkpoint of one number.
    fn checkpoint(directory: &Path, step: u64, number: f32) {
        fs::create_dir_all(directory).unwrap();
        let bytes = number.to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
        let file = safetensors::serialize([("w", view)], None).unwrap();
        fs::write(directory.join("w.safetensors"), &file).unwrap();
        let slice = json!({ "file": "w.safetensors", "key": "w", "start": 0, "end": 1 });
        let blake3 = blake3::hash(&file).to_hex().to_string();
        let manifest = json!({
            "format": FORMAT, "plan_version": 1, "run": "r", "generation": 1, "world": 1, "step": step, "tokens": 1,
            "next_sample": 1, "updates": 1, "seeds": { "init": 1, "data": 1 }, "replica_hash": "", "recipe": "",
            "dataset": "", "tokenizer": "",
            "environment": { "build": "", "libtorch": "", "device": "", "model": "", "threads": 1 },
            "tensors": { "w": { "shape": [1], "dtype": "F32", "slices": [slice] } },
            "files": { "w.safetensors": { "bytes": file.len(), "blake3": blake3 } },
        });
        fs::write(directory.join(PUBLISHED), manifest.to_string()).unwrap();
    }

    #[test]
    fn a_file_that_is_not_what_the_manifest_says_is_found() {
        let folder = tempfile::tempdir().unwrap();
        checkpoint(folder.path(), 8, 1.0);
        assert_eq!(prove(folder.path(), None).unwrap(), 8);
        prove(folder.path(), Some(&[7; 32])).expect_err("another manifest");
        let file = folder.path().join("w.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        prove(folder.path(), None).expect_err("another bit");
        fs::write(&file, &bytes[1..]).unwrap();
        prove(folder.path(), None).expect_err("a byte less");
        fs::remove_file(&file).unwrap();
        prove(folder.path(), None).expect_err("a file less");
    }

    #[test]
    fn whole_files_of_another_state_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let truth = Truth::default();
        let holds = |name: &str, step, number| {
            let directory = folder.path().join(name);
            checkpoint(&directory, step, number);
            let step = prove(&directory, None).unwrap();
            truth.expect(step, &directory)
        };
        holds("undisturbed", 8, 1.0).unwrap();
        holds("the same", 8, 1.0).unwrap();
        holds("a step later", 9, 2.0).unwrap();
        holds("of the step after", 8, 2.0).expect_err("other bits");
    }

    #[test]
    fn the_last_good_one_gives_way_to_newer_ones_only() {
        let of_step = |step: u64| -> Checkpoint {
            let known = json!({
                "step": step, "tokens": 1, "generation": 1, "path": format!("step-{step}"), "bytes": 1,
                "manifest_hash": "00".repeat(32), "published": true,
            });
            serde_json::from_value(known).unwrap()
        };
        let truth = Truth::default();
        let mut witness = Witness::new(&truth);
        for step in [None, Some(2), Some(2), Some(6)] {
            assert_eq!(witness.remember(step.map(of_step).as_ref()), None);
        }
        let lost = witness.remember(Some(&of_step(4))).unwrap();
        assert!(lost.contains("step-6") && lost.contains("step 4"), "{lost}");
        assert!(witness.remember(None).is_some());
    }
}
