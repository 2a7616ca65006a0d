//! Whether all ranks see the same storage.

use std::{thread, time::Duration};

use supra_agent::{Collective, CollectiveError};
use supra_checkpoint::{Store, StoredError};

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

/// Checks that every rank sees what rank 0 writes in `store`, which is created if need be. All ranks return alike.
pub fn probe(
    store: &Store,
    generation: u64,
    collective: &mut dyn Collective,
) -> Result<(), ProbeError> {
    let name = format!(".probe-gen-{generation}");
    let secret: [u8; 16] = rand::random();
    let written = if collective.rank() == 0 {
        store.replace(&name, &secret)
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
            path: store.at(""),
            problem,
        }
        .into());
    }
    let problems = collective.all_gather(look_for_probe(store, &name, &expected).as_bytes())?;
    if collective.rank() == 0 {
        // Harmless if it stays: the next generation's probe has another name.
        let _ = store.remove(&name);
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
        path: store.at(""),
        problem: blind.join("; "),
    }
    .into())
}

/// Empty if the probe is there, else what is wrong, in words that follow "rank N".
fn look_for_probe(store: &Store, name: &str, expected: &[u8]) -> String {
    let mut problem = String::new();
    for _ in 0..PROBE_TRIES {
        problem = match store.read_if_there(name) {
            Ok(Some(found)) if found == expected => return String::new(),
            Ok(Some(_)) => "sees another file than the one that rank 0 wrote".to_owned(),
            Ok(None) => "does not see the file that rank 0 wrote".to_owned(),
            Err(error) => return format!("cannot look for the file that rank 0 wrote ({error})"),
        };
        thread::sleep(PROBE_PAUSE);
    }
    problem
}
