//! What all requests and the compute thread see.

use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicBool, AtomicU64, Ordering},
    mpsc::{SyncSender, TrySendError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{compute::Command, fault::Fault, metrics::Metrics, options::Options, served::Served};

/// What all requests and the compute thread see.
#[derive(Debug)]
pub struct Shared {
    /// How the server is set up.
    pub options: Options,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether older weights are still in use beside the newest.
    pub replacing: AtomicBool,
    commands: SyncSender<Command>,
    served: RwLock<Option<Arc<Served>>>,
    draining: AtomicBool,
    /// One permit per request that may be under way.
    room: Arc<Semaphore>,
    requests: AtomicU64,
}

impl Shared {
    /// A server that has no model yet.
    pub fn new(options: Options, commands: SyncSender<Command>) -> Shared {
        Shared {
            metrics: Metrics::default(),
            replacing: AtomicBool::new(false),
            commands,
            served: RwLock::new(None),
            draining: AtomicBool::new(false),
            room: Arc::new(Semaphore::new(options.slots + options.queue)),
            requests: AtomicU64::new(0),
            options,
        }
    }

    /// Answers with this model from now on.
    pub fn serve(&self, served: Served) {
        *self.served.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(served));
    }

    /// The model that answers now.
    ///
    /// # Errors
    ///
    /// It is being loaded, or the server is about to end.
    pub fn served(&self) -> Result<Arc<Served>, Fault> {
        if self.draining() {
            return Err(Fault::draining());
        }
        let served = self.served.read().unwrap_or_else(PoisonError::into_inner);
        served.clone().ok_or_else(Fault::loading)
    }

    /// Takes no requests any more.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether it takes none.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// A place among the requests under way.
    ///
    /// # Errors
    ///
    /// All are taken.
    pub fn enter(&self) -> Result<OwnedSemaphorePermit, Fault> {
        let permit = Arc::clone(&self.room).try_acquire_owned();
        permit.map_err(|_| Fault::busy(self.options.queue))
    }

    /// Whether there would be a place, for whoever has not sent its request yet.
    ///
    /// # Errors
    ///
    /// All are taken.
    pub fn has_room(&self) -> Result<(), Fault> {
        match self.room.available_permits() {
            0 => Err(Fault::busy(self.options.queue)),
            _ => Ok(()),
        }
    }

    /// Requests under way.
    pub fn under_way(&self) -> usize {
        self.options.slots + self.options.queue - self.room.available_permits()
    }

    /// A number that no other request has.
    pub fn number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks the compute thread for something.
    ///
    /// # Errors
    ///
    /// It has too much to do, or has ended.
    pub fn command(&self, command: Command) -> Result<(), Fault> {
        self.commands
            .try_send(command)
            .map_err(|error| match error {
                TrySendError::Full(_) => Fault::busy(self.options.queue),
                TrySendError::Disconnected(_) => Fault::draining(),
            })
    }

    /// Asks for something that must be done, and waits for room in the queue.
    pub fn insist(&self, command: Command) {
        // Whoever has ended has nothing left to do.
        let _ = self.commands.send(command);
    }
}
