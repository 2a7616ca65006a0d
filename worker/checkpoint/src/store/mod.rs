//! Where a run's checkpoints are kept: names, bytes, room, what may go.

mod file;
mod local;
mod names;

use std::{
    fmt,
    fs::{self, File},
    io,
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use crate::{PENDING, PUBLISHED, StoredError, publish::PublishError};

use file::Sink;
use local::Local;
use names::parse_directory_name;

pub use file::StoreFile;
pub use local::free_bytes;
pub use names::directory_name;

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
}

impl Store {
    /// The store at a path or at `file:///path`. Nothing is created, and nobody asked: a store that is not there shows
    /// when it is used.
    ///
    /// # Errors
    ///
    /// The scheme is none of these.
    pub fn open(location: &str) -> Result<Store, StoredError> {
        let path = match location.split_once("://") {
            None => location,
            Some(("file", path)) if path.starts_with('/') => path,
            Some(_) => {
                return Err(StoredError::NotAStore {
                    location: location.to_owned(),
                });
            }
        };
        let trimmed = path.trim_end_matches('/');
        let url = if trimmed.is_empty() { "/" } else { trimmed };
        let local = Local::new(PathBuf::from(url));
        Ok(Store {
            url: url.into(),
            backend: Arc::new(Backend::Local(local)),
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
        }
    }

    /// Where this machine sees what is in it; none where it does not.
    pub fn local_path(&self, relative: &str) -> Option<PathBuf> {
        match &*self.backend {
            Backend::Local(local) => Some(local.path(relative)),
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
        }
    }

    /// All of a small file.
    ///
    /// # Errors
    ///
    /// As [`read_into`](Self::read_into).
    pub fn read_all(&self, relative: &str) -> Result<Vec<u8>, StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => local.read_all(relative),
        }
    }

    /// Bytes of a file.
    ///
    /// # Errors
    ///
    /// `Damaged` if it is missing; the store refuses.
    pub fn size(&self, relative: &str) -> Result<u64, StoredError> {
        self.find(relative)?.ok_or_else(|| {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            StoredError::reading(&self.at(relative), missing)
        })
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
        }
    }

    /// Removes a directory and all in it, its manifest first, so that what is half removed is no checkpoint; none is no
    /// error.
    ///
    /// # Errors
    ///
    /// The store refuses.
    pub fn remove_dir(&self, relative: &str) -> Result<(), StoredError> {
        self.check(relative)?;
        match &*self.backend {
            Backend::Local(local) => {
                local.remove(&format!("{relative}/{PUBLISHED}"))?;
                local.remove_dir(relative)
            }
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
        }
    }

    /// Bytes that may still be written, where the store knows.
    pub fn free_bytes(&self) -> Option<u64> {
        match &*self.backend {
            Backend::Local(local) => free_bytes(&local.path("")),
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
        let pending = format!("{directory}/{PENDING}");
        let published = format!("{directory}/{PUBLISHED}");
        if !self.exists(&pending)? {
            return self.check_manifest(&published, journalled).map(drop);
        }
        self.check_manifest(&pending, journalled)?;
        match &*self.backend {
            Backend::Local(local) => {
                local.rename(&pending, &published)?;
                Ok(local.sync_dir(directory)?)
            }
        }
    }

    fn check_manifest(
        &self,
        relative: &str,
        journalled: blake3::Hash,
    ) -> Result<Vec<u8>, PublishError> {
        let bytes = self.read_all(relative)?;
        let found = blake3::hash(&bytes);
        if found == journalled {
            return Ok(bytes);
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

/// Refuses to start writing what cannot fit.
pub fn ensure_room(path: &Path, needed: u64) -> Result<(), StoredError> {
    match free_bytes(path) {
        Some(free) if free < needed => Err(StoredError::Full {
            path: path.to_owned(),
            needed,
            free,
        }),
        _ => Ok(()),
    }
}

/// Makes a directory's entries durable.
pub fn sync_directory(path: &Path) -> Result<(), StoredError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| StoredError::writing(path, source))
}

/// Removes what crashed writers of generations before `generation` left unpublished. `spare` stays: it is the one that
/// this generation started from. Returns what was removed.
///
/// Only rank 0 may call it. Published checkpoints are the coordinator's: it knows which of them are retired.
pub fn sweep(root: &Path, generation: u64, spare: Option<&Path>) -> io::Result<Vec<PathBuf>> {
    let mut leftovers = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let writer = name
            .and_then(parse_directory_name)
            .map(|(_, writer)| writer);
        let older = writer.is_some_and(|writer| writer < generation);
        if older && spare != Some(path.as_path()) && !path.join(PUBLISHED).exists() {
            leftovers.push(path);
        }
    }
    for path in &leftovers {
        fs::remove_dir_all(path)?;
    }
    Ok(leftovers)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn checkpoint(root: &Path, step: u64, generation: u64, manifest: &str) -> PathBuf {
        let dir = root.join(directory_name(step, generation));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(manifest), b"{}").unwrap();
        dir
    }

    #[test]
    fn only_what_an_earlier_generation_left_unpublished_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let published = checkpoint(root, 10, 1, PUBLISHED);
        let spare = checkpoint(root, 20, 1, PENDING);
        let crashed = checkpoint(root, 25, 1, PENDING);
        let in_flight = checkpoint(root, 40, 2, PENDING);
        fs::create_dir(root.join("notes")).unwrap();
        assert_eq!(sweep(root, 2, Some(&spare)).unwrap(), [crashed]);
        for kept in [published, spare, in_flight, root.join("notes")] {
            assert!(kept.exists(), "{}", kept.display());
        }
    }

    #[test]
    fn a_checkpoint_that_cannot_fit_is_not_begun() {
        let root = tempfile::tempdir().unwrap();
        let error = ensure_room(&root.path().join("not/there/yet"), u64::MAX).unwrap_err();
        assert!(error.to_string().contains("no room"), "{error}");
        ensure_room(root.path(), 1).unwrap();
    }

    fn store() -> (tempfile::TempDir, Store) {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path().to_str().unwrap()).unwrap();
        (root, store)
    }

    #[test]
    fn a_finished_file_is_there_with_its_hash_and_is_never_overwritten() {
        let (_root, store) = store();
        let mut file = store.create("step-1/a").unwrap();
        file.write_all(b"hello").unwrap();
        let stored = file.finish().unwrap();
        assert_eq!(stored.bytes, 5);
        assert_eq!(stored.blake3, blake3::hash(b"hello").to_hex().as_str());
        assert_eq!(store.read("step-1/a", 1..4).unwrap(), b"ell");
        assert_eq!(store.size("step-1/a").unwrap(), 5);
        assert_eq!(store.list("").unwrap(), ["step-1"]);
        assert!(store.create("step-1/a").is_err());
        let error = store.read("step-1/a", 3..9).unwrap_err();
        assert!(error.to_string().contains("ends before byte 9"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_finished_leaves_nothing() {
        let (_root, store) = store();
        let mut file = store.create("step-1/a").unwrap();
        file.write_all(b"hello").unwrap();
        drop(file);
        assert!(!store.exists("step-1/a").unwrap());
        store.remove("step-1/a").unwrap();
        store.remove_dir("step-1").unwrap();
        store.remove_dir("step-1").unwrap();
        assert_eq!(store.list("").unwrap(), [""; 0]);
    }

    #[test]
    fn paths_stay_below_the_root_and_schemes_are_known() {
        let (_root, store) = store();
        for path in ["..", "a/../b", "/etc", "a/.."] {
            let error = store.read_all(path).unwrap_err().to_string();
            assert!(error.contains("plain relative path"), "{error}");
        }
        assert_eq!(Store::open("file:///a/b/").unwrap().url(), "/a/b");
        let error = Store::open("ftp://a/b").unwrap_err().to_string();
        assert!(
            error.contains("ftp://a/b") && error.contains("file:///"),
            "{error}"
        );
    }

    #[test]
    fn publishing_renames_and_a_repeat_changes_nothing() {
        let (_root, store) = store();
        let hash = *blake3::hash(b"{}").as_bytes();
        store.replace("step-1/manifest.pending", b"{}").unwrap();
        let error = store.publish("step-1", [7; 32]).unwrap_err().to_string();
        assert!(error.contains("not the journalled one"), "{error}");
        assert!(!store.exists("step-1/manifest.json").unwrap());
        for _ in 0..2 {
            store.publish("step-1", hash).unwrap();
            assert_eq!(store.list("step-1").unwrap(), [PUBLISHED]);
        }
        let error = store.publish("step-1", [7; 32]).unwrap_err().to_string();
        assert!(error.contains("not the journalled one"), "{error}");
        let error = store.publish("step-2", hash).unwrap_err().to_string();
        assert!(error.contains(PUBLISHED), "{error}");
    }
}
