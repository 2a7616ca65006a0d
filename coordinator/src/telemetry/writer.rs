//! The writing thread of the telemetry.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rusqlite::{Connection, Transaction, params};
use supra_proto::v1::{LogEntry, StepMetrics};

use super::{Item, MAX_TEXT};
use crate::machine::RunNumber;

/// Log lines that are kept, of all runs together, and lines between two clean-ups.
const MAX_LOGS: i64 = 50_000;
const CLEAN_EVERY: u64 = 1000;

/// Lines and metrics are written after this time at the latest.
const WRITE_AFTER: Duration = Duration::from_secs(1);

/// Metrics of a run: how many rows there are, and which steps are kept.
#[derive(Clone, Copy)]
struct Density {
    rows: u64,
    stride: u64,
}

pub(super) struct Writer {
    connection: Connection,
    max_metrics: u64,
    density: BTreeMap<RunNumber, Density>,
    logged: u64,
}

impl Writer {
    pub fn new(connection: Connection, max_metrics: u64) -> rusqlite::Result<Writer> {
        let mut density = BTreeMap::new();
        let mut counts = connection.prepare(
            "SELECT m.run, COUNT(*), COALESCE(MAX(s.stride), 1) FROM metrics m LEFT JOIN strides s ON s.run = m.run GROUP BY m.run",
        )?;
        let rows = counts.query_map([], |row| {
            let (rows, stride): (i64, i64) = (row.get(1)?, row.get(2)?);
            Ok((
                row.get(0)?,
                Density {
                    rows: rows as u64,
                    stride: stride.max(1) as u64,
                },
            ))
        })?;
        for row in rows {
            let (run, known) = row?;
            density.insert(run, known);
        }
        drop(counts);
        Ok(Writer {
            connection,
            max_metrics,
            density,
            logged: 0,
        })
    }

    pub fn serve(mut self, inbox: &mpsc::Receiver<Item>) {
        let mut pending = Vec::new();
        let mut since = Instant::now();
        loop {
            let patience = if pending.is_empty() {
                Duration::from_secs(3600)
            } else {
                WRITE_AFTER.saturating_sub(since.elapsed())
            };
            let mut flushed = None;
            let closed = match inbox.recv_timeout(patience) {
                Ok(Item::Flush(done)) => {
                    flushed = Some(done);
                    false
                }
                Ok(item) => {
                    if pending.is_empty() {
                        since = Instant::now();
                    }
                    pending.push(item);
                    false
                }
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            if closed || flushed.is_some() || since.elapsed() >= WRITE_AFTER {
                if let Err(error) = self.write(std::mem::take(&mut pending)) {
                    tracing::warn!("metrics and log lines are lost: telemetry.db: {error}");
                }
                if let Some(done) = flushed {
                    let _ = done.send(());
                }
            }
            if closed {
                return;
            }
        }
    }

    fn write(&mut self, items: Vec<Item>) -> rusqlite::Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        let transaction = self.connection.transaction()?;
        for item in items {
            match item {
                Item::Metrics(run, metrics) => {
                    let density = self
                        .density
                        .entry(run)
                        .or_insert(Density { rows: 0, stride: 1 });
                    keep(&transaction, run, &metrics, density, self.max_metrics)?;
                }
                Item::Void { run, after_step } => {
                    let gone = transaction.execute(
                        "DELETE FROM metrics WHERE run = ?1 AND step > ?2",
                        params![run, after_step as i64],
                    )?;
                    if let Some(density) = self.density.get_mut(&run) {
                        density.rows = density.rows.saturating_sub(gone as u64);
                    }
                }
                Item::Account { run, json } => {
                    transaction.execute(
                        "INSERT OR REPLACE INTO accounts (run, account) VALUES (?1, ?2)",
                        params![run, json],
                    )?;
                }
                Item::Log(run, entry) => {
                    write_log(&transaction, run, &entry)?;
                    self.logged += 1;
                    if self.logged.is_multiple_of(CLEAN_EVERY) {
                        transaction.execute(
                            "DELETE FROM logs WHERE id <= (SELECT MAX(id) FROM logs) - ?1",
                            [MAX_LOGS],
                        )?;
                    }
                }
                Item::Flush(_) => {}
            }
        }
        transaction.commit()
    }
}

/// Keeps the metrics of a step that the run's stride keeps; thins the run out when it has too many.
fn keep(
    transaction: &Transaction<'_>,
    run: RunNumber,
    metrics: &StepMetrics,
    density: &mut Density,
    max: u64,
) -> rusqlite::Result<()> {
    if !metrics.step.is_multiple_of(density.stride) {
        return Ok(());
    }
    let mut statement = transaction.prepare_cached(
        "INSERT OR REPLACE INTO metrics (run, step, generation, tokens, loss, grad_norm, learning_rate, skipped, seconds, \
         data_seconds, exposed_comm_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?;
    statement.execute(params![
        run,
        metrics.step as i64,
        metrics.generation as i64,
        metrics.tokens as i64,
        metrics.loss,
        metrics.grad_norm,
        metrics.learning_rate,
        metrics.skipped,
        metrics.seconds,
        metrics.data_seconds,
        metrics.exposed_comm_ms,
    ])?;
    density.rows += 1;
    if density.rows <= max {
        return Ok(());
    }
    density.stride *= 2;
    transaction.execute(
        "INSERT OR REPLACE INTO strides (run, stride) VALUES (?1, ?2)",
        params![run, density.stride as i64],
    )?;
    transaction.execute(
        "DELETE FROM metrics WHERE run = ?1 AND step % ?2 != 0",
        params![run, density.stride as i64],
    )?;
    let rows: i64 = transaction.query_row(
        "SELECT COUNT(*) FROM metrics WHERE run = ?1",
        [run],
        |row| row.get(0),
    )?;
    density.rows = rows as u64;
    Ok(())
}

fn write_log(
    transaction: &Transaction<'_>,
    run: RunNumber,
    entry: &LogEntry,
) -> rusqlite::Result<()> {
    let text = &entry.text[..entry.text.floor_char_boundary(MAX_TEXT)];
    let mut statement = transaction.prepare_cached(
        "INSERT INTO logs (run, unix_ms, source, level, text) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?;
    statement.execute(params![
        run,
        entry.unix_ms as i64,
        entry.source,
        entry.level,
        text
    ])?;
    Ok(())
}
