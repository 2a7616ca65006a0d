//! Published checkpoints of a run, as journal or coordinator name them, and whether their files are what was written.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use supra_proto::v1;

use super::format;
use crate::ledger::Hash;
use crate::machine::Run;

/// The name of a published manifest in its directory.
pub const MANIFEST: &str = "manifest.json";

/// A published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub step: u64,
    /// Its directory.
    pub path: PathBuf,
    pub manifest_hash: Hash,
}

/// Those that the journal names, oldest first.
pub fn of_run(run: &Run) -> Vec<Checkpoint> {
    let published = run.checkpoints.iter().filter(|known| known.published);
    published
        .map(|known| Checkpoint {
            step: known.step,
            path: run.checkpoint_root.join(&known.path),
            manifest_hash: known.manifest_hash,
        })
        .collect()
}

/// Those among the ones that a coordinator names, oldest first.
pub fn of_answer(named: Vec<v1::Checkpoint>) -> Vec<Checkpoint> {
    let published = named.into_iter().filter(|known| known.published);
    published
        .filter_map(|known| {
            Some(Checkpoint {
                step: known.step,
                path: known.path.into(),
                manifest_hash: known.manifest_hash.try_into().ok()?,
            })
        })
        .collect()
}

/// How closely files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// The manifest's hash, and the length of every other file.
    Quick,
    /// The hash of every file: reads them all.
    Thorough,
}

/// The part of a manifest that says what the other files are.
#[derive(Deserialize)]
struct Manifest {
    files: BTreeMap<String, Stored>,
}

#[derive(Deserialize)]
struct Stored {
    bytes: u64,
    blake3: String,
}

/// What is wrong with a checkpoint on this machine, file by file, and how many files are right. Nothing is wrong with one that is
/// not here at all: it may be on another machine, or be retired meanwhile.
pub fn examine(checkpoint: &Checkpoint, care: Care) -> (Vec<String>, u64) {
    let path = checkpoint.path.join(MANIFEST);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !checkpoint.path.exists() => {
            return (Vec::new(), 0);
        }
        Err(error) => {
            return (
                vec![format!("{} cannot be read: {error}", path.display())],
                0,
            );
        }
        Ok(bytes) => bytes,
    };
    let found = *blake3::hash(&bytes).as_bytes();
    if found != checkpoint.manifest_hash {
        let problem = format!(
            "{} was altered: its BLAKE3 is {}, journalled for step {} was {}",
            path.display(),
            format::hex(&found),
            checkpoint.step,
            format::hex(&checkpoint.manifest_hash)
        );
        return (vec![problem], 0);
    }
    let manifest: Manifest = match serde_json::from_slice(&bytes) {
        Ok(manifest) => manifest,
        Err(error) => return (vec![format!("{} says: {error}", path.display())], 0),
    };
    let (mut problems, mut right) = (Vec::new(), 1);
    for (name, stored) in &manifest.files {
        match file(&checkpoint.path.join(name), stored, care) {
            Ok(()) => right += 1,
            Err(problem) => problems.push(problem),
        }
    }
    (problems, right)
}

fn file(path: &Path, stored: &Stored, care: Care) -> Result<(), String> {
    let shown = path.display();
    let unreadable = |error: io::Error| format!("{shown} cannot be read: {error}");
    let file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    if bytes != stored.bytes {
        return Err(format!(
            "{shown} has {bytes} bytes, {} were written",
            stored.bytes
        ));
    }
    if care == Care::Quick {
        return Ok(());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(unreadable)?;
    let found = hasher.finalize().to_hex();
    if found.as_str() != stored.blake3 {
        return Err(format!(
            "{shown} was altered: its BLAKE3 is {found}, it was written as {}",
            stored.blake3
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(root: &Path) -> Checkpoint {
        let path = root.join("step-8");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("model"), "weights").unwrap();
        let blake3 = blake3::hash(b"weights").to_hex().to_string();
        let manifest =
            serde_json::json!({ "files": { "model": { "bytes": 7, "blake3": blake3 } } });
        fs::write(path.join(MANIFEST), manifest.to_string()).unwrap();
        Checkpoint {
            step: 8,
            path,
            manifest_hash: *blake3::hash(manifest.to_string().as_bytes()).as_bytes(),
        }
    }

    #[test]
    fn whole_files_are_counted_and_one_that_is_elsewhere_is_not_missed() {
        let root = tempfile::tempdir().unwrap();
        let mut checkpoint = checkpoint(root.path());
        for care in [Care::Quick, Care::Thorough] {
            assert_eq!(examine(&checkpoint, care), (vec![], 2));
        }
        checkpoint.path = root.path().join("elsewhere");
        assert_eq!(examine(&checkpoint, Care::Thorough), (vec![], 0));
    }

    #[test]
    fn an_altered_cut_or_lost_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(root.path());
        let model = checkpoint.path.join("model");
        let has = |care, word: &str| {
            let (problems, _) = examine(&checkpoint, care);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains("model"), "{problems:?}");
            assert!(problems[0].contains(word), "{problems:?}");
        };
        fs::write(&model, "weighty").unwrap();
        assert_eq!(examine(&checkpoint, Care::Quick), (vec![], 2));
        has(Care::Thorough, "was altered");
        fs::write(&model, "weigh").unwrap();
        has(Care::Quick, "has 5 bytes, 7 were written");
        fs::remove_file(&model).unwrap();
        has(Care::Quick, "cannot be read");
    }

    #[test]
    fn an_altered_manifest_is_named_whatever_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(root.path());
        let manifest = checkpoint.path.join(MANIFEST);
        for text in ["{}", "garbage"] {
            fs::write(&manifest, text).unwrap();
            let (problems, right) = examine(&checkpoint, Care::Quick);
            assert_eq!(right, 0);
            assert!(
                problems[0].contains("manifest.json was altered"),
                "{problems:?}"
            );
        }
    }
}
