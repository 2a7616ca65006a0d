//! The journal: facts on disk.
//!
//! One SQLite file, `STATE/journal.db` (WAL, `synchronous=FULL`), written by one thread. Facts are handed over in order
//! and reach the disk as a prefix of that order: together when [`Journal::sync`] asks for it, else after a second or 256
//! facts; how far they have come is also said beside it ([`head`]). Ledger records have a table of their own, one compact row each; a snapshot of the replayed state every few
//! thousand facts keeps the start fast however long the run is.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::oneshot;

use crate::machine::{Fact, State};

mod head;
mod store;

pub use store::Reader;
use store::Store;

/// Facts are committed after this time at the latest, and when there are this many.
const COMMIT_AFTER: Duration = Duration::from_secs(1);
const COMMIT_AT: usize = 256;

/// The journal cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory.
    #[error("cannot use the state directory {}: {cause}\n  choose a directory that this user may write with --state", path.display())]
    Directory {
        /// The directory, or the file in it.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// Another coordinator.
    #[error("another coordinator{} uses the state directory {}\n  stop it, or choose another directory with --state", holder(pid), path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Its process, if known.
        pid: Option<u32>,
    },
    /// A later version.
    #[error("{} was written by a newer version (format {found}, this one knows {known})\n  install that version", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: i64,
        /// The newest format known.
        known: i64,
    },
    /// A decision that only a later version makes.
    #[error("{} was written by a newer version (fact {seq}: {cause})\n  install that version", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Number of the fact.
        seq: u64,
        /// What is not known.
        cause: serde_json::Error,
    },
    /// What is stored makes no sense.
    #[error("{} is damaged: {what}\n  restore it from a backup, or begin with another --state directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What.
        what: String,
    },
    /// The last facts are gone.
    #[error("{} has lost its end: its last fact is {found}, and fact {known} was on disk before\n  restore it from a backup; to go on from what is left, remove {}", path.display(), head.display())]
    Cut {
        /// The file.
        path: PathBuf,
        /// Number of its last fact.
        found: u64,
        /// Number of the last fact that was on disk.
        known: u64,
        /// The file that says so.
        head: PathBuf,
    },
    /// It cannot be told any more whether the last facts are there.
    #[error("{} is damaged: it does not say how far the journal has come\n  remove it if the journal beside it is the newest one", path.display())]
    Headless {
        /// The file.
        path: PathBuf,
    },
    /// SQLite.
    #[error("{}: {cause}{}", path.display(), remedy(cause))]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        cause: rusqlite::Error,
    },
    /// The writing thread has given up before.
    #[error("the journal cannot be written: {0}")]
    Failed(String),
}

fn holder(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})"))
        .unwrap_or_default()
}

fn remedy(cause: &rusqlite::Error) -> &'static str {
    match cause.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => {
            "\n  free space on that disk, then start the coordinator again: nothing is lost"
        }
        Some(
            rusqlite::ErrorCode::ReadOnly
            | rusqlite::ErrorCode::CannotOpen
            | rusqlite::ErrorCode::PermissionDenied,
        ) => {
            "\n  the state directory has to be writable: choose another with --state, or change its permissions"
        }
        _ => "",
    }
}

/// The one coordinator of a state directory; given up when dropped, also by a crash.
#[derive(Debug)]
pub struct StateLock {
    _file: Flock<File>,
}

impl StateLock {
    /// Creates the directory if need be and takes its lock.
    ///
    /// # Errors
    /// It cannot be written, or another coordinator has it.
    pub fn take(directory: &Path) -> Result<StateLock, JournalError> {
        let denied = |path: &Path, cause| JournalError::Directory {
            path: path.to_owned(),
            cause,
        };
        fs::create_dir_all(directory).map_err(|cause| denied(directory, cause))?;
        let path = directory.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|cause| denied(&path, cause))?;
        let mut text = String::new();
        file.read_to_string(&mut text)
            .map_err(|cause| denied(&path, cause))?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
            |(_, errno)| match errno {
                Errno::EWOULDBLOCK => JournalError::Locked {
                    path: directory.to_owned(),
                    pid: text.trim().parse().ok(),
                },
                other => denied(&path, other.into()),
            },
        )?;
        file.set_len(0)
            .and_then(|()| std::io::Seek::rewind(&mut *file))
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|cause| denied(&path, cause))?;
        Ok(StateLock { _file: file })
    }
}

