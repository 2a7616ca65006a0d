//! Cases that run beside each other, each with a folder of its own.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::failure::{Result, While};

/// One for every two cores: a case has more processes, but spends most of its time waiting.
pub(super) fn usual_jobs() -> usize {
    thread::available_parallelism().map_or(1, |cores| usize::from(cores).div_ceil(2))
}

/// Plays every case, so many at a time; each next one is asked for when there is somebody to play it.
pub(super) fn play<T>(
    jobs: usize,
    cases: impl Iterator<Item = T> + Send,
    play: impl Fn(T) + Send + Sync,
) {
    let cases = Mutex::new(cases);
    let next = || cases.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            scope.spawn(|| {
                while let Some(case) = next() {
                    play(case);
                }
            });
        }
    });
}

/// Takes what a failed case left out of the folder that goes away; says where it is.
pub(super) fn keep(folder: &Path, campaign: &str, seed: u64) -> Result<PathBuf> {
    let name = format!("supra-{campaign}-{seed}-{}", std::process::id());
    let kept = std::env::temp_dir().join(name);
    std::fs::rename(folder, &kept).while_doing(folder.display())?;
    Ok(kept)
}
