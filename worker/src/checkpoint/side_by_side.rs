//! Work on several files, or parts of them, at the same time.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

/// Threads of one rank, at most: more than a disk needs, since they hash as well.
const THREADS: usize = 32;

/// Has scoped threads work on `items`, one thread for each item as far as this rank's share of the cores goes. `state` is made for every
/// thread. After the first error, which is returned, no other item is begun.
pub fn each<T: Sync, S: Send, E: Send>(
    items: &[T],
    at_most: usize,
    state: impl Fn() -> S,
    work: impl Fn(&mut S, usize, &T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let failed: Mutex<Option<E>> = Mutex::new(None);
    let ahead = Mutex::new(items.iter().enumerate());
    let next = || {
        let mut ahead = ahead.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some() { None } else { ahead.next() }
    };
    let run = |mut state: S| {
        while let Some((index, item)) = next() {
            if let Err(error) = work(&mut state, index, item) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(error);
            }
        }
    };
    let cores = usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1);
    thread::scope(|scope| {
        for _ in 0..items.len().min(cores).min(THREADS).min(at_most) {
            let state = state();
            scope.spawn(|| run(state));
        }
    });
    let failed = failed.into_inner();
    failed
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}
