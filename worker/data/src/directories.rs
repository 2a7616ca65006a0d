//! The input files of a tokenize call, and the output directory that it may write to.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::DataError;
use crate::files;

/// The input files by the name of their output, in the order of names.
pub(crate) fn inputs(paths: &[PathBuf]) -> Result<BTreeMap<String, PathBuf>, DataError> {
    let mut inputs = BTreeMap::new();
    for path in paths {
        let found = if path.is_dir() {
            files::parquet_files(path)?
        } else {
            vec![path.clone()]
        };
        if found.is_empty() {
            return Err(DataError::content(
                path,
                "holds no *.parquet file",
                "name the directory with the text parquet",
            ));
        }
        for file in found {
            let name = format!(
                "{}.parquet",
                files::name_of(&file)?.trim_end_matches(".parquet")
            );
            if let Some(other) = inputs
                .insert(name, file.clone())
                .filter(|other| *other != file)
            {
                let cause = format!(
                    "has the same name as {}, and so would its output",
                    other.display()
                );
                return Err(DataError::content(
                    &file,
                    cause,
                    "rename one of them, or tokenize into two directories",
                ));
            }
        }
    }
    if inputs.is_empty() {
        return Err(DataError::Request(
            "no input: name text parquet files or directories of them".to_owned(),
        ));
    }
    Ok(inputs)
}

/// Keeps a second call out of the directory for as long as the result lives.
pub(crate) fn lock(directory: &Path) -> Result<File, DataError> {
    let handle = File::open(directory).map_err(DataError::io("open directory", directory))?;
    match handle.try_lock() {
        Ok(()) => Ok(handle),
        Err(TryLockError::WouldBlock) => Err(DataError::content(
            directory,
            "another `supra data tokenize` is writing here",
            "wait for it, or name another output directory",
        )),
        // Some network file systems have no locks; the work itself needs none.
        Err(TryLockError::Error(_)) => Ok(handle),
    }
}

/// Removes what an interrupted call left, and refuses a directory with parquet of other origin.
pub(crate) fn clean(output: &Path, inputs: &BTreeMap<String, PathBuf>) -> Result<(), DataError> {
    for entry in fs::read_dir(output).map_err(DataError::io("read directory", output))? {
        let path = entry
            .map_err(DataError::io("read directory", output))?
            .path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') && name.ends_with(files::PARTIAL) {
            fs::remove_file(&path).map_err(DataError::io("remove", &path))?;
        }
    }
    for path in files::parquet_files(output)? {
        let Some(input) = inputs.get(&files::name_of(&path)?) else {
            let remedy = "remove it, or name an output directory of its own";
            return Err(DataError::content(
                &path,
                "is not made from any of the inputs",
                remedy,
            ));
        };
        if matches!((fs::canonicalize(&path), fs::canonicalize(input)), (Ok(one), Ok(other)) if one == other)
        {
            let message = format!(
                "{}: the output directory is the input's; name another",
                output.display()
            );
            return Err(DataError::Request(message));
        }
    }
    Ok(())
}
