//! Small file operations that the rest shares.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::DataError;

/// Ends the name of a file that is still being written.
pub(crate) const PARTIAL: &str = ".partial";

/// Where a file is written before it gets its name: hidden, so that no listing takes it for data.
pub(crate) fn partial_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}{PARTIAL}"))
}

/// Gives the complete file at `partial` its name `path`, durably.
pub(crate) fn publish(file: &File, partial: &Path, path: &Path) -> Result<(), DataError> {
    file.sync_all().map_err(DataError::io("write", partial))?;
    fs::rename(partial, path).map_err(DataError::io("rename to", path))?;
    let directory = parent(path);
    File::open(directory)
        .and_then(|handle| handle.sync_all())
        .map_err(DataError::io("sync", directory))
}

/// Writes `bytes` to `path`, completely or not at all.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let partial = partial_path(path);
    let mut file = File::create(&partial).map_err(DataError::io("create", &partial))?;
    file.write_all(bytes)
        .map_err(DataError::io("write", &partial))?;
    publish(&file, &partial, path)
}

/// The directory of `path`, as a path that opens.
pub(crate) fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// The parquet files of `directory`, sorted by name; hidden ones and subdirectories are left out.
pub(crate) fn parquet_files(directory: &Path) -> Result<Vec<PathBuf>, DataError> {
    let entries = fs::read_dir(directory).map_err(DataError::io("read directory", directory))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(DataError::io("read directory", directory))?
            .path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'));
        if !hidden
            && path
                .extension()
                .is_some_and(|extension| extension == "parquet")
            && path.is_file()
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The file's name as text; manifests are UTF-8.
pub(crate) fn name_of(path: &Path) -> Result<String, DataError> {
    match path.file_name().and_then(|name| name.to_str()) {
        Some(name) => Ok(name.to_owned()),
        None => Err(DataError::content(
            path,
            "has a name that is not UTF-8",
            "rename it",
        )),
    }
}

/// BLAKE3 of a file's bytes.
pub(crate) fn hash_file(path: &Path) -> Result<blake3::Hash, DataError> {
    let file = File::open(path).map_err(DataError::io("open", path))?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(file)
        .map_err(DataError::io("read", path))?;
    Ok(hasher.finalize())
}
