//! Since when a rank stands still for the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Collective, CollectiveError};

/// Whether the training loop waits inside an exchange for other ranks, and for how long: what tells a rank that hangs from
/// those that wait for it. Clones are the same clock; reading it is one atomic load.
#[derive(Clone, Debug)]
pub struct Waiting {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    birth: Instant,
    /// Milliseconds from the birth to the beginning of the wait, plus one; 0 = it does not wait.
    since: AtomicU64,
}

/// A wait that ends when this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Wait<'a>(&'a Shared);

impl Default for Waiting {
    fn default() -> Self {
        let (birth, since) = (Instant::now(), AtomicU64::new(0));
        Waiting {
            shared: Arc::new(Shared { birth, since }),
        }
    }
}

impl Waiting {
    /// A wait begins. There is one at a time: only the compute thread waits.
    pub fn begin(&self) -> Wait<'_> {
        let since = self.shared.birth.elapsed().as_millis() as u64 + 1;
        self.shared.since.store(since, Ordering::Relaxed);
        Wait(&self.shared)
    }

    /// For how long the rank has waited, at least a millisecond; zero when it does not wait.
    pub fn lasted(&self) -> Duration {
        match self.shared.since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => {
                let since = Duration::from_millis(since - 1);
                let lasted = self.shared.birth.elapsed().saturating_sub(since);
                lasted.max(Duration::from_millis(1))
            }
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::Relaxed);
    }
}

/// A collective whose operations, all of which need the other ranks, count as waiting.
#[derive(Debug)]
pub(crate) struct Watched<C> {
    collective: C,
    waiting: Waiting,
}

impl<C: Collective> Watched<C> {
    /// The same collective; `waiting` tells of its waits.
    pub fn new(collective: C, waiting: Waiting) -> Watched<C> {
        Watched {
            collective,
            waiting,
        }
    }
}

impl<C: Collective> Collective for Watched<C> {
    fn rank(&self) -> u32 {
        self.collective.rank()
    }

    fn world(&self) -> u32 {
        self.collective.world()
    }

    fn all_reduce_f32(&mut self, buffer: &mut [f32]) -> Result<(), CollectiveError> {
        let _wait = self.waiting.begin();
        self.collective.all_reduce_f32(buffer)
    }

    fn all_reduce_bf16(&mut self, buffer: &mut [half::bf16]) -> Result<(), CollectiveError> {
        let _wait = self.waiting.begin();
        self.collective.all_reduce_bf16(buffer)
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        let _wait = self.waiting.begin();
        self.collective.all_gather(mine)
    }

    fn broadcast(&mut self, root: u32, buffer: &mut Vec<u8>) -> Result<(), CollectiveError> {
        let _wait = self.waiting.begin();
        self.collective.broadcast(root, buffer)
    }

    fn pass(&mut self, mine: &[u8], theirs: &mut [u8]) -> Result<(), CollectiveError> {
        let _wait = self.waiting.begin();
        self.collective.pass(mine, theirs)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        let _wait = self.waiting.begin();
        self.collective.barrier()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread::{self, sleep};

    use super::super::InProcess;
    use super::*;

    #[test]
    fn a_rank_waits_from_the_beginning_of_an_operation_until_the_others_have_come() {
        let mut ranks = InProcess::group(2).into_iter();
        let (Some(first), Some(mut second)) = (ranks.next(), ranks.next()) else {
            panic!("two ranks");
        };
        let waiting = Waiting::default();
        assert_eq!(waiting.lasted(), Duration::ZERO);
        let mut first = Watched::new(first, waiting.clone());
        let (done, came) = channel();
        let waiter = thread::spawn(move || {
            first.barrier().unwrap();
            done.send(()).unwrap();
            first.all_gather(&[1]).unwrap()
        });
        sleep(Duration::from_millis(50));
        let early = waiting.lasted();
        sleep(Duration::from_millis(50));
        assert!(early > Duration::ZERO && waiting.lasted() > early);
        second.barrier().unwrap();
        came.recv().unwrap();
        assert_eq!(second.all_gather(&[2]).unwrap(), [[1], [2]]);
        assert_eq!(waiter.join().unwrap(), [[1], [2]]);
        assert_eq!(waiting.lasted(), Duration::ZERO, "it waits no more");
    }

    #[test]
    fn an_operation_that_fails_is_no_wait_any_more() {
        let mut ranks = InProcess::group(2);
        let waiting = Waiting::default();
        let mut first = Watched::new(ranks.remove(0), waiting.clone());
        drop(ranks);
        assert!(first.barrier().is_err());
        assert_eq!(waiting.lasted(), Duration::ZERO);
    }
}
