//! How a child ended, in words.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use nix::sys::signal::Signal;

/// One line for people: "exit code 1: what it said last".
pub(super) fn describe(status: ExitStatus, last_words: &str) -> String {
    let mut text = match (status.code(), status.signal().map(Signal::try_from)) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(Ok(Signal::SIGKILL))) => "killed by SIGKILL (out of memory?)".to_owned(),
        (None, Some(Ok(Signal::SIGALRM))) => {
            "killed by SIGALRM (it did not leave a void generation)".to_owned()
        }
        (None, Some(Ok(signal))) => format!("killed by {signal}"),
        (None, Some(Err(_)) | None) => status.to_string(),
    };
    if !last_words.is_empty() {
        text.push_str(": ");
        text.push_str(last_words);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_read_well() {
        let cases = [
            (9, "", "killed by SIGKILL (out of memory?)"),
            (11, "loading", "killed by SIGSEGV: loading"),
            (1 << 8, "no such device", "exit code 1: no such device"),
            (
                14,
                "",
                "killed by SIGALRM (it did not leave a void generation)",
            ),
        ];
        for (raw, words, expected) in cases {
            assert_eq!(describe(ExitStatus::from_raw(raw), words), expected);
        }
    }
}
