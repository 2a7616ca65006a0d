//! `supra checkpoints --verify`: reads checkpoints again, on the machine where it is called.

use std::io::{IsTerminal, stderr};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use supra_checkpoint::examine::{self, Care, Findings};
use supra_checkpoint::{Store, StoredError};
use supra_proto::v1;

use crate::cli::failure::{Exit, Failure};
use crate::cli::runs::Json;
use crate::cli::{format, out};
use crate::ledger::Hash;

/// What reading a checkpoint again has shown: an element of `supra checkpoints --verify --json`.
#[derive(Debug, Serialize)]
pub(super) struct Checked {
    step: u64,
    path: String,
    verdict: Verdict,
    /// Files that are what was written.
    files: u64,
    /// What is wrong, a line each.
    problems: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// Every file is what was written.
    Whole,
    /// A file is not, or is missing.
    Damaged,
    /// A file cannot be read.
    Unreadable,
    /// There is no such directory on this machine.
    Absent,
}

/// Reads `checkpoints` again, says what it shows, and ends with 4 when one is damaged.
///
/// # Errors
/// [`Failure::Closed`] when nobody reads any more.
pub(super) fn verify(checkpoints: &[v1::Checkpoint], json: Json) -> Result<Exit, Failure> {
    let mut checked = Vec::new();
    for checkpoint in checkpoints {
        let one = check(checkpoint);
        if !json.json {
            out::text(&render(&one))?;
        }
        checked.push(one);
    }
    if json.json {
        out::json(&checked)?;
    }
    Ok(exit(&checked))
}

/// Damage goes before what could not be looked at.
fn exit(checked: &[Checked]) -> Exit {
    let any = |verdict| checked.iter().any(|one| one.verdict == verdict);
    if any(Verdict::Damaged) {
        Exit::Broken
    } else if any(Verdict::Unreadable) || any(Verdict::Absent) {
        Exit::Failed
    } else {
        Exit::Done
    }
}

fn check(checkpoint: &v1::Checkpoint) -> Checked {
    let bar = bar(checkpoint);
    let mut read = |bytes| {
        bar.inc(bytes);
        true
    };
    let found = match Hash::try_from(checkpoint.manifest_hash.as_slice()) {
        Ok(hash) => match Store::open(&checkpoint.path) {
            Ok(store) => {
                examine::published(&store, &hash, Care::Thorough, &mut read).unwrap_or(None)
            }
            Err(error) => Some(Findings {
                problems: vec![error],
                right: 0,
            }),
        },
        Err(_) => None,
    };
    bar.finish_and_clear();
    let verdict = match &found {
        None => Verdict::Absent,
        Some(found) if found.damage().is_some() => Verdict::Damaged,
        Some(found) if !found.problems.is_empty() => Verdict::Unreadable,
        Some(_) => Verdict::Whole,
    };
    let found = found.unwrap_or_default();
    Checked {
        step: checkpoint.step,
        path: checkpoint.path.clone(),
        verdict,
        files: found.right,
        problems: found.problems.iter().map(StoredError::finding).collect(),
    }
}

/// Progress on stderr, where that is a terminal.
fn bar(checkpoint: &v1::Checkpoint) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let target = ProgressDrawTarget::stderr();
    let bar = ProgressBar::with_draw_target(Some(checkpoint.bytes), target);
    let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(format!("step {}", format::grouped(checkpoint.step)));
    bar
}

fn render(checked: &Checked) -> String {
    let step = format::grouped(checked.step);
    let files = format::counted(checked.files, "file");
    let mut text = match checked.verdict {
        Verdict::Whole => format!("step {step}: whole, {files} as written\n"),
        Verdict::Damaged => format!("step {step}: DAMAGED: {}\n", checked.path),
        Verdict::Unreadable => format!("step {step}: cannot be read: {}\n", checked.path),
        Verdict::Absent => format!(
            "step {step}: not on this machine: there is no directory {}. Run this where it is.\n",
            checked.path
        ),
    };
    for problem in &checked.problems {
        text.push_str(&format!("  {problem}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use std::path::Path;

    use super::*;

    fn checkpoint(path: &Path) -> v1::Checkpoint {
        v1::Checkpoint {
            step: 8,
            path: path.display().to_string(),
            manifest_hash: vec![7; 32],
            ..v1::Checkpoint::default()
        }
    }

    #[test]
    fn damage_is_named_and_ends_with_four_and_absence_does_not() {
        let root = tempfile::tempdir().unwrap();
        let absent = check(&checkpoint(&root.path().join("step-8")));
        assert!(render(&absent).contains("not on this machine"));
        fs::write(root.path().join("manifest.json"), "{}").unwrap();
        let damaged = check(&checkpoint(root.path()));
        let text = render(&damaged);
        for part in ["step 8: DAMAGED", "manifest.json: its BLAKE3 is"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(exit(&[]), Exit::Done);
        assert_eq!(exit(&[absent]), Exit::Failed);
        let absent = check(&checkpoint(&root.path().join("step-8")));
        assert_eq!(exit(&[absent, damaged]), Exit::Broken);
    }
}
