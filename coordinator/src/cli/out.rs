//! Writing to stdout and stderr: a reader that has gone ends a command quietly, never in a panic.

use std::io::{self, Write};

use serde::Serialize;

use super::failure::Failure;

/// Writes `text` and a newline to stdout.
///
/// # Errors
/// [`Failure::Closed`] when nobody reads any more.
pub fn line(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")
        .and_then(|()| stdout.flush())
        .map_err(cannot_write)
}

/// Writes `text` as it is to stdout.
///
/// # Errors
/// [`Failure::Closed`] when nobody reads any more.
pub fn text(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(cannot_write)
}

/// Writes a value as indented JSON: one document per command.
///
/// # Errors
/// [`Failure::Closed`] when nobody reads any more.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    line(&serde_json::to_string_pretty(value).map_err(no_json)?)
}

/// Writes a value as JSON on one line: for streams of values.
///
/// # Errors
/// [`Failure::Closed`] when nobody reads any more.
pub fn json_line(value: &impl Serialize) -> Result<(), Failure> {
    line(&serde_json::to_string(value).map_err(no_json)?)
}

/// Writes a line to stderr. If nobody listens there either, there is nobody left to tell.
pub fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

fn cannot_write(error: io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Failure::Closed
    } else {
        Failure::failed(format!("cannot write to standard output: {error}."))
    }
}

fn no_json(error: serde_json::Error) -> Failure {
    Failure::failed(format!("cannot write the answer as JSON: {error}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_pipe_is_quiet_and_a_full_disk_is_not() {
        assert!(matches!(
            cannot_write(io::ErrorKind::BrokenPipe.into()),
            Failure::Closed
        ));
        assert!(matches!(
            cannot_write(io::ErrorKind::StorageFull.into()),
            Failure::Told { .. }
        ));
    }
}
