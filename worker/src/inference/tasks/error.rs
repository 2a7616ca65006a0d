//! Why a task has no result.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::super::{engine::EngineError, scorer::ScoreError};

/// Why a task has no result.
#[derive(Debug, Error)]
pub enum TaskError {
    /// The file cannot be read.
    #[error("cannot read the task {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A line is not what it should be.
    #[error("{path}:{line}: {problem}", path = path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The file as a whole is not what it should be.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The tokenizer fails.
    #[error("the tokenizer fails on the task {path}: {cause}", path = path.display())]
    Tokenizer {
        /// The task.
        path: PathBuf,
        /// What the tokenizer library says.
        cause: tokenizers::Error,
    },
    /// The model does not score the items.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// The model does not write answers.
    #[error(transparent)]
    Engine(#[from] EngineError),
}
