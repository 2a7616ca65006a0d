//! The one error of the harness: a sentence for whoever reads a failed test.

use std::fmt;

/// What the harness could not do, or what a program did wrong.
pub struct Failure(String);

/// Result of everything that starts or questions a program.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// A failure that says `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

// Tests end with `?`, and the test runner prints `Debug`: keep the line breaks of logs.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        Self(text)
    }
}

/// Says what was being done when something failed.
pub trait While<T> {
    /// Puts `doing` before the message.
    fn while_doing(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Failure>> While<T> for std::result::Result<T, E> {
    fn while_doing(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{doing}: {}", error.into().0)))
    }
}
