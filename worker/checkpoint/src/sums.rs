//! `BLAKE3SUMS` of a model directory: the hash of every other file in it, as `b3sum --check BLAKE3SUMS` reads them.
//!
//! Each line is a hash, two spaces and a name, in the order of names. A file that is not named was not written with the others, so
//! a list that was altered or cut shows by itself. Names that begin with a dot are not the model's: version control has some.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use thiserror::Error;

/// Name of the file.
pub const SUMS: &str = "BLAKE3SUMS";

/// Why the files of a model are not those that were written.
#[derive(Debug, Error)]
pub enum SumsError {
    /// The system refuses.
    #[error("cannot read {path}: {source}")]
    Io {
        /// What it refuses.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// Nobody wrote down what the files should be.
    #[error(
        "{dir} has no {SUMS}, which says what its files should be. `supra-worker export` and `convert` write it; for a checkpoint \
         there is `supra checkpoints --verify`"
    )]
    Absent {
        /// The directory.
        dir: PathBuf,
    },
    /// Something is not what was written.
    #[error("{dir} is not what was written: {}. Copy it again, or export it again", problems.join("; "))]
    Damaged {
        /// The directory.
        dir: PathBuf,
        /// What is wrong, file by file.
        problems: Vec<String>,
    },
}

/// What was proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proved {
    /// Files, without the list of hashes.
    pub files: u64,
    /// Their length in bytes.
    pub bytes: u64,
}

/// The bytes of `BLAKE3SUMS` for the files that there are in `dir`, each of which is read.
///
/// # Errors
/// A file cannot be read.
pub fn of(dir: &Path) -> Result<Vec<u8>, SumsError> {
    let (hashes, _) = hashes(dir)?;
    Ok(render(&hashes))
}

/// Proves every file of the model in `dir`.
///
/// # Errors
/// Something cannot be read, there is no list, or files are altered, missing or not in it.
pub fn verify(dir: &Path) -> Result<Proved, SumsError> {
    let path = dir.join(SUMS);
    let written = match fs::read(&path) {
        Ok(written) => written,
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            return Err(SumsError::Absent {
                dir: dir.to_owned(),
            });
        }
        Err(source) => return Err(SumsError::Io { path, source }),
    };
    let (found, bytes) = hashes(dir)?;
    let problems = match parse(&written) {
        None => vec![format!("{SUMS} is no list of hashes")],
        Some(written) => differences(&written, &found),
    };
    if problems.is_empty() {
        return Ok(Proved {
            files: found.len() as u64,
            bytes,
        });
    }
    Err(SumsError::Damaged {
        dir: dir.to_owned(),
        problems,
    })
}

type Hashes = BTreeMap<String, blake3::Hash>;

fn render(hashes: &Hashes) -> Vec<u8> {
    let mut text = String::new();
    for (name, hash) in hashes {
        writeln!(text, "{hash}  {name}").expect("invariant: text in memory can be written");
    }
    text.into_bytes()
}

/// The list that has exactly these bytes.
fn parse(bytes: &[u8]) -> Option<Hashes> {
    let text = std::str::from_utf8(bytes).ok()?;
    let lines = text.lines().map(|line| {
        let (hash, name) = line.split_once("  ")?;
        Some((name.to_owned(), blake3::Hash::from_hex(hash).ok()?))
    });
    let hashes = lines.collect::<Option<Hashes>>()?;
    (render(&hashes) == bytes).then_some(hashes)
}

fn differences(written: &Hashes, found: &Hashes) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, hash) in written {
        match found.get(name) {
            None => problems.push(format!("{name} is missing")),
            Some(found) if found != hash => {
                problems.push(format!("{name} was altered: its BLAKE3 is {found}"));
            }
            Some(_) => {}
        }
    }
    let more = found.keys().filter(|name| !written.contains_key(*name));
    problems.extend(more.map(|name| format!("{name} is not in {SUMS}")));
    problems
}

/// The files of a directory, each hashed by a thread of its own, and their length together.
fn hashes(dir: &Path) -> Result<(Hashes, u64), SumsError> {
    let failed = |path: &Path, source| SumsError::Io {
        path: path.to_owned(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(|source| failed(dir, source))? {
        let entry = entry.map_err(|source| failed(dir, source))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != SUMS && !name.starts_with('.') && entry.path().is_file() {
            names.push(name);
        }
    }
    let hash = |name: &str| {
        let path = dir.join(name);
        let mut hasher = blake3::Hasher::new();
        File::open(&path)
            .and_then(|file| hasher.update_reader(file).map(|_| ()))
            .map_err(|source| failed(&path, source))?;
        Ok((hasher.finalize(), hasher.count()))
    };
    let hashed: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(|| hash(name)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("invariant: hashing does not panic"))
            .collect()
    });
    let (mut hashes, mut bytes) = (Hashes::new(), 0);
    for (name, hashed) in names.into_iter().zip(hashed) {
        let (hash, length) = hashed?;
        hashes.insert(name, hash);
        bytes += length;
    }
    Ok((hashes, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("config.json", "{}"),
            ("model.safetensors", "weights"),
            ("README.md", "# M"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let sums = of(dir.path()).unwrap();
        fs::write(dir.path().join(SUMS), sums).unwrap();
        dir
    }

    fn problem(dir: &Path) -> String {
        verify(dir).unwrap_err().to_string()
    }

    #[test]
    fn a_model_as_it_was_written_is_proved() {
        let dir = model();
        fs::write(dir.path().join(".gitattributes"), "*").unwrap();
        let proved = Proved {
            files: 3,
            bytes: 12,
        };
        assert_eq!(verify(dir.path()).unwrap(), proved);
    }

    #[test]
    fn every_file_that_is_altered_lost_or_new_is_named() {
        let dir = model();
        fs::write(dir.path().join("config.json"), "[]").unwrap();
        fs::remove_file(dir.path().join("README.md")).unwrap();
        fs::write(dir.path().join("more"), "").unwrap();
        let said = problem(dir.path());
        for part in [
            "config.json was altered",
            "README.md is missing",
            "more is not in BLAKE3SUMS",
        ] {
            assert!(said.contains(part), "{said}");
        }
    }

    #[test]
    fn a_list_that_was_altered_or_cut_shows_by_itself() {
        let dir = model();
        let path = dir.path().join(SUMS);
        let bytes = fs::read(&path).unwrap();
        for place in 0..bytes.len() {
            fs::write(&path, &bytes[..place]).unwrap();
            problem(dir.path());
            for bit in 0..8 {
                let mut other = bytes.clone();
                other[place] ^= 1 << bit;
                fs::write(&path, other).unwrap();
                problem(dir.path());
            }
        }
    }

    #[test]
    fn a_directory_without_a_list_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(problem(dir.path()).contains("supra checkpoints --verify"));
    }
}
