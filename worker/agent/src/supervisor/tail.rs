//! What a child said last.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Lines that are kept.
const LINES: usize = 3;

/// Bytes of a line that are kept.
const LENGTH: usize = 300;

/// The last lines of one output. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail {
    shared: Arc<Mutex<Kept>>,
}

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<String>,
    /// The line that is not complete.
    open: Vec<u8>,
}

impl Tail {
    /// Copies `from` to `to` up to its end, and keeps the last lines. Goes on when nobody reads
    /// `to` any more: a child must not be stopped by a full pipe. Blocks.
    pub fn pass(&self, mut from: impl Read, mut to: impl Write) {
        let mut bytes = vec![0; 1 << 14];
        let mut open = true;
        loop {
            let count = match from.read(&mut bytes) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            self.add(&bytes[..count]);
            if open {
                open = to
                    .write_all(&bytes[..count])
                    .and_then(|()| to.flush())
                    .is_ok();
            }
        }
    }

    fn add(&self, bytes: &[u8]) {
        let mut kept = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte == b'\n' || byte == b'\r' {
                kept.close();
            } else if kept.open.len() < LENGTH {
                kept.open.push(byte);
            }
        }
    }

    /// The last lines, joined; lines without text are left out.
    pub fn last_words(&self) -> String {
        let mut kept = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        kept.close();
        kept.lines
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(" / ")
    }
}

impl Kept {
    fn close(&mut self) {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.open))
            .trim()
            .to_owned();
        if line.is_empty() {
            return;
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_whatever_the_pieces() {
        let tail = Tail::default();
        for piece in ["one\ntwo\n\nth", "ree\r\nfo", "ur"] {
            tail.add(piece.as_bytes());
        }
        assert_eq!(tail.last_words(), "two / three / four");
    }

    #[test]
    fn an_endless_line_does_not_fill_the_memory() {
        let tail = Tail::default();
        tail.add(&vec![b'x'; 1 << 20]);
        assert_eq!(tail.last_words().len(), LENGTH);
    }
}
