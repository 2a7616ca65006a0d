//! `supra data inspect`.
use crate::DataError;
use serde::Serialize;
use std::path::PathBuf;
use supra_recipes::Recipe;
/// Which part of the stream to show.
#[derive(Debug, Clone)]
pub enum At {
    /// Window `number` of the stream.
    Window {
        /// Counts from 0.
        number: u64,
        /// Tokens per window.
        sequence_length: u64,
    },
    /// Sample `number` of a run of `recipe`, whose sequence length and order hold.
    Sample {
        /// Counts from 0 over the whole run.
        number: u64,
        /// The recipe.
        recipe: Box<Recipe>,
    },
}
/// What `supra data inspect` is asked to show.
#[derive(Debug, Clone)]
pub struct InspectOptions {
    /// A manifest, or the directory of `dataset.json`.
    pub dataset: PathBuf,
    /// The tokenizer that made the tokens; without it token ids are shown.
    pub tokenizer: Option<PathBuf>,
    /// What to show.
    pub at: At,
}
/// A stretch of tokens of one document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Passage {
    /// Position of its first token in the window.
    pub position: u64,
    /// Whether its document begins here, rather than before the window.
    pub begins_document: bool,
    /// The token ids.
    pub tokens: Vec<u32>,
    /// The decoded text; absent without a tokenizer.
    pub text: Option<String>,
}
/// A decoded window. `Display` shows it with the document boundaries; `Serialize` is its JSON form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inspected {
    /// Window number.
    pub window: u64,
    /// Sample number, when asked for by sample.
    pub sample: Option<u64>,
    /// The window's stretches, one per document.
    pub passages: Vec<Passage>,
}
impl std::fmt::Display for Inspected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "window {}", self.window)
    }
}
/// Reads and decodes one window.
///
/// # Errors
/// Bad input.
pub fn inspect(options: &InspectOptions) -> Result<Inspected, DataError> {
    Err(DataError::Request(format!("{options:?}")))
}
