//! The tables of the journal.
//!
//! | table | row |
//! |---|---|
//! | `facts` | `seq`, run, fact as JSON, a hash of these |
//! | `ledger` | run, index, `seq`, hash, body bytes |
//! | `snapshot` | one row: the state after fact `seq`, as JSON, a hash of these |
//!
//! `seq` numbers facts and ledger records together, in the order in which they were decided.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::JournalError;
use super::head::{self, Head};
use crate::ledger::{self, Body, Hash, Record, RecordError};
use crate::machine::{Fact, RunNumber, State};

mod replay;
mod sum;

use replay::{Row, facts_after, replay};

/// Format of the tables, kept in `PRAGMA user_version`.
const FORMAT: i64 = 2;

/// The first format whose facts and snapshots have hashes.
const SUMS_SINCE: i64 = 2;

/// Shape of the snapshot. A snapshot of another shape is passed over and everything replayed.
const SNAPSHOT_FORMAT: i64 = 3;

/// Facts between two snapshots.
const SNAPSHOT_EVERY: u64 = 4096;

const TABLES: &str = "
    CREATE TABLE facts (seq INTEGER PRIMARY KEY, run INTEGER NOT NULL, fact TEXT NOT NULL, sum BLOB);
    CREATE TABLE ledger (
        run INTEGER NOT NULL, idx INTEGER NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (run, idx)
    ) WITHOUT ROWID;
    CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, format INTEGER NOT NULL, state TEXT NOT NULL, sum BLOB);
";

/// The journal file of a state directory.
fn file(directory: &Path) -> PathBuf {
    directory.join("journal.db")
}

/// The journal's file and the state that it holds.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    connection: Connection,
    state: State,
    seq: u64,
    snapshot_seq: u64,
    head: Head,
}

impl Store {
    pub fn open(directory: &Path) -> Result<Store, JournalError> {
        let path = file(directory);
        let sqlite = |cause| JournalError::Sqlite {
            path: path.clone(),
            cause,
        };
        let connection = Connection::open(&path).map_err(sqlite)?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .map_err(sqlite)?;
        connection
            .pragma_update(None, "synchronous", "FULL")
            .map_err(sqlite)?;
        match version(&connection).map_err(sqlite)? {
            0 => {
                let create = format!("BEGIN; {TABLES} PRAGMA user_version = {FORMAT}; COMMIT;");
                connection.execute_batch(&create).map_err(sqlite)?;
            }
            found => {
                supported(&path, found)?;
                check_pages(&path, &connection)?;
                if found < SUMS_SINCE {
                    add_sums(&connection).map_err(sqlite)?;
                }
            }
        }
        let (state, seq, snapshot_seq) = replay(&path, &connection)?;
        head::compare(directory, head::read(directory)?, seq)?;
        let mut store = Store {
            path,
            connection,
            state,
            seq,
            snapshot_seq,
            head: Head::open(directory, seq)?,
        };
        if store.seq - store.snapshot_seq > SNAPSHOT_EVERY {
            store.commit(&[])?;
        }
        Ok(store)
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Writes facts in one transaction; on return they are on disk.
    pub fn commit(&mut self, facts: &[Fact]) -> Result<(), JournalError> {
        let sqlite = |cause| JournalError::Sqlite {
            path: self.path.clone(),
            cause,
        };
        let transaction = self.connection.transaction().map_err(sqlite)?;
        for fact in facts {
            self.seq += 1;
            insert(&transaction, self.seq, fact).map_err(sqlite)?;
            self.state.apply(fact);
        }
        if self.seq - self.snapshot_seq > SNAPSHOT_EVERY {
            let state = json(&self.state).map_err(sqlite)?;
            let sum = sum::of_snapshot(self.seq, SNAPSHOT_FORMAT, &state);
            transaction
                .execute(
                    "INSERT OR REPLACE INTO snapshot (id, seq, format, state, sum) VALUES (1, ?1, ?2, ?3, ?4)",
                    params![self.seq as i64, SNAPSHOT_FORMAT, state, sum],
                )
                .map_err(sqlite)?;
            self.snapshot_seq = self.seq;
        }
        transaction.commit().map_err(sqlite)?;
        self.head.advance(self.seq)
    }
}

fn json<T: serde::Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))
}

fn insert(connection: &Connection, seq: u64, fact: &Fact) -> rusqlite::Result<()> {
    if let Fact::Recorded { run, record } = fact {
        let mut statement = connection.prepare_cached(
            "INSERT INTO ledger (run, idx, seq, hash, body) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        statement.execute(params![
            run,
            record.index as i64,
            seq as i64,
            record.hash,
            record.body.encode()
        ])?;
    } else {
        let mut statement = connection
            .prepare_cached("INSERT INTO facts (seq, run, fact, sum) VALUES (?1, ?2, ?3, ?4)")?;
        let text = json(fact)?;
        let sum = sum::of_fact(seq, fact.run(), &text);
        statement.execute(params![seq as i64, fact.run(), text, sum])?;
    }
    Ok(())
}

