//! Everything that is wrong with a published checkpoint, not only the first of it: for audits, and for whoever may only delete an
//! older one when this one is whole.

use std::io;

use crate::{PUBLISHED, Store, StoredError, manifest::StoredFile, store::join, verify};

/// How closely files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// The manifest's hash, and the length of every other file.
    Quick,
    /// The hash of every file: reads them all.
    Thorough,
}

/// What an examination found.
#[derive(Debug, Default)]
pub struct Findings {
    /// What is wrong, file by file.
    pub problems: Vec<StoredError>,
    /// Files that are what was written, the manifest among them.
    pub right: u64,
}

/// Whoever was told of what is read wanted no more of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

impl Findings {
    /// What proves that the checkpoint is damaged, in one line; none when it is whole, or could not be read.
    pub fn damage(&self) -> Option<String> {
        let proof = |error: &&StoredError| matches!(error, StoredError::Damaged { .. });
        let mut proofs = self.problems.iter().filter(proof);
        let first = proofs.next()?.finding();
        Some(match proofs.count() {
            0 => first,
            more => format!("{first}; and {more} more files"),
        })
    }
}

impl StoredError {
    /// What was found where, in one line, without a remedy.
    pub fn finding(&self) -> String {
        match self {
            StoredError::Damaged { path, problem } => format!("{}: {problem}", path.display()),
            StoredError::Io { path, source, .. } => {
                format!("{}: it cannot be read: {source}", path.display())
            }
            other => other.to_string(),
        }
    }
}

/// Looks at the manifest of the checkpoint that `store` is, whose BLAKE3 has to be `manifest_hash`, and at every file that it
/// names. None when nothing is there: it may be on another machine, or deleted meanwhile.
///
/// # Errors
/// `read` is told of the bytes that are read as they are, and said no.
pub fn published(
    store: &Store,
    manifest_hash: &[u8; 32],
    care: Care,
    read: &mut dyn FnMut(u64) -> bool,
) -> Result<Option<Findings>, Stopped> {
    let mut findings = Findings::default();
    let manifest = match store.list("") {
        Ok(names) if names.is_empty() => return Ok(None),
        Ok(_) => verify::manifest(store, "", Some(manifest_hash)),
        Err(error) => Err(error),
    };
    let manifest = match manifest {
        Ok(manifest) => manifest,
        Err(error) => {
            findings.problems.push(error);
            return Ok(Some(findings));
        }
    };
    findings.right = 1;
    for (name, stored) in &manifest.files {
        match file(store, name, stored, care, read)? {
            Ok(()) => findings.right += 1,
            Err(error) => findings.problems.push(error),
        }
    }
    Ok(Some(findings))
}

/// Whether any published checkpoint is to be seen in `root`. Where none is, storage is more likely to be missing than damaged.
pub fn any_published(root: &Store) -> bool {
    let published = |name: &String| root.exists(&join(name, PUBLISHED)).unwrap_or(false);
    root.list("").is_ok_and(|names| names.iter().any(published))
}

