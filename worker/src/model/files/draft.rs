//! A directory under construction, beside its final place: it appears whole, with the hashes of its files, or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use supra_checkpoint::sums::{self, SUMS};

use crate::model::ModelError;

/// Removed unless it is published.
pub struct Draft {
    /// Where to write.
    pub path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Draft {
    /// Begins a directory that will be called `target`, which must be new or empty.
    pub fn begin(target: &Path) -> Result<Draft, ModelError> {
        let occupied = || ModelError::Occupied {
            path: target.to_owned(),
        };
        let free = match fs::read_dir(target) {
            Ok(mut entries) => entries.next().is_none(),
            Err(source) => source.kind() == std::io::ErrorKind::NotFound,
        };
        if !free {
            return Err(occupied());
        }
        let name = target.file_name().ok_or_else(occupied)?;
        let path = target.with_file_name(format!(
            ".{}.partial-{}",
            name.display(),
            std::process::id()
        ));
        let io = |source| ModelError::Io {
            action: "create",
            path: path.clone(),
            source,
        };
        if path.exists() {
            fs::remove_dir_all(&path).map_err(io)?;
        }
        fs::create_dir_all(&path).map_err(io)?;
        Ok(Draft {
            path: path.clone(),
            target: target.to_owned(),
            published: false,
        })
    }

    /// Writes a file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        let path = self.path.join(name);
        fs::write(&path, bytes).map_err(|source| ModelError::Io {
            action: "write",
            path,
            source,
        })
    }

    /// Writes a file unless there is one of this name.
    pub fn write_if_missing(&self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        match self.path.join(name).exists() {
            true => Ok(()),
            false => self.write(name, bytes),
        }
    }

    /// Gives the directory its name, once every file and the hashes of all are on the disk.
    pub fn publish(mut self) -> Result<(), ModelError> {
        let sums = sums::of(&self.path).map_err(|error| ModelError::Unfit(error.to_string()))?;
        self.write(SUMS, &sums)?;
        let io = |source| ModelError::Io {
            action: "create",
            path: self.target.clone(),
            source,
        };
        for entry in fs::read_dir(&self.path).map_err(io)? {
            entry
                .and_then(|entry| File::open(entry.path())?.sync_all())
                .map_err(io)?;
        }
        fs::rename(&self.path, &self.target).map_err(io)?;
        // The name is on the disk when the directory that holds it is.
        let parent = self
            .target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(io)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
