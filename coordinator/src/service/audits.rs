//! The audit of a run that has spent its budget under `chaos`: its mark depends on it.

use std::path::Path;

use crate::audit::{Auditor, Options, Outcome};
use crate::journal::Reader;
use crate::ledger::Hash;
use crate::machine::RunNumber;

/// Ledger records that are read at once.
const PAGE: usize = 4096;

/// Reads the ledger of a run from the journal of a state directory, and proves from it that every sample of the budget was
/// trained exactly once. `head` is the end that it has to have. Blocks.
///
/// # Errors
/// The first break, in one line; or why the ledger cannot be read.
pub(super) fn audit(state: &Path, run: RunNumber, head: Hash) -> Result<(), String> {
    let reader = Reader::open(state).map_err(|error| error.to_string())?;
    let mut auditor = Auditor::new(Options {
        head: Some(head),
        ..Options::default()
    });
    let mut from = 0;
    loop {
        let page = reader.ledger(run, from, PAGE);
        let page = page.map_err(|error| error.to_string())?;
        if page.is_empty() {
            break;
        }
        from += page.len() as u64;
        for record in page {
            match record {
                Ok(record) => auditor.push(&record),
                Err(error) => auditor.unreadable(&error),
            }
        }
    }
    let verdict = auditor.finish();
    match (verdict.verdict, verdict.breaks.first()) {
        (Outcome::Broken, Some(found)) => Err(format!("record {}: {}", found.record, found.what)),
        (Outcome::Broken, None) => Err("it is broken".to_owned()),
        (Outcome::Ok, _) if !verdict.finished => Err("it is not closed".to_owned()),
        (Outcome::Ok, _) => Ok(()),
    }
}
