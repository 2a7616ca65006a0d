//! The tables of the journal.
//!
//! | table | row |
//! |---|---|
//! | `facts` | `seq`, run, fact as JSON |
//! | `ledger` | run, index, `seq`, hash, body bytes |
//! | `snapshot` | one row: the state after fact `seq`, as JSON |
//!
//! `seq` numbers facts and ledger records together, in the order in which they were decided.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::JournalError;
use crate::ledger::{self, Body, Hash, Record, RecordError};
use crate::machine::{Fact, RunNumber, State};

/// Format of the tables, kept in `PRAGMA user_version`.
const FORMAT: i64 = 1;

/// Shape of the snapshot. A snapshot of another shape is passed over and everything replayed.
const SNAPSHOT_FORMAT: i64 = 3;

/// Facts between two snapshots.
const SNAPSHOT_EVERY: u64 = 4096;

const TABLES: &str = "
    CREATE TABLE facts (seq INTEGER PRIMARY KEY, run INTEGER NOT NULL, fact TEXT NOT NULL);
    CREATE TABLE ledger (
        run INTEGER NOT NULL, idx INTEGER NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL, body BLOB NOT NULL,
        PRIMARY KEY (run, idx)
    ) WITHOUT ROWID;
    CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, format INTEGER NOT NULL, state TEXT NOT NULL);
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
            found => supported(&path, found)?,
        }
        let (state, seq, snapshot_seq) = replay(&path, &connection)?;
        let mut store = Store {
            path,
            connection,
            state,
            seq,
            snapshot_seq,
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
            transaction
                .execute(
                    "INSERT OR REPLACE INTO snapshot (id, seq, format, state) VALUES (1, ?1, ?2, ?3)",
                    params![self.seq as i64, SNAPSHOT_FORMAT, json(&self.state).map_err(sqlite)?],
                )
                .map_err(sqlite)?;
            self.snapshot_seq = self.seq;
        }
        transaction.commit().map_err(sqlite)
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
        let mut statement =
            connection.prepare_cached("INSERT INTO facts (seq, run, fact) VALUES (?1, ?2, ?3)")?;
        statement.execute(params![seq as i64, fact.run(), json(fact)?])?;
    }
    Ok(())
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

/// The state that the journal holds, the number of its last fact and that of its snapshot.
fn replay(path: &Path, connection: &Connection) -> Result<(State, u64, u64), JournalError> {
    let sqlite = |cause| JournalError::Sqlite {
        path: path.to_owned(),
        cause,
    };
    let damaged = |what: String| JournalError::Damaged {
        path: path.to_owned(),
        what,
    };
    let (mut state, snapshot_seq) = snapshot(connection).map_err(sqlite)?;
    let mut facts = facts_after(connection, snapshot_seq)
        .map_err(sqlite)?
        .into_iter()
        .peekable();
    let mut records = records_after(connection, &state).map_err(sqlite)?;
    records.sort_by_key(|row| row.seq);
    let mut records = records.into_iter().peekable();
    let mut last = snapshot_seq;
    loop {
        let record_first = match (facts.peek(), records.peek()) {
            (None, None) => return Ok((state, last, snapshot_seq)),
            (Some((seq, _)), Some(record)) => record.seq < *seq,
            (fact, _) => fact.is_none(),
        };
        let (seq, fact) = if record_first {
            let Some(row) = records.next() else { continue };
            let tail = state.run(row.run).map(|run| run.ledger).unwrap_or_default();
            let what = || damaged(format!("ledger record {} of run {}", row.index, row.run));
            let body = Body::decode(&row.body).ok_or_else(what)?;
            let record = Record {
                index: row.index,
                previous: tail.head,
                hash: row.hash,
                body,
            };
            if tail.next(record.body.clone()) != record {
                return Err(what());
            }
            (
                row.seq,
                Fact::Recorded {
                    run: row.run,
                    record,
                },
            )
        } else {
            let Some((seq, text)) = facts.next() else {
                continue;
            };
            (seq, read_fact(path, seq, &text)?)
        };
        if seq != last + 1 {
            return Err(damaged(format!("fact {} is missing", last + 1)));
        }
        state.apply(&fact);
        last = seq;
    }
}

/// A fact of a kind that this version does not know is no damage: going on without it would forget a decision.
fn read_fact(path: &Path, seq: u64, text: &str) -> Result<Fact, JournalError> {
    serde_json::from_str(text).map_err(|cause| {
        let path = path.to_owned();
        if cause.to_string().starts_with("unknown variant") {
            return JournalError::Unknown { path, seq, cause };
        }
        let what = format!("fact {seq}: {cause}");
        JournalError::Damaged { path, what }
    })
}

fn snapshot(connection: &Connection) -> rusqlite::Result<(State, u64)> {
    let row: Option<(i64, String)> = connection
        .query_row(
            "SELECT seq, state FROM snapshot WHERE format = ?1",
            [SNAPSHOT_FORMAT],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let known = row.and_then(|(seq, text)| Some((serde_json::from_str(&text).ok()?, seq as u64)));
    Ok(known.unwrap_or_default())
}

fn facts_after(connection: &Connection, seq: u64) -> rusqlite::Result<Vec<(u64, String)>> {
    let mut statement =
        connection.prepare("SELECT seq, fact FROM facts WHERE seq > ?1 ORDER BY seq")?;
    let rows = statement.query_map([seq as i64], |row| {
        Ok((row.get::<_, i64>(0)? as u64, row.get(1)?))
    })?;
    rows.collect()
}

struct Row {
    run: RunNumber,
    index: u64,
    seq: u64,
    hash: Hash,
    body: Vec<u8>,
}

impl Row {
    fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
        Ok(Row {
            run: row.get(0)?,
            index: row.get::<_, i64>(1)? as u64,
            seq: row.get::<_, i64>(2)? as u64,
            hash: row.get(3)?,
            body: row.get(4)?,
        })
    }
}

/// Ledger rows that the snapshot does not hold, run by run.
fn records_after(connection: &Connection, snapshot: &State) -> rusqlite::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut of_run = connection
        .prepare("SELECT run, idx, seq, hash, body FROM ledger WHERE run = ?1 AND idx >= ?2")?;
    for run in snapshot.runs() {
        for row in of_run.query_map(params![run.number, run.ledger.length as i64], Row::read)? {
            rows.push(row?);
        }
    }
    let newest = snapshot.runs().len() as i64;
    let mut of_new =
        connection.prepare("SELECT run, idx, seq, hash, body FROM ledger WHERE run > ?1")?;
    for row in of_new.query_map([newest], Row::read)? {
        rows.push(row?);
    }
    Ok(rows)
}

/// A second, reading connection: for clients, and for audits without a coordinator.
#[derive(Debug)]
pub struct Reader {
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
        Ok(Reader { path, connection })
    }

    /// The state that the journal holds.
    ///
    /// # Errors
    /// It is damaged.
    pub fn state(&self) -> Result<State, JournalError> {
        Ok(replay(&self.path, &self.connection)?.0)
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
            .map_err(|cause| JournalError::Sqlite {
                path: self.path.clone(),
                cause,
            })
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