enum Command {
    Append(Vec<Fact>),
    Sync(oneshot::Sender<()>),
}

/// The writing end of a journal.
#[derive(Debug)]
pub struct Journal {
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<thread::JoinHandle<()>>,
    failure: Arc<Mutex<Option<String>>>,
}

impl Journal {
    /// Opens or creates the journal of a state directory and replays it.
    ///
    /// # Errors
    /// The file cannot be opened, is damaged, or was written by a newer version.
    pub fn open(directory: &Path) -> Result<(Journal, State), JournalError> {
        let store = Store::open(directory)?;
        let state = store.state().clone();
        let (commands, inbox) = mpsc::channel();
        let failure = Arc::new(Mutex::new(None));
        let slot = failure.clone();
        let thread = thread::Builder::new()
            .name("journal".into())
            .spawn(move || {
                // Outlives the failure's note: whoever waits has to find the cause when woken.
                let mut waiting = Vec::new();
                if let Err(error) = serve(store, &inbox, &mut waiting)
                    && let Ok(mut slot) = slot.lock()
                {
                    *slot = Some(error.to_string());
                }
            })
            .map_err(|cause| JournalError::Directory {
                path: directory.to_owned(),
                cause,
            })?;
        Ok((
            Journal {
                commands: Some(commands),
                thread: Some(thread),
                failure,
            },
            state,
        ))
    }

    /// Hands facts over, to be written in this order.
    ///
    /// # Errors
    /// The journal has failed; it cannot be used any more.
    pub fn append(&self, facts: Vec<Fact>) -> Result<(), JournalError> {
        self.send(Command::Append(facts))
    }

    /// Waits until everything handed over is on disk.
    ///
    /// # Errors
    /// It is not: the journal has failed.
    pub async fn sync(&self) -> Result<(), JournalError> {
        let (done, synced) = oneshot::channel();
        self.send(Command::Sync(done))?;
        synced.await.map_err(|_| self.failed())
    }

    /// Ready when everything handed over so far is on disk, or never will be.
    pub fn written(&self) -> impl Future<Output = ()> + Send + use<> {
        let (done, synced) = oneshot::channel();
        let _ = self.send(Command::Sync(done));
        async move {
            let _ = synced.await;
        }
    }

    /// Whether the journal still works.
    ///
    /// # Errors
    /// It has failed since.
    pub fn check(&self) -> Result<(), JournalError> {
        match &self.thread {
            Some(thread) if !thread.is_finished() => Ok(()),
            _ => Err(self.failed()),
        }
    }

    fn send(&self, command: Command) -> Result<(), JournalError> {
        let commands = self.commands.as_ref().ok_or_else(|| self.failed())?;
        commands.send(command).map_err(|_| self.failed())
    }

    fn failed(&self) -> JournalError {
        let cause = self.failure.lock().ok().and_then(|slot| slot.clone());
        JournalError::Failed(cause.unwrap_or_else(|| "its thread has ended".into()))
    }
}

impl Drop for Journal {
    /// Writes what is left.
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The writing thread: gathers facts, commits them together, and tells those in `waiting`.
fn serve(
    mut store: Store,
    inbox: &mpsc::Receiver<Command>,
    waiting: &mut Vec<oneshot::Sender<()>>,
) -> Result<(), JournalError> {
    let mut pending: Vec<Fact> = Vec::new();
    let mut since = Instant::now();
    loop {
        let patience = if pending.is_empty() {
            Duration::from_secs(3600)
        } else {
            COMMIT_AFTER.saturating_sub(since.elapsed())
        };
        let closed = match inbox.recv_timeout(patience) {
            Ok(Command::Append(facts)) => {
                if pending.is_empty() {
                    since = Instant::now();
                }
                pending.extend(facts);
                false
            }
            Ok(Command::Sync(done)) => {
                waiting.push(done);
                false
            }
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => true,
        };
        let due = pending.len() >= COMMIT_AT || since.elapsed() >= COMMIT_AFTER;
        if closed || due || !waiting.is_empty() {
            store.commit(&pending)?;
            pending.clear();
            for done in waiting.drain(..) {
                let _ = done.send(());
            }
        }
        if closed {
            return Ok(());
        }
    }
}
