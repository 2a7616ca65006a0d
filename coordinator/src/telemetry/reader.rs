//! Reading metrics, log lines and accounts.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row};
use supra_proto::v1::{LogEntry, StepMetrics};

use super::file;
use crate::machine::RunNumber;

/// A reading connection to the telemetry.
#[derive(Debug)]
pub struct TelemetryReader {
    pub(super) connection: Connection,
}

const COLUMNS: &str = "step, generation, tokens, loss, grad_norm, learning_rate, skipped, seconds, data_seconds, exposed_comm_ms";

impl TelemetryReader {
    /// Opens the store of a state directory for reading. Works beside a running coordinator.
    ///
    /// # Errors
    /// There is none, or SQLite cannot read it.
    pub fn open(directory: &Path) -> rusqlite::Result<TelemetryReader> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(file(directory), flags)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        Ok(TelemetryReader { connection })
    }

    /// The kept metrics of a run, in order of steps.
    ///
    /// # Errors
    /// SQLite cannot read the table.
    pub fn metrics(&self, run: RunNumber) -> rusqlite::Result<Vec<StepMetrics>> {
        let mut statement = self.connection.prepare(&format!(
            "SELECT {COLUMNS} FROM metrics WHERE run = ?1 ORDER BY step"
        ))?;
        statement.query_map([run], metrics_of)?.collect()
    }

    /// The newest kept metrics of a run.
    ///
    /// # Errors
    /// SQLite cannot read the table.
    pub fn newest(&self, run: RunNumber) -> rusqlite::Result<Option<StepMetrics>> {
        let query =
            format!("SELECT {COLUMNS} FROM metrics WHERE run = ?1 ORDER BY step DESC LIMIT 1");
        self.connection
            .query_row(&query, [run], metrics_of)
            .optional()
    }

    /// The newest account of a run's time, as JSON.
    ///
    /// # Errors
    /// SQLite cannot read the table.
    pub fn account(&self, run: RunNumber) -> rusqlite::Result<Option<String>> {
        self.connection
            .query_row(
                "SELECT account FROM accounts WHERE run = ?1",
                [run],
                |row| row.get(0),
            )
            .optional()
    }

    /// The kept log lines of a run, oldest first.
    ///
    /// # Errors
    /// SQLite cannot read the table.
    pub fn logs(&self, run: RunNumber) -> rusqlite::Result<Vec<LogEntry>> {
        let mut statement = self
            .connection
            .prepare("SELECT unix_ms, source, level, text FROM logs WHERE run = ?1 ORDER BY id")?;
        let rows = statement.query_map([run], |row| {
            let unix_ms: i64 = row.get(0)?;
            Ok(LogEntry {
                unix_ms: unix_ms as u64,
                source: row.get(1)?,
                level: row.get(2)?,
                text: row.get(3)?,
            })
        })?;
        rows.collect()
    }
}

/// SQLite keeps NaN as NULL.
fn metrics_of(row: &Row<'_>) -> rusqlite::Result<StepMetrics> {
    let whole = |column: usize| row.get::<_, i64>(column).map(|value| value as u64);
    let real = |column: usize| {
        row.get::<_, Option<f64>>(column)
            .map(|value| value.unwrap_or(f64::NAN))
    };
    Ok(StepMetrics {
        step: whole(0)?,
        generation: whole(1)?,
        tokens: whole(2)?,
        loss: real(3)?,
        grad_norm: real(4)?,
        learning_rate: real(5)?,
        skipped: row.get(6)?,
        seconds: real(7)?,
        data_seconds: real(8)?,
        exposed_comm_ms: real(9)?,
        // The journal has it.
        heldout_loss: None,
    })
}
