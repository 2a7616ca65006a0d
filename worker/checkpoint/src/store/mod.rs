//! Where a run's checkpoints are kept: names, bytes, room, what may go.

mod file;
mod local;
mod names;
mod object;
mod refusal;
mod sweep;

use std::{
    fmt, io,
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use crate::{PENDING, PUBLISHED, StoredError, publish::PublishError};

use file::Sink;
use local::Local;
use object::Bucket;

pub use file::StoreFile;
pub use local::free_bytes;
pub use names::{directory_name, parse_directory_name};
pub use object::{Access, PATIENCE};
pub use refusal::Refusal;
pub use sweep::sweep;

/// A directory of checkpoints, wherever it is. Paths are relative to it, with `/`; "" is the directory itself.
///
/// Calls block, and come back in bounded time: do not call them where nothing may wait. Clones are the same store.
#[derive(Clone)]
pub struct Store {
    /// Path or URL without a slash at its end.
    url: Arc<str>,
    backend: Arc<Backend>,
}

enum Backend {
    Local(Local),
    Object(Bucket),
}

impl Store {
    /// The store at a path, at `file:///path`, `s3://bucket/prefix` or `gs://bucket/prefix`. Nothing is created, and nobody
    /// asked: a store that is not there shows when it is used. Credentials and endpoints of object stores are those of the
    /// environment.
    ///
    /// # Errors
    ///
    /// The scheme is none of these, the URL has no bucket, or what the environment says of the store cannot be.
    pub fn open(location: &str) -> Result<Store, StoredError> {
        Store::open_with(location, &Access::default())
    }

    /// As [`open`](Self::open), with other ways to reach object stores than those of the environment.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(location: &str, access: &Access) -> Result<Store, StoredError> {
        let not_a_store = || StoredError::NotAStore {
            location: location.to_owned(),
        };
        let trimmed = match location.ends_with("://") {
            true => location,
            false => location.trim_end_matches('/'),
        };
        let (url, backend) = match trimmed.split_once("://") {
            Some((_, rest)) if rest.contains("//") => return Err(not_a_store()),
            Some(parts @ (scheme, _)) if scheme != "file" => {
                let bucket = Bucket::open(trimmed, parts, access)?;
                (trimmed, Backend::Object(bucket))
            }
            _ => {
                let path = location.strip_prefix("file://");
                if location.is_empty() || path.is_some_and(|path| !path.starts_with('/')) {
                    return Err(not_a_store());
                }
                let path = path.unwrap_or(location);
                let path = match path.trim_end_matches('/') {
                    "" => "/",
                    path => path,
                };
                (path, Backend::Local(Local::new(PathBuf::from(path))))
            }
        };
        Ok(Store {
            url: url.into(),
            backend: Arc::new(backend),
        })
    }

    /// Path or URL, for messages and for [`open`](Self::open).
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Path or URL of what is in it, for messages.
    pub fn at(&self, relative: &str) -> PathBuf {
        match relative {
            "" => PathBuf::from(self.url()),
            _ => Path::new(self.url()).join(relative),
        }
    }

    /// Whether it is a directory that this machine sees.
    pub fn is_local(&self) -> bool {
        match &*self.backend {
            Backend::Local(_) => true,
            Backend::Object(_) => false,
        }
    }

    /// Where this machine sees what is in it; none where it does not.
    pub fn local_path(&self, relative: &str) -> Option<PathBuf> {
        match &*self.backend {
            Backend::Local(local) => Some(local.path(relative)),
            Backend::Object(_) => None,
        }
    }

    /// Begins a new file, in directories that are made if need be.
    ///
    /// # Errors
    ///
    /// There is one already, or the store refuses.
    pub fn create(&self, relative: &str) -> Result<StoreFile, StoredError> {
        self.check(relative)?;
        let sink = match &*self.backend {
            Backend::Local(local) => Sink::Local(local.create(relative)?),
            Backend::Object(bucket) => Sink::Object(bucket.create(relative)?),
        };
        Ok(StoreFile::new(self.at(relative), sink))
    }

    /// Writes a small file, durably; one that is there is replaced as a whole.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn replace(&self, relative: &str, bytes: &[u8]) -> Result<(), StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.replace(relative, bytes),
            Backend::Object(bucket) => bucket.replace(relative, bytes),
        }
    }

    /// Bytes `range` of a file.
    ///
    /// # Errors
    ///
    /// As [`read_into`](Self::read_into).
    pub fn read(&self, relative: &str, range: Range<u64>) -> Result<Vec<u8>, StoredError> {
        let mut bytes = vec![0; range.end.saturating_sub(range.start) as usize];
        self.read_into(relative, range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `buffer` with the bytes of a file from `start` on.
    ///
    /// # Errors
    ///
    /// `Damaged` if the file is missing or too short; the store refuses.
    pub fn read_into(
        &self,
        relative: &str,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.read_into(relative, start, buffer),
            Backend::Object(bucket) => bucket.read_into(relative, start, buffer),
        }
    }

    /// The same, and shows `see` the bytes in order, some at a time, while a processor's cache still holds them.
    ///
    /// # Errors
    ///
    /// As [`read_into`](Self::read_into).
    pub fn read_along(
        &self,
        relative: &str,
        start: u64,
        buffer: &mut [u8],
        see: &mut dyn FnMut(&[u8]),
    ) -> Result<(), StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.read_along(relative, start, buffer, see),
            Backend::Object(bucket) => {
                bucket.read_into(relative, start, buffer)?;
                see(buffer);
                Ok(())
            }
        }
    }

    /// All of a small file.
    ///
    /// # Errors
    ///
    /// As [`read_into`](Self::read_into).
    pub fn read_all(&self, relative: &str) -> Result<Vec<u8>, StoredError> {
        let read = self.read_if_there(relative)?;
        read.ok_or_else(|| self.missing(relative))
    }

    /// All of a small file; none if there is no such file.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn read_if_there(&self, relative: &str) -> Result<Option<Vec<u8>>, StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.read_all(relative),
            Backend::Object(bucket) => bucket.read_all(relative),
        }
    }

    /// Bytes of a file.
    ///
    /// # Errors
    ///
    /// `Damaged` if it is missing; the store refuses.
    pub fn size(&self, relative: &str) -> Result<u64, StoredError> {
        let found = self.find(relative)?;
        found.ok_or_else(|| self.missing(relative))
    }

    fn missing(&self, relative: &str) -> StoredError {
        StoredError::reading(&self.at(relative), io::ErrorKind::NotFound.into())
    }

    /// Whether there is such a file. A directory is none.
    ///
    /// # Errors
    ///
    /// The store refuses to say.
    pub fn exists(&self, relative: &str) -> Result<bool, StoredError> {
        Ok(self.find(relative)?.is_some())
    }

    fn find(&self, relative: &str) -> Result<Option<u64>, StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.size(relative),
            Backend::Object(bucket) => bucket.size(relative),
        }
    }

    /// Names of the files and directories in a directory, in order; none if there is no such directory.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn list(&self, relative: &str) -> Result<Vec<String>, StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.list(relative),
            Backend::Object(bucket) => bucket.list(relative),
        }
    }

    /// Removes a file; none is no error.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn remove(&self, relative: &str) -> Result<(), StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.remove(relative),
            Backend::Object(bucket) => bucket.remove(relative),
        }
    }

    /// Removes a directory and all in it, its manifest first, so that what is half removed is no checkpoint; none is no
    /// error.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn remove_dir(&self, relative: &str) -> Result<(), StoredError> {
        self.remove(&join(relative, PUBLISHED))?;
        match &*self.backend {
            Backend::Local(local) => local.remove_dir(relative),
            Backend::Object(bucket) => bucket.remove_dir(relative),
        }
    }

    /// Gives up what the system has of a file in memory, where it has: the next reader is to see the disk.
    pub fn forget(&self, relative: &str) {
        if let Backend::Local(local) = &*self.backend {
            local.forget(relative);
        }
    }

    /// Makes the entries of a directory durable, where that is not done with the files.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn sync_dir(&self, relative: &str) -> Result<(), StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.sync_dir(relative),
            Backend::Object(_) => Ok(()),
        }
    }

    /// Bytes that may still be written, where the store knows.
    pub fn free_bytes(&self) -> Option<u64> {
        match &*self.backend {
            Backend::Local(local) => free_bytes(&local.path("")),
            Backend::Object(_) => None,
        }
    }

    /// Refuses to start writing what cannot fit.
    ///
    /// # Errors
    ///
    /// `Full`.
    pub fn ensure_room(&self, needed: u64) -> Result<(), StoredError> {
        match self.free_bytes() {
            Some(free) if free < needed => Err(StoredError::Full {
                path: self.at(""),
                needed,
                free,
            }),
            _ => Ok(()),
        }
    }

    /// Makes the checkpoint in `directory` one that readers trust: `manifest.pending`, if it is the journalled one, becomes
    /// `manifest.json`. A repeat changes nothing; of two with different manifests one is told that it lost.
    ///
    /// # Errors
    ///
    /// The manifest is missing or another one than `manifest_hash` (BLAKE3), or the store refuses.
    pub fn publish(&self, directory: &str, manifest_hash: [u8; 32]) -> Result<(), PublishError> {
        let journalled = blake3::Hash::from_bytes(manifest_hash);
        let (pending, published) = (join(directory, PENDING), join(directory, PUBLISHED));
        let Some(bytes) = self.read_if_there(&pending)? else {
            let bytes = self.read_all(&published)?;
            return self.expect(&published, &bytes, journalled);
        };
        self.expect(&pending, &bytes, journalled)?;
        match &*self.backend {
            Backend::Local(local) => {
                if let Err(error) = local.rename(&pending, &published) {
                    // A generation that starts from it may have been faster.
                    match self.read_if_there(&published)? {
                        Some(there) => self.expect(&published, &there, journalled)?,
                        None => return Err(error.into()),
                    }
                }
                Ok(local.sync_dir(directory)?)
            }
            Backend::Object(bucket) => {
                if !bucket.put_new(&published, &bytes)? {
                    // This one, by a request whose answer was lost, or another one.
                    let there = self.read_all(&published)?;
                    self.expect(&published, &there, journalled)?;
                }
                // It says nothing any more, so it may as well stay.
                let _ = bucket.remove(&pending);
                Ok(())
            }
        }
    }

    fn expect(
        &self,
        relative: &str,
        bytes: &[u8],
        journalled: blake3::Hash,
    ) -> Result<(), PublishError> {
        let found = blake3::hash(bytes);
        if found == journalled {
            return Ok(());
        }
        Err(PublishError::Changed {
            path: self.at(relative),
            found,
            journalled,
        })
    }

    /// Paths come over the wire and out of manifests: none may lead out of the store.
    fn check(&self, relative: &str) -> Result<(), StoredError> {
        if relative.is_empty() || is_plain(relative) {
            return Ok(());
        }
        Err(StoredError::Outside {
            root: self.at(""),
            path: relative.to_owned(),
        })
    }
}

/// A path below a directory of the store, which may be the store itself.
pub fn join(directory: &str, name: &str) -> String {
    match directory {
        "" => name.to_owned(),
        _ => format!("{directory}/{name}"),
    }
}

/// Whether a path is relative and stays below where it begins.
pub fn is_plain(path: &str) -> bool {
    let normal = |part| matches!(part, Component::Normal(_));
    !path.is_empty() && Path::new(path).components().all(normal)
}

impl PartialEq for Store {
    fn eq(&self, other: &Store) -> bool {
        self.url == other.url
    }
}

impl Eq for Store {}

impl fmt::Debug for Store {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "Store({})", self.url)
    }
}

#[cfg(test)]
mod tests;
