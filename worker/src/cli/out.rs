//! Writing to stdout and stderr: a reader that has gone ends a command quietly.

use std::io::{self, Write};

use serde::Serialize;

use super::failure::Failure;

/// Writes a line to stdout.
pub fn line(text: &str) -> Result<(), Failure> {
    write(&format!("{text}\n"))
}

/// Writes a piece of text to stdout, at once.
pub fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Closed,
            _ => Failure::failed(format!("cannot write to standard output: {error}")),
        })
}

/// Writes a value as JSON on one line.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|error| Failure::failed(error.to_string()))?;
    line(&text)
}

/// Writes a line to stderr. If nobody listens there, nobody is left to tell.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
