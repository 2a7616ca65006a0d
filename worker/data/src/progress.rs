//! How long work tells how far it is, without knowing who shows it.

use std::path::Path;

/// Receives progress; called from several threads. Every method does nothing unless overridden.
pub trait Progress: Sync {
    /// Work on `files` files with `rows` rows in all begins.
    fn begin(&self, files: usize, rows: u64) {
        let _ = (files, rows);
    }

    /// `rows` more rows with `tokens` tokens are done.
    fn advance(&self, rows: u64, tokens: u64) {
        let _ = (rows, tokens);
    }

    /// `file` is done; `skipped` when an earlier call had done it (its rows are not counted by `advance`).
    fn file_done(&self, file: &Path, skipped: bool) {
        let _ = (file, skipped);
    }

    /// Something the user should know, such as what `auto` found.
    fn note(&self, message: &str) {
        let _ = message;
    }
}

/// Silence.
impl Progress for () {}
