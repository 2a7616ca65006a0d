//! Aborting a blocked collective from another thread.

use std::fmt;
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
    blocked: Mutex<Blocked>,
    wake: Condvar,
}

/// What an abort has to free.
#[derive(Default)]
struct Blocked {
    /// Sockets on which a call may be blocked. Weak, so that dropping the collective closes them.
    sockets: Vec<Weak<TcpStream>>,
    /// How whatever else may be blocked is freed.
    actions: Vec<Box<dyn FnOnce() + Send>>,
}

impl AbortHandle {
    /// Aborts. Repeats do nothing.
    pub fn abort(&self) {
        let Blocked { sockets, actions } = {
            let mut blocked = self.blocked();
            // Set under the lock, so that nothing is registered after the last look at the lists.
            self.shared.aborted.store(true, Ordering::SeqCst);
            std::mem::take(&mut *blocked)
        };
        for socket in sockets.into_iter().filter_map(|socket| socket.upgrade()) {
            // A socket that is closed already needs no shutdown.
            socket.shutdown(Shutdown::Both).ok();
        }
        actions.into_iter().for_each(|action| action());
        self.shared.wake.notify_all();
    }

    /// Shuts the sockets down, as a broken network would: whoever is blocked on one hears that it is gone.
    pub(crate) fn reset(&self) {
        for socket in self.blocked().sockets.iter().filter_map(Weak::upgrade) {
            socket.shutdown(Shutdown::Both).ok();
        }
    }

    /// Has `action` run once by an abort, also by one that has already happened. It runs on the thread
    /// that aborts, which has others to tell: it must not wait for anything.
    pub fn on_abort(&self, action: impl FnOnce() + Send + 'static) {
        let mut blocked = self.blocked();
        if self.aborted() {
            drop(blocked);
            action();
        } else {
            blocked.actions.push(Box::new(action));
        }
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
        let mut blocked = self.blocked();
        blocked.sockets.retain(|socket| socket.strong_count() > 0);
        if self.aborted() {
            socket.shutdown(Shutdown::Both).ok();
        } else {
            blocked.sockets.push(Arc::downgrade(socket));
        }
    }

    /// Sleeps, but wakes for an abort.
    pub(super) fn sleep(&self, duration: Duration) {
        let blocked = self.blocked();
        if !self.aborted() {
            // Whatever ends the wait, the caller looks again.
            let _woken = self.shared.wake.wait_timeout(blocked, duration);
        }
    }

    fn blocked(&self) -> MutexGuard<'_, Blocked> {
        self.shared
            .blocked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sockets, actions) = (self.sockets.len(), self.actions.len());
        write!(f, "{sockets} sockets and {actions} actions")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn an_action_runs_once_also_after_the_abort() {
        let abort = AbortHandle::default();
        let (ran, runs) = channel();
        let early = ran.clone();
        abort.on_abort(move || early.send("early").unwrap());
        assert!(runs.try_recv().is_err());
        abort.abort();
        abort.abort();
        abort.on_abort(move || ran.send("late").unwrap());
        assert_eq!(runs.iter().collect::<Vec<_>>(), ["early", "late"]);
    }
}
