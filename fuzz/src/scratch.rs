//! A directory for what can only be read from one: made once a thread, emptied before every use.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

thread_local! {
    static DIRECTORY: TempDir = tempfile::tempdir().expect("a temporary directory");
}

/// Calls `with` with an empty directory.
pub fn scratch(with: impl FnOnce(&Path)) {
    DIRECTORY.with(|directory| {
        for entry in fs::read_dir(directory).expect("our directory").flatten() {
            fs::remove_file(entry.path()).expect("our file");
        }
        with(directory.path());
    });
}
