//! How far the journal has come, beside it: `STATE/journal.head`.
//!
//! A log of SQLite's that was cut or damaged reads as one that ends earlier, and nobody says so. Therefore the number of the
//! last fact stands here as well, written once the fact is on disk: a journal that ends before it has lost something. It is
//! not synced itself, so after a power loss it may be that of an earlier fact, and it is never that of a later one.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::JournalError;

fn path(directory: &Path) -> PathBuf {
    directory.join("journal.head")
}

/// The one line of the file, of one length whatever the number, so that writing it anew never leaves half of it.
fn line(seq: u64) -> String {
    let number = format!("{seq:020}");
    let hash = blake3::hash(number.as_bytes());
    format!("{number} {hash}\n")
}

/// The number of the last fact that is known to have been on disk; none when nothing was written down, or only begun.
///
/// # Errors
/// The file is damaged or cannot be read.
pub(super) fn read(directory: &Path) -> Result<Option<u64>, JournalError> {
    let path = path(directory);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(JournalError::Directory { path, cause }),
    };
    // So a power loss leaves a file that was made just before.
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let number = std::str::from_utf8(&bytes)
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .filter(|seq| line(*seq).as_bytes() == bytes);
    number.map(Some).ok_or(JournalError::Headless { path })
}

/// Fails unless a journal that ends with fact `seq` holds everything that is known to have been on disk.
///
/// # Errors
/// It has lost its end.
pub(super) fn compare(directory: &Path, known: Option<u64>, seq: u64) -> Result<(), JournalError> {
    match known {
        Some(known) if known > seq => Err(JournalError::Cut {
            path: directory.join("journal.db"),
            found: seq,
            known,
            head: path(directory),
        }),
        _ => Ok(()),
    }
}

/// The writing end.
#[derive(Debug)]
pub(super) struct Head {
    path: PathBuf,
    file: File,
    seq: u64,
}

impl Head {
    /// Opens or creates the file of a journal whose last fact is `seq`.
    pub fn open(directory: &Path, seq: u64) -> Result<Head, JournalError> {
        let path = path(directory);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|cause| JournalError::Directory {
                path: path.clone(),
                cause,
            })?;
        let head = Head { path, file, seq };
        head.write()?;
        Ok(head)
    }

    /// Facts up to `seq` are on disk.
    pub fn advance(&mut self, seq: u64) -> Result<(), JournalError> {
        if seq == self.seq {
            return Ok(());
        }
        self.seq = seq;
        self.write()
    }

    fn write(&self) -> Result<(), JournalError> {
        self.file
            .write_all_at(line(self.seq).as_bytes(), 0)
            .map_err(|cause| JournalError::Directory {
                path: self.path.clone(),
                cause,
            })
    }
}
