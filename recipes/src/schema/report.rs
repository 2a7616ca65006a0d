//! Errors of recipes, rendered with the line they point at.

/// A recipe that cannot be used. Displays as the whole report: file, line, column, the line itself, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{report}")]
pub struct RecipeError {
    report: String,
}

impl RecipeError {
    /// An error about the file as a whole.
    pub(crate) fn plain(file: &str, message: &str) -> RecipeError {
        RecipeError {
            report: format!("{file}: {message}"),
        }
    }
}
