//! Random access to windows of the packed stream.
use crate::{DataError, Manifest};
use std::path::Path;
/// Reads windows.
#[derive(Debug)]
pub struct Reader {
    manifest: Manifest,
    sequence_length: u64,
}
impl Reader {
    /// Opens.
    ///
    /// # Errors
    /// Bad input.
    pub fn open(manifest: &Path, sequence_length: u64) -> Result<Reader, DataError> {
        Ok(Reader {
            manifest: Manifest::load(manifest)?,
            sequence_length,
        })
    }
    /// The dataset.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
    /// Windows of a pass.
    pub fn windows(&self) -> u64 {
        self.manifest.windows(self.sequence_length)
    }
    /// Tokens and document starts of window `w`.
    ///
    /// # Errors
    /// Bad input.
    pub fn window(&mut self, w: u64) -> Result<(Vec<u32>, Vec<u32>), DataError> {
        Err(DataError::Request(format!("window {w}")))
    }
}
