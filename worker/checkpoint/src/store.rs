//! The directory that holds a run's checkpoints: names, room, what may go.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{PUBLISHED, StoredError};

/// Name of the checkpoint of a step by a generation, relative to the checkpoint root.
pub fn directory_name(step: u64, generation: u64) -> String {
    format!("step-{step:08}-gen-{generation}")
}

/// Step and generation of a checkpoint directory's name.
fn parse_directory_name(name: &str) -> Option<(u64, u64)> {
    let (step, generation) = name.strip_prefix("step-")?.split_once("-gen-")?;
    Some((step.parse().ok()?, generation.parse().ok()?))
}

/// Bytes that an ordinary user may still write beside `path`.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|path| path.exists())?;
    let stat = nix::sys::statvfs::statvfs(existing).ok()?;
    Some(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}

/// Refuses to start writing what cannot fit.
pub fn ensure_room(path: &Path, needed: u64) -> Result<(), StoredError> {
    match free_bytes(path) {
        Some(free) if free < needed => Err(StoredError::Full {
            path: path.to_owned(),
            needed,
            free,
        }),
        _ => Ok(()),
    }
}

/// Makes a directory's entries durable.
pub fn sync_directory(path: &Path) -> Result<(), StoredError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| StoredError::writing(path, source))
}

/// Removes what crashed writers of generations before `generation` left unpublished. `spare` stays: it is the one that
/// this generation started from. Returns what was removed.
///
/// Only rank 0 may call it. Published checkpoints are the coordinator's: it knows which of them are retired.
pub fn sweep(root: &Path, generation: u64, spare: Option<&Path>) -> io::Result<Vec<PathBuf>> {
    let mut leftovers = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let writer = name
            .and_then(parse_directory_name)
            .map(|(_, writer)| writer);
        let older = writer.is_some_and(|writer| writer < generation);
        if older && spare != Some(path.as_path()) && !path.join(PUBLISHED).exists() {
            leftovers.push(path);
        }
    }
    for path in &leftovers {
        fs::remove_dir_all(path)?;
    }
    Ok(leftovers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PENDING;

    fn checkpoint(root: &Path, step: u64, generation: u64, manifest: &str) -> PathBuf {
        let dir = root.join(directory_name(step, generation));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(manifest), b"{}").unwrap();
        dir
    }

    #[test]
    fn names_hold_step_and_generation() {
        assert_eq!(directory_name(123, 4), "step-00000123-gen-4");
        assert_eq!(parse_directory_name("step-00000123-gen-4"), Some((123, 4)));
        assert_eq!(parse_directory_name("step-123"), None);
        assert_eq!(parse_directory_name("notes"), None);
    }

    #[test]
    fn only_what_an_earlier_generation_left_unpublished_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let published = checkpoint(root, 10, 1, PUBLISHED);
        let spare = checkpoint(root, 20, 1, PENDING);
        let crashed = checkpoint(root, 25, 1, PENDING);
        let in_flight = checkpoint(root, 40, 2, PENDING);
        fs::create_dir(root.join("notes")).unwrap();
        assert_eq!(sweep(root, 2, Some(&spare)).unwrap(), [crashed]);
        for kept in [published, spare, in_flight, root.join("notes")] {
            assert!(kept.exists(), "{}", kept.display());
        }
    }

    #[test]
    fn a_checkpoint_that_cannot_fit_is_not_begun() {
        let root = tempfile::tempdir().unwrap();
        let error = ensure_room(&root.path().join("not/there/yet"), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
        ensure_room(root.path(), 1).unwrap();
    }
}
