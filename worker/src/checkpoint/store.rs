//! The directory that holds a run's checkpoints: is it shared, is there room, what may go.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use supra_agent::{Collective, CollectiveError};

use super::{CheckpointError, MANIFEST};

/// How often and how long a rank looks for the probe: network file systems show new files late.
const PROBE_TRIES: u32 = 20;
const PROBE_PAUSE: Duration = Duration::from_millis(100);

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
pub fn ensure_room(path: &Path, needed: u64) -> Result<(), CheckpointError> {
    match free_bytes(path) {
        Some(free) if free < needed => Err(CheckpointError::Full {
            path: path.to_owned(),
            needed,
            free,
        }),
        _ => Ok(()),
    }
}

/// Makes a directory's entries durable.
pub fn sync_directory(path: &Path) -> Result<(), CheckpointError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| CheckpointError::writing(path, source))
}

/// What the probe finds.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The store is not what a run needs.
    #[error(transparent)]
    Store(#[from] CheckpointError),
    /// The ranks could not tell each other.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// Checks that every rank sees what rank 0 writes below `root`, which is created if need be. All ranks return alike.
pub fn probe(
    root: &Path,
    generation: u64,
    collective: &mut dyn Collective,
) -> Result<(), ProbeError> {
    let path = root.join(format!(".probe-gen-{generation}"));
    let secret: [u8; 16] = rand::random();
    let written = if collective.rank() == 0 {
        write_probe(root, &path, &secret)
    } else {
        Ok(())
    };
    let mine = match &written {
        Ok(()) => secret.to_vec(),
        Err(_) => Vec::new(),
    };
    let expected = collective.all_gather(&mine)?.swap_remove(0);
    written?;
    if expected.is_empty() {
        let problem = "rank 0 cannot write to it".to_owned();
        return Err(CheckpointError::NotShared {
            path: root.to_owned(),
            problem,
        }
        .into());
    }
    let problems = collective.all_gather(look_for_probe(&path, &expected).as_bytes())?;
    if collective.rank() == 0 {
        // Harmless if it stays: the next generation's probe has another name.
        let _ = fs::remove_file(&path);
    }
    let blind: Vec<String> = problems
        .iter()
        .enumerate()
        .filter(|(_, problem)| !problem.is_empty())
        .map(|(rank, problem)| format!("rank {rank} {}", String::from_utf8_lossy(problem)))
        .collect();
    if blind.is_empty() {
        return Ok(());
    }
    Err(CheckpointError::NotShared {
        path: root.to_owned(),
        problem: blind.join("; "),
    }
    .into())
}

fn write_probe(root: &Path, path: &Path, secret: &[u8]) -> Result<(), CheckpointError> {
    fs::create_dir_all(root).map_err(|source| CheckpointError::writing(root, source))?;
    fs::write(path, secret).map_err(|source| CheckpointError::writing(path, source))?;
    sync_directory(root)
}

/// Empty if the probe is there, else what is wrong, in words that follow "rank N".
fn look_for_probe(path: &Path, expected: &[u8]) -> String {
    for _ in 1..PROBE_TRIES {
        if fs::read(path).is_ok_and(|found| found == expected) {
            return String::new();
        }
        thread::sleep(PROBE_PAUSE);
    }
    match fs::read(path) {
        Ok(found) if found == expected => String::new(),
        Ok(_) => "sees another file than the one that rank 0 wrote".to_owned(),
        Err(error) => format!("does not see the file that rank 0 wrote ({error})"),
    }
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
        if older && spare != Some(path.as_path()) && !path.join(MANIFEST).exists() {
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
    use crate::checkpoint::PENDING;

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
        let published = checkpoint(root, 10, 1, MANIFEST);
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