fn file(
    store: &Store,
    name: &str,
    stored: &StoredFile,
    care: Care,
    read: &mut dyn FnMut(u64) -> bool,
) -> Result<Result<(), StoredError>, Stopped> {
    if care == Care::Quick {
        let bytes = store.size(name);
        return Ok(bytes.and_then(|bytes| verify::size(&store.at(name), stored, bytes)));
    }
    store.forget(name);
    let mut stopped = false;
    let looked = verify::stream(store, name, stored, |piece| {
        stopped = !read(piece.len() as u64);
        match stopped {
            true => Err(StoredError::reading(
                &store.at(name),
                io::ErrorKind::Interrupted.into(),
            )),
            false => Ok(()),
        }
    });
    if stopped { Err(Stopped) } else { Ok(looked) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use super::*;
    use crate::{Manifest, manifest};

    /// A published checkpoint with two files, and the hash of its manifest.
    fn checkpoint(root: &Path) -> (PathBuf, [u8; 32]) {
        let dir = root.join("step-00000008-gen-1");
        fs::create_dir(&dir).unwrap();
        let mut files = std::collections::BTreeMap::new();
        for (name, text) in [("config.json", "{}"), ("model", "weights")] {
            fs::write(dir.join(name), text).unwrap();
            let stored = StoredFile {
                bytes: text.len() as u64,
                blake3: blake3::hash(text.as_bytes()).to_hex().to_string(),
                groups: Vec::new(),
            };
            files.insert(name.to_owned(), stored);
        }
        let manifest = Manifest {
            format: manifest::FORMAT,
            files,
            ..Manifest::default()
        };
        let bytes = manifest.to_bytes();
        fs::write(dir.join(PUBLISHED), &bytes).unwrap();
        (dir, *blake3::hash(&bytes).as_bytes())
    }

    fn store(dir: &Path) -> Store {
        Store::open(dir.to_str().unwrap()).unwrap()
    }

    fn examine(dir: &Path, hash: &[u8; 32], care: Care) -> (Vec<String>, u64) {
        let found = published(&store(dir), hash, care, &mut |_| true)
            .unwrap()
            .unwrap();
        let problems = found.problems.iter().map(StoredError::finding);
        (problems.collect(), found.right)
    }

    #[test]
    fn whole_files_are_counted_and_their_bytes_told() {
        let root = tempfile::tempdir().unwrap();
        let (dir, hash) = checkpoint(root.path());
        for care in [Care::Quick, Care::Thorough] {
            assert_eq!(examine(&dir, &hash, care), (vec![], 3));
        }
        let mut bytes = 0;
        let mut count = |read| {
            bytes += read;
            true
        };
        published(&store(&dir), &hash, Care::Thorough, &mut count).unwrap();
        assert_eq!(bytes, 9);
        let stopped = published(&store(&dir), &hash, Care::Thorough, &mut |_| false);
        assert_eq!(stopped.unwrap_err(), Stopped);
    }

    #[test]
    fn a_checkpoint_that_is_elsewhere_is_not_called_damaged() {
        let root = tempfile::tempdir().unwrap();
        assert!(!any_published(&store(root.path())));
        let (_, hash) = checkpoint(root.path());
        assert!(any_published(&store(root.path())));
        let elsewhere = root.path().join("elsewhere");
        let found = published(&store(&elsewhere), &hash, Care::Quick, &mut |_| true);
        assert!(found.unwrap().is_none());
    }

    #[test]
    fn every_altered_cut_or_lost_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let (dir, hash) = checkpoint(root.path());
        fs::write(dir.join("model"), "weighty").unwrap();
        assert_eq!(examine(&dir, &hash, Care::Quick), (vec![], 3));
        let (problems, right) = examine(&dir, &hash, Care::Thorough);
        assert_eq!((problems.len(), right), (1, 2));
        assert!(problems[0].contains("model: its BLAKE3 is"), "{problems:?}");
        fs::write(dir.join("model"), "weigh").unwrap();
        fs::remove_file(dir.join("config.json")).unwrap();
        let found = published(&store(&dir), &hash, Care::Quick, &mut |_| true).unwrap();
        let found = found.unwrap();
        assert_eq!((found.problems.len(), found.right), (2, 1));
        let damage = found.damage().unwrap();
        for part in ["config.json: the file is missing", "and 1 more files"] {
            assert!(damage.contains(part), "{damage}");
        }
        let cut = found.problems[1].finding();
        assert!(cut.contains("it has 5 bytes, 7 were written"), "{cut}");
    }

    #[test]
    fn an_altered_manifest_is_named_whatever_is_in_it() {
        let root = tempfile::tempdir().unwrap();
        let (dir, hash) = checkpoint(root.path());
        for text in ["{}", "garbage"] {
            fs::write(dir.join(PUBLISHED), text).unwrap();
            let (problems, right) = examine(&dir, &hash, Care::Quick);
            assert_eq!((problems.len(), right), (1, 0));
            let problem = &problems[0];
            assert!(problem.contains("manifest.json: its BLAKE3"), "{problem}");
        }
    }
}