/// Gives the facts of an older journal their hashes. Its snapshot has none and goes: the next one has.
fn add_sums(connection: &Connection) -> rusqlite::Result<()> {
    let transaction = connection.unchecked_transaction()?;
    transaction.execute_batch(&format!(
        "ALTER TABLE facts ADD COLUMN sum BLOB; ALTER TABLE snapshot ADD COLUMN sum BLOB; DELETE FROM snapshot;
         PRAGMA user_version = {FORMAT};"
    ))?;
    for fact in facts_after(&transaction, 0)? {
        transaction.execute(
            "UPDATE facts SET sum = ?2 WHERE seq = ?1",
            params![fact.seq as i64, fact.expected_sum()],
        )?;
    }
    transaction.commit()
}

fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn supported(path: &Path, found: i64) -> Result<(), JournalError> {
    if found > FORMAT {
        return Err(JournalError::Newer {
            path: path.to_owned(),
            found,
            known: FORMAT,
        });
    }
    Ok(())
}

/// Rows have hashes, but where SQLite finds room for the next ones has none: it would write over those that are there.
fn check_pages(path: &Path, connection: &Connection) -> Result<(), JournalError> {
    let found: String = connection
        .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
        .map_err(|cause| JournalError::Sqlite {
            path: path.to_owned(),
            cause,
        })?;
    match found.as_str() {
        "ok" => Ok(()),
        _ => Err(JournalError::Damaged {
            path: path.to_owned(),
            what: found,
        }),
    }
}

/// A second, reading connection: for clients, and for audits without a coordinator.
#[derive(Debug)]
pub struct Reader {
    directory: PathBuf,
    path: PathBuf,
    connection: Connection,
}

impl Reader {
    /// Opens the journal of a state directory for reading. Works beside a running coordinator.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn open(directory: &Path) -> Result<Reader, JournalError> {
        let path = file(directory);
        let sqlite = |cause| JournalError::Sqlite {
            path: path.clone(),
            cause,
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&path, flags).map_err(sqlite)?;
        connection
            .busy_timeout(std::time::Duration::from_secs(5))
            .map_err(sqlite)?;
        supported(&path, version(&connection).map_err(sqlite)?)?;
        Ok(Reader {
            directory: directory.to_owned(),
            path,
            connection,
        })
    }

    /// Whether the journal still has the last fact that is known to have been on disk.
    ///
    /// # Errors
    /// It has lost its end, or is damaged.
    pub fn check_end(&self) -> Result<(), JournalError> {
        // What a running coordinator adds meanwhile comes after what was known before.
        let known = head::read(&self.directory)?;
        let (_, seq, _) = replay(&self.path, &self.connection)?;
        head::compare(&self.directory, known, seq)
    }

    /// The state that the journal holds.
    ///
    /// # Errors
    /// It is damaged.
    pub fn state(&self) -> Result<State, JournalError> {
        Ok(replay(&self.path, &self.connection)?.0)
    }

    /// From here on everything is read as it is at the first read, whatever a coordinator writes meanwhile.
    ///
    /// # Errors
    /// SQLite refuses, or it is held already.
    pub fn hold(&self) -> Result<(), JournalError> {
        self.connection
            .execute_batch("BEGIN")
            .map_err(|cause| self.sqlite(cause))
    }

    /// The facts about a run, as JSON, in the order in which they were decided.
    ///
    /// # Errors
    /// SQLite cannot read the table.
    pub fn facts(&self, run: RunNumber) -> Result<Vec<String>, JournalError> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let query = "SELECT fact FROM facts WHERE run = ?1 ORDER BY seq";
            let mut statement = self.connection.prepare(query)?;
            statement.query_map([run], |row| row.get(0))?.collect()
        };
        read().map_err(|cause| self.sqlite(cause))
    }

    fn sqlite(&self, cause: rusqlite::Error) -> JournalError {
        JournalError::Sqlite {
            path: self.path.clone(),
            cause,
        }
    }

    /// At most `limit` ledger records of a run from `from` on, as they are stored: an unreadable one is an item of the
    /// list, so that an audit can say where it is.
    ///
    /// # Errors
    /// SQLite cannot read the table.
    pub fn ledger(
        &self,
        run: RunNumber,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Result<Record, RecordError>>, JournalError> {
        self.records(run, from, limit)
            .map_err(|cause| self.sqlite(cause))
    }

    fn records(
        &self,
        run: RunNumber,
        from: u64,
        limit: usize,
    ) -> rusqlite::Result<Vec<Result<Record, RecordError>>> {
        let mut before = self.connection.prepare_cached(
            "SELECT hash FROM ledger WHERE run = ?1 AND idx < ?2 ORDER BY idx DESC LIMIT 1",
        )?;
        let mut previous: Hash = before
            .query_row(params![run, from as i64], |row| row.get(0))
            .optional()?
            .unwrap_or_default();
        let mut statement = self.connection.prepare_cached(
            "SELECT run, idx, seq, hash, body FROM ledger WHERE run = ?1 AND idx >= ?2 ORDER BY idx LIMIT ?3",
        )?;
        let rows = statement.query_map(params![run, from as i64, limit as i64], Row::read)?;
        let mut records = Vec::new();
        for row in rows {
            let row = row?;
            let record = match Body::decode(&row.body) {
                Some(body) => Ok(ledger::Record {
                    index: row.index,
                    previous,
                    hash: row.hash,
                    body,
                }),
                None => Err(RecordError::Damaged { index: row.index }),
            };
            previous = row.hash;
            records.push(record);
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests;
