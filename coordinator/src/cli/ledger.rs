//! Reading a run's ledger: from the coordinator that has it, or from the journal of a state directory.

use std::path::Path;

use rusqlite::ErrorCode;
use supra_proto::Client;
use supra_proto::v1::RunStatus;

use super::failure::{Exit, Failure};
use crate::journal::{JournalError, Reader};
use crate::ledger::{Hash, Record, RecordError};
use crate::machine::Run;

/// Records that are read from the journal at once.
const CHUNK: usize = 4096;

/// One record, or why it cannot be read.
pub type Entry = Result<Record, RecordError>;

/// The journal of a state directory, opened at one of its runs. Reading changes nothing, whether or not a coordinator runs.
pub struct Offline {
    journal: Reader,
    /// The run as it was last looked up.
    pub run: Run,
}

impl Offline {
    /// Opens the run with this id or unique beginning of it; the newest for an empty text.
    ///
    /// # Errors
    /// No journal, an unreadable one, or an unknown run.
    pub fn open(state: &Path, run: &str) -> Result<Offline, Failure> {
        let journal = Reader::open(state).map_err(|error| match &error {
            JournalError::Sqlite { cause, .. }
                if cause.sqlite_error_code() == Some(ErrorCode::CannotOpen) =>
            {
                let state = state.display();
                Failure::input(format!(
                    "there is no journal in {state}: give the state directory of a coordinator."
                ))
            }
            _ => unreadable(error),
        })?;
        let run = lookup(&journal, run)?;
        Ok(Offline { journal, run })
    }

    /// The journal.
    pub fn journal(&self) -> &Reader {
        &self.journal
    }

    /// Looks the run up again.
    ///
    /// # Errors
    /// An unreadable journal.
    pub fn refresh(&mut self) -> Result<(), Failure> {
        self.run = lookup(&self.journal, &self.run.id)?;
        Ok(())
    }

    /// What is wrong with the end of the journal, if anything is.
    ///
    /// # Errors
    /// An unreadable journal.
    pub fn lost_end(&self) -> Result<Option<String>, Failure> {
        match self.journal.check_end() {
            Ok(()) => Ok(None),
            Err(error @ (JournalError::Cut { .. } | JournalError::Headless { .. })) => {
                Ok(Some(error.to_string().replace('\n', ";")))
            }
            Err(error) => Err(unreadable(error)),
        }
    }

    /// The head of the run's ledger; none while it has no records.
    pub fn head(&self) -> Option<Hash> {
        Some(self.run.ledger.head).filter(|head| *head != Hash::default())
    }

    /// Gives `take` all records up to the head; what a live coordinator adds meanwhile is left for the next time.
    ///
    /// # Errors
    /// An unreadable journal.
    pub fn each(&self, mut take: impl FnMut(Entry)) -> Result<(), Failure> {
        let head = self.head();
        let mut from = 0;
        loop {
            let records = self
                .journal
                .ledger(self.run.number, from, CHUNK)
                .map_err(unreadable)?;
            let last = records.len() < CHUNK;
            for entry in records {
                from = entry.as_ref().map_or(from, |record| record.index) + 1;
                let ends = entry.as_ref().is_ok_and(|record| head == Some(record.hash));
                take(entry);
                if ends {
                    return Ok(());
                }
            }
            if last {
                return Ok(());
            }
        }
    }
}

/// The head that a coordinator names; none for a ledger without records, whose head is zero.
pub fn head(status: &RunStatus) -> Option<Hash> {
    Hash::try_from(status.ledger_head.as_slice())
        .ok()
        .filter(|head| *head != Hash::default())
}

/// Gives `take` all records that a coordinator streams, up to the head that the status names: what a live run adds
/// meanwhile is left for the next time.
///
/// # Errors
/// The coordinator cannot be reached any more.
pub async fn each(
    client: &mut Client,
    status: &RunStatus,
    mut take: impl FnMut(Entry),
) -> Result<(), Failure> {
    let head = head(status);
    let mut records = client.ledger(&status.run).await?;
    while let Some(record) = records.next().await? {
        let entry = Record::try_from(record);
        let ends = entry.as_ref().is_ok_and(|record| head == Some(record.hash));
        take(entry);
        if ends {
            break;
        }
    }
    Ok(())
}

fn lookup(journal: &Reader, run: &str) -> Result<Run, Failure> {
    let known = journal.state().map_err(unreadable)?;
    find(known.runs(), run).cloned()
}

/// The run with this id or unique beginning of it; the newest for an empty text.
fn find<'a>(runs: &'a [Run], prefix: &str) -> Result<&'a Run, Failure> {
    let mut matching = runs.iter().rev().filter(|run| run.id.starts_with(prefix));
    let found = runs
        .iter()
        .find(|run| run.id == prefix)
        .or_else(|| matching.next());
    match found {
        None if prefix.is_empty() => Err(Failure::input("the journal holds no run yet.")),
        None => Err(Failure::input(format!(
            "the journal holds no run {prefix}."
        ))),
        Some(run) if prefix.is_empty() || run.id == prefix => Ok(run),
        Some(run) => match matching.next() {
            None => Ok(run),
            Some(other) => Err(Failure::input(format!(
                "{prefix} may be {} or {}: write more of it.",
                run.id, other.id
            ))),
        },
    }
}

/// A damaged journal breaks the proof; anything else only prevents it.
fn unreadable(error: JournalError) -> Failure {
    let exit = match &error {
        JournalError::Damaged { .. } | JournalError::Cut { .. } | JournalError::Headless { .. } => {
            Exit::Broken
        }
        JournalError::Sqlite { cause, .. } => match cause.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Exit::Broken,
            _ => Exit::Failed,
        },
        _ => Exit::Failed,
    };
    Failure::Told {
        exit,
        message: error.to_string(),
    }
}
