//! Checkpoints in a directory of this machine, or of one that is mounted here.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::StoredError;

/// Bytes that are read at once: they stay in a processor's cache.
const PIECE: usize = 512 << 10;

/// A directory; paths are relative to it and checked by [`Store`](super::Store).
pub(super) struct Local {
    root: PathBuf,
}

impl Local {
    pub(super) fn new(root: PathBuf) -> Local {
        Local { root }
    }

    pub(super) fn path(&self, relative: &str) -> PathBuf {
        match relative {
            "" => self.root.clone(),
            _ => self.root.join(relative),
        }
    }

    pub(super) fn create(&self, relative: &str) -> Result<LocalFile, StoredError> {
        let path = self.path(relative);
        let directory = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(directory).map_err(|source| StoredError::writing(directory, source))?;
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.map_err(|source| StoredError::writing(&path, source))?;
        Ok(LocalFile {
            path,
            file: Some(file),
        })
    }

    /// Writes beside the file and renames: readers see the old bytes or the new ones. Only the root is made: a manifest whose
    /// directory is gone would stand for files that are not there.
    pub(super) fn replace(&self, relative: &str, bytes: &[u8]) -> Result<(), StoredError> {
        let path = self.path(relative);
        let name = path.file_name().map(|name| name.to_string_lossy());
        let beside = path.with_file_name(format!(".{}.new", name.unwrap_or_default()));
        let directory = path.parent().unwrap_or(&self.root);
        let write = || {
            if directory == self.root {
                fs::create_dir_all(directory)?;
            }
            let mut file = File::create(&beside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            File::open(directory)?.sync_all()
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&beside);
            StoredError::writing(&path, source)
        })
    }

    pub(super) fn read_into(
        &self,
        relative: &str,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoredError> {
        self.read_along(relative, start, buffer, &mut |_| ())
    }

    pub(super) fn read_along(
        &self,
        relative: &str,
        start: u64,
        buffer: &mut [u8],
        see: &mut dyn FnMut(&[u8]),
    ) -> Result<(), StoredError> {
        let path = self.path(relative);
        let end = start + buffer.len() as u64;
        let mut read = || {
            let file = File::open(&path)?;
            let mut at = start;
            for piece in buffer.chunks_mut(PIECE) {
                file.read_exact_at(piece, at)?;
                see(piece);
                at += piece.len() as u64;
            }
            Ok(())
        };
        let read: io::Result<()> = read();
        read.map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => StoredError::Damaged {
                problem: format!("it ends before byte {}", end),
                path,
            },
            _ => StoredError::reading(&path, source),
        })
    }

    pub(super) fn read_all(&self, relative: &str) -> Result<Option<Vec<u8>>, StoredError> {
        let path = self.path(relative);
        match fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoredError::reading(&path, source)),
        }
    }

    pub(super) fn size(&self, relative: &str) -> Result<Option<u64>, StoredError> {
        let path = self.path(relative);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
            Err(source) => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Ok(None),
                _ => Err(StoredError::reading(&path, source)),
            },
        }
    }

    pub(super) fn list(&self, relative: &str) -> Result<Vec<String>, StoredError> {
        let path = self.path(relative);
        let failed = |source| StoredError::Io {
            action: "list",
            path: path.clone(),
            source,
        };
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            // A name that is not UTF-8 is none of ours.
            names.extend(entry.map_err(failed)?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }

    pub(super) fn remove(&self, relative: &str) -> Result<(), StoredError> {
        gone(&self.path(relative), |path| fs::remove_file(path))
    }

    pub(super) fn remove_dir(&self, relative: &str) -> Result<(), StoredError> {
        gone(&self.path(relative), |path| fs::remove_dir_all(path))
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> Result<(), StoredError> {
        let to = self.path(to);
        fs::rename(self.path(from), &to).map_err(|source| StoredError::writing(&to, source))
    }

    /// Advice: without it the answer is still about what any reader gets.
    pub(super) fn forget(&self, relative: &str) {
        #[cfg(target_os = "linux")]
        if let Ok(file) = File::open(self.path(relative)) {
            use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
            let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }

    pub(super) fn sync_dir(&self, relative: &str) -> Result<(), StoredError> {
        let path = self.path(relative);
        let synced = File::open(&path).and_then(|directory| directory.sync_all());
        synced.map_err(|source| StoredError::writing(&path, source))
    }
}

/// What is not there needs no removal.
fn gone(path: &Path, remove: impl Fn(&Path) -> io::Result<()>) -> Result<(), StoredError> {
    match remove(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(StoredError::Io {
            action: "remove",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Bytes that an ordinary user may still write beside `path`.
pub fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|path| path.exists())?;
    let stat = nix::sys::statvfs::statvfs(existing).ok()?;
    Some(stat.blocks_available() as u64 * stat.fragment_size() as u64)
}

/// A new file; one that is not finished is removed.
pub(super) struct LocalFile {
    path: PathBuf,
    /// None once it is finished.
    file: Option<File>,
}

impl LocalFile {
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Ok(0),
        }
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        if let Some(file) = &self.file {
            file.sync_all()?;
        }
        self.file = None;
        Ok(())
    }
}

impl Drop for LocalFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
