//! `supra data index`.
use crate::{DataError, Manifest, Progress};
use std::path::PathBuf;
/// A choice that may be left to the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Auto3 {
    /// Look at the data, decide, and say what was found.
    #[default]
    Auto,
    /// No.
    Never,
    /// Yes.
    Always,
}
impl std::str::FromStr for Auto3 {
    type Err = String;
    fn from_str(text: &str) -> Result<Auto3, String> {
        match text {
            "auto" => Ok(Auto3::Auto),
            "never" => Ok(Auto3::Never),
            "always" => Ok(Auto3::Always),
            _ => Err(format!("{text:?} is none of auto, never, always")),
        }
    }
}
impl std::fmt::Display for Auto3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Auto3::Auto => "auto",
            Auto3::Never => "never",
            Auto3::Always => "always",
        })
    }
}
/// What `supra data index` is asked to do.
#[derive(Debug, Clone)]
pub struct IndexOptions {
    /// Directory of the token parquet files (`*.parquet`, taken in the order of their names).
    pub dir: PathBuf,
    /// Column of token ids: a list of integers per row.
    pub column: String,
    /// Tokenizer that made the tokens: a directory with `tokenizer.json`, or that file.
    pub tokenizer: PathBuf,
    /// Whether EOT is added after each document.
    pub append_eot: Auto3,
    /// Whether BOS is added before each document.
    pub prepend_bos: Auto3,
    /// Exactly so many documents, chosen by their hash, go to `heldout.json`; 0 writes none.
    pub heldout: u64,
}
/// Builds the manifest.
///
/// # Errors
/// Bad input.
pub fn index(options: &IndexOptions, progress: &dyn Progress) -> Result<Manifest, DataError> {
    let _ = progress;
    Manifest::load(&options.dir)
}
