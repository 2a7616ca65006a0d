//! A file on its way into a store.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use super::{local::LocalFile, object::ObjectFile};
use crate::{manifest::StoredFile, tree::TreeHasher};

/// A new file, hashed while it is written. It is there once [`finish`](Self::finish) has returned; dropped before, nothing of it
/// stays. Memory is bounded, so that a slow store slows the writer.
///
/// Every call to `write` is a system call of a local store: write much at a time.
pub struct StoreFile {
    /// Path or URL, for messages.
    at: PathBuf,
    hasher: TreeHasher,
    sink: Sink,
}

pub(super) enum Sink {
    Local(LocalFile),
    Object(ObjectFile),
}

impl StoreFile {
    pub(super) fn new(at: PathBuf, sink: Sink) -> StoreFile {
        let hasher = TreeHasher::default();
        StoreFile { at, hasher, sink }
    }

    /// Path or URL, for messages.
    pub fn at(&self) -> &std::path::Path {
        &self.at
    }

    /// Bytes written.
    pub fn bytes(&self) -> u64 {
        self.hasher.bytes()
    }

    /// Makes it durable (a directory has to be synced besides, [`Store::sync_dir`](super::Store::sync_dir)) and says what it is.
    ///
    /// # Errors
    ///
    /// The store refuses; [`StoredError::writing`](crate::StoredError::writing) makes a message of it.
    pub fn finish(self) -> io::Result<StoredFile> {
        let StoreFile { hasher, sink, .. } = self;
        match sink {
            Sink::Local(file) => file.finish()?,
            Sink::Object(file) => file.finish()?,
        }
        Ok(hasher.finish())
    }
}

impl Write for StoreFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.sink {
            Sink::Local(file) => file.write(bytes)?,
            Sink::Object(file) => file.write(bytes)?,
        };
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
