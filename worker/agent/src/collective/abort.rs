//! Aborting a blocked collective from another thread.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::CollectiveError;

/// Ends the collectives of one generation: a blocked call returns [`CollectiveError::Aborted`] at
/// once, a later one too. Clones share their state. Once aborted, always aborted.
#[derive(Clone, Debug, Default)]
pub struct AbortHandle {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    aborted: AtomicBool,
    /// Sockets on which a call may be blocked. Weak, so that dropping the collective closes them.
    sockets: Mutex<Vec<Weak<TcpStream>>>,
    wake: Condvar,
}

impl AbortHandle {
    /// Aborts. Repeats do nothing.
    pub fn abort(&self) {
        let mut sockets = self.sockets();
        // Set under the lock, so that no socket is registered after the last look at the list.
        self.shared.aborted.store(true, Ordering::SeqCst);
        for socket in sockets.drain(..).filter_map(|socket| socket.upgrade()) {
            // A socket that is closed already needs no shutdown.
            socket.shutdown(Shutdown::Both).ok();
        }
        self.shared.wake.notify_all();
    }

    /// Whether it was aborted.
    pub fn aborted(&self) -> bool {
        self.shared.aborted.load(Ordering::SeqCst)
    }

    /// `Err(Aborted)` once it was aborted.
    pub(super) fn check(&self) -> Result<(), CollectiveError> {
        if self.aborted() {
            Err(CollectiveError::Aborted)
        } else {
            Ok(())
        }
    }

    /// Has `socket` shut down by an abort, also by one that has already happened.
    pub(super) fn register(&self, socket: &Arc<TcpStream>) {
        let mut sockets = self.sockets();
        sockets.retain(|socket| socket.strong_count() > 0);
        if self.aborted() {
            socket.shutdown(Shutdown::Both).ok();
        } else {
            sockets.push(Arc::downgrade(socket));
        }
    }

    /// Sleeps, but wakes for an abort.
    pub(super) fn sleep(&self, duration: Duration) {
        let sockets = self.sockets();
        if !self.aborted() {
            // Whatever ends the wait, the caller looks again.
            let _woken = self.shared.wake.wait_timeout(sockets, duration);
        }
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<Weak<TcpStream>>> {
        self.shared
            .sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
