//! Whether all ranks see the same storage.

use std::{fs, path::Path, thread, time::Duration};

use supra_agent::{Collective, CollectiveError};
use supra_checkpoint::{StoredError, store::sync_directory};

/// How often and how long a rank looks for the probe: network file systems show new files late.
const PROBE_TRIES: u32 = 20;
const PROBE_PAUSE: Duration = Duration::from_millis(100);

/// What the probe finds.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The store is not what a run needs.
    #[error(transparent)]
    Store(#[from] StoredError),
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
        return Err(StoredError::NotShared {
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
    Err(StoredError::NotShared {
        path: root.to_owned(),
        problem: blind.join("; "),
    }
    .into())
}

fn write_probe(root: &Path, path: &Path, secret: &[u8]) -> Result<(), StoredError> {
    fs::create_dir_all(root).map_err(|source| StoredError::writing(root, source))?;
    fs::write(path, secret).map_err(|source| StoredError::writing(path, source))?;
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
