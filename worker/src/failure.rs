//! How errors are shown.

use std::error::Error;

/// An error and everything that caused it, in one paragraph.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some libraries repeat their source in their own words.
        if !text.ends_with(&cause_text) {
            text += ": ";
            text += &cause_text;
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read x")]
    struct Outer(#[source] io::Error);

    #[test]
    fn causes_follow_once() {
        assert_eq!(
            chain(&Outer(io::Error::other("no such disk"))),
            "cannot read x: no such disk"
        );
    }
}
