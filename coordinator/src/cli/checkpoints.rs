//! Published checkpoints of a run, as journal or coordinator name them, and whether their files are what was written.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use supra_checkpoint::manifest::StoredFile;
use supra_checkpoint::{PUBLISHED, Store, StoredError, verify};
use supra_proto::v1;

use super::format;
use crate::ledger::Hash;
use crate::machine::Run;

/// A published checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub step: u64,
    /// Its directory, or its URL.
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
    files: BTreeMap<String, StoredFile>,
}

/// What is wrong with a checkpoint, file by file, and how many files are right. Nothing is wrong with one that is not there at
/// all: its folder may be on another machine, or it is retired meanwhile.
pub fn examine(checkpoint: &Checkpoint, care: Care) -> (Vec<String>, u64) {
    let place = checkpoint.path.display().to_string();
    let read = Store::open(&place).and_then(|store| {
        let manifest = store.read_if_there(PUBLISHED)?;
        let empty = manifest.is_none() && store.list("")?.is_empty();
        Ok((store, manifest, empty))
    });
    let (store, bytes) = match read {
        Err(error) => return (vec![error.to_string()], 0),
        Ok((_, None, true)) => return (Vec::new(), 0),
        Ok((store, None, false)) => {
            let path = store.at(PUBLISHED);
            return (vec![format!("{} is missing", path.display())], 0);
        }
        Ok((store, Some(bytes), _)) => (store, bytes),
    };
    let path = store.at(PUBLISHED);
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
        match file(&store, name, stored, care) {
            Ok(()) => right += 1,
            Err(problem) => problems.push(problem),
        }
    }
    (problems, right)
}

fn file(store: &Store, name: &str, stored: &StoredFile, care: Care) -> Result<(), String> {
    let looked = match care {
        Care::Thorough => verify::file(store, name, stored),
        Care::Quick => store
            .size(name)
            .and_then(|bytes| verify::size(&store.at(name), stored, bytes)),
    };
    looked.map_err(|error| match error {
        StoredError::Damaged { path, problem } => {
            format!("{} was altered: {problem}", path.display())
        }
        error => error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn checkpoint(root: &Path) -> Checkpoint {
        let path = root.join("step-8");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("model"), "weights").unwrap();
        let blake3 = blake3::hash(b"weights").to_hex().to_string();
        let manifest =
            serde_json::json!({ "files": { "model": { "bytes": 7, "blake3": blake3 } } });
        fs::write(path.join(PUBLISHED), manifest.to_string()).unwrap();
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
        has(Care::Thorough, "was altered: its BLAKE3 is");
        fs::write(&model, "weigh").unwrap();
        has(Care::Quick, "has 5 bytes, 7 were written");
        fs::remove_file(&model).unwrap();
        has(Care::Quick, "the file is missing");
    }

    #[test]
    fn an_altered_manifest_is_named_whatever_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint(root.path());
        let manifest = checkpoint.path.join(PUBLISHED);
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
