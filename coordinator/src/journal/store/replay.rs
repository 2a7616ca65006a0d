//! From the tables to the state: rows in the order of their facts, each proved by a hash before it is applied.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension, params};

use super::{SNAPSHOT_FORMAT, SUMS_SINCE, sum, version};
use crate::journal::JournalError;
use crate::ledger::{Body, Hash, Record};
use crate::machine::{Fact, RunNumber, State};

/// The state that the journal holds, the number of its last fact and that of its snapshot.
pub(super) fn replay(
    path: &Path,
    connection: &Connection,
) -> Result<(State, u64, u64), JournalError> {
    let sqlite = |cause| JournalError::Sqlite {
        path: path.to_owned(),
        cause,
    };
    let damaged = |what: String| JournalError::Damaged {
        path: path.to_owned(),
        what,
    };
    // A running coordinator writes meanwhile: all tables as they are at one moment.
    let alone = connection.is_autocommit();
    let moment = alone.then(|| connection.unchecked_transaction());
    let _moment = moment.transpose().map_err(sqlite)?;
    let sums = version(connection).map_err(sqlite)? >= SUMS_SINCE;
    let (mut state, snapshot_seq) = snapshot(path, connection, sums).map_err(sqlite)?;
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
            (Some(fact), Some(record)) => record.seq < fact.seq,
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
            let Some(row) = facts.next() else { continue };
            if sums && row.sum != Some(row.expected_sum()) {
                return Err(damaged(format!("fact {} was altered", row.seq)));
            }
            (row.seq, read_fact(path, row.seq, &row.fact)?)
        };
        if last.checked_add(1) != Some(seq) {
            return Err(damaged(format!("a fact after fact {last} is missing")));
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

/// The state of the snapshot and the number of its fact. Facts and records from the first one on are still there, with
/// hashes of their own, so one that is of another shape or was altered is passed over and everything replayed.
fn snapshot(path: &Path, connection: &Connection, sums: bool) -> rusqlite::Result<(State, u64)> {
    let row: Option<(i64, String, Option<Hash>)> = connection
        .query_row(
            &format!(
                "SELECT seq, state, {} FROM snapshot WHERE format = ?1",
                sum_column(sums)
            ),
            [SNAPSHOT_FORMAT],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .optional()?;
    let Some((seq, text, sum)) = row else {
        return Ok(Default::default());
    };
    let seq = seq.cast_unsigned();
    if sums && sum != Some(sum::of_snapshot(seq, SNAPSHOT_FORMAT, &text)) {
        tracing::warn!(
            "the snapshot in {} was altered: it is passed over, and everything replayed",
            path.display()
        );
        return Ok(Default::default());
    }
    Ok(serde_json::from_str(&text).map_or_else(|_| Default::default(), |state| (state, seq)))
}

/// What to select for the hash of a row.
fn sum_column(sums: bool) -> &'static str {
    if sums { "sum" } else { "NULL" }
}

/// A row of its table.
pub(super) struct FactRow {
    pub seq: u64,
    pub run: RunNumber,
    pub fact: String,
    pub sum: Option<Hash>,
}

impl FactRow {
    /// The hash that it was written with.
    pub fn expected_sum(&self) -> Hash {
        sum::of_fact(self.seq, self.run, &self.fact)
    }
}

/// The rows of `facts` after fact `seq`.
pub(super) fn facts_after(connection: &Connection, seq: u64) -> rusqlite::Result<Vec<FactRow>> {
    let sums = version(connection)? >= SUMS_SINCE;
    let mut statement = connection.prepare(&format!(
        "SELECT seq, run, fact, {} FROM facts WHERE seq > ?1 ORDER BY seq",
        sum_column(sums)
    ))?;
    let rows = statement.query_map([seq as i64], |row| {
        Ok(FactRow {
            seq: row.get::<_, i64>(0)?.cast_unsigned(),
            run: row.get(1)?,
            fact: row.get(2)?,
            sum: row.get(3)?,
        })
    })?;
    rows.collect()
}

/// A row of its table.
pub(super) struct Row {
    pub run: RunNumber,
    pub index: u64,
    pub seq: u64,
    pub hash: Hash,
    pub body: Vec<u8>,
}

impl Row {
    pub fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
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
