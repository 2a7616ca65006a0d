//! Metrics and log lines: shown to people, decided on by nobody, so kept beside the journal.
//!
//! `STATE/telemetry.db`, written by one thread in batches. Both stores are bounded: metrics of a long run are thinned to
//! every second, fourth, … step; of log lines the newest are kept. If it cannot be written the runs go on without it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use supra_proto::v1::{LogEntry, StepMetrics};
use tokio::sync::oneshot;

use crate::machine::RunNumber;

/// Rows that a run may have before every second one goes.
const MAX_METRICS: u64 = 100_000;

/// Log lines that are kept, of all runs together, and lines between two clean-ups.
const MAX_LOGS: i64 = 50_000;
const CLEAN_EVERY: u64 = 1000;

/// Longest text of a log line, bytes.
const MAX_TEXT: usize = 8192;

/// Lines and metrics are written after this time at the latest.
const WRITE_AFTER: Duration = Duration::from_secs(1);

const FORMAT: i64 = 1;

const TABLES: &str = "
    CREATE TABLE metrics (
        run INTEGER NOT NULL, step INTEGER NOT NULL, generation INTEGER NOT NULL, tokens INTEGER NOT NULL,
        loss REAL, grad_norm REAL, learning_rate REAL, skipped INTEGER NOT NULL,
        seconds REAL, data_seconds REAL, comm_seconds REAL,
        PRIMARY KEY (run, step)
    ) WITHOUT ROWID;
    CREATE TABLE strides (run INTEGER PRIMARY KEY, stride INTEGER NOT NULL);
    CREATE TABLE logs (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL, unix_ms INTEGER NOT NULL,
        source TEXT NOT NULL, level TEXT NOT NULL, text TEXT NOT NULL
    );
    CREATE INDEX logs_of_run ON logs (run, id);
";

enum Item {
    Metrics(RunNumber, StepMetrics),
    Void { run: RunNumber, after_step: u64 },
    Log(RunNumber, LogEntry),
    Flush(oneshot::Sender<()>),
}

/// The writing end.
#[derive(Debug)]
pub struct Telemetry {
    items: Option<mpsc::Sender<Item>>,
    thread: Option<thread::JoinHandle<()>>,
    path: PathBuf,
}

impl Telemetry {
    /// Opens or creates the store of a state directory.
    ///
    /// # Errors
    /// SQLite cannot.
    pub fn open(directory: &Path) -> rusqlite::Result<Telemetry> {
        Telemetry::with_limit(directory, MAX_METRICS)
    }

    fn with_limit(directory: &Path, max_metrics: u64) -> rusqlite::Result<Telemetry> {
        let path = directory.join("telemetry.db");
        let connection = Connection::open(&path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if version == 0 {
            connection.execute_batch(&format!(
                "BEGIN; {TABLES} PRAGMA user_version = {FORMAT}; COMMIT;"
            ))?;
        }
        let writer = Writer::new(connection, max_metrics)?;
        let (items, inbox) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("telemetry".into())
            .spawn(move || writer.serve(&inbox))
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        Ok(Telemetry {
            items: Some(items),
            thread: Some(thread),
            path,
        })
    }

    /// Keeps the metrics of a step; those of the same step before are replaced.
    pub fn measured(&self, run: RunNumber, metrics: StepMetrics) {
        self.send(Item::Metrics(run, metrics));
    }

    /// Forgets steps that are void.
    pub fn void(&self, run: RunNumber, after_step: u64) {
        self.send(Item::Void { run, after_step });
    }

    /// Keeps a log line. Run 0 is for lines that are about no run.
    pub fn log(&self, run: RunNumber, entry: LogEntry) {
        self.send(Item::Log(run, entry));
    }

    /// Ready when everything so far is written, or never will be.
    pub fn written(&self) -> impl Future<Output = ()> + Send + use<> {
        let (done, flushed) = oneshot::channel();
        self.send(Item::Flush(done));
        async move {
            let _ = flushed.await;
        }
    }

    /// A reading connection.
    ///
    /// # Errors
    /// SQLite cannot open it.
    pub fn reader(&self) -> rusqlite::Result<TelemetryReader> {
        let connection = Connection::open(&self.path)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(TelemetryReader { connection })
    }

    fn send(&self, item: Item) {
        if let Some(items) = &self.items {
            // Fails only when the thread has given up, which it has said in the log.
            let _ = items.send(item);
        }
    }
}

impl Drop for Telemetry {
    /// Writes what is left.
    fn drop(&mut self) {
        self.items = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Metrics of a run: how many rows there are, and which steps are kept.
#[derive(Clone, Copy)]
struct Density {
    rows: u64,
    stride: u64,
}

struct Writer {
    connection: Connection,
    max_metrics: u64,
    density: BTreeMap<RunNumber, Density>,
    logged: u64,
}

impl Writer {
    fn new(connection: Connection, max_metrics: u64) -> rusqlite::Result<Writer> {
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

    fn serve(mut self, inbox: &mpsc::Receiver<Item>) {
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
         data_seconds, comm_seconds) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
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
        metrics.comm_seconds,
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

/// A reading connection to the telemetry.
#[derive(Debug)]
pub struct TelemetryReader {
    connection: Connection,
}

const COLUMNS: &str = "step, generation, tokens, loss, grad_norm, learning_rate, skipped, seconds, data_seconds, comm_seconds";

impl TelemetryReader {
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
        comm_seconds: real(9)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            tokens: step * 10,
            loss: 2.0,
            ..StepMetrics::default()
        }
    }

    fn line(text: &str) -> LogEntry {
        LogEntry {
            unix_ms: 5,
            source: "a".into(),
            level: "INFO".into(),
            text: text.into(),
        }
    }

    #[tokio::test]
    async fn metrics_are_replaced_voided_and_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let telemetry = Telemetry::open(directory.path()).unwrap();
        for step in 1..=5 {
            telemetry.measured(1, metrics(step));
        }
        telemetry.void(1, 3);
        telemetry.measured(
            1,
            StepMetrics {
                loss: f64::NAN,
                generation: 2,
                ..metrics(4)
            },
        );
        telemetry.log(1, line("hello"));
        telemetry.log(2, line("other"));
        drop(telemetry);
        let telemetry = Telemetry::open(directory.path()).unwrap();
        let reader = telemetry.reader().unwrap();
        let kept = reader.metrics(1).unwrap();
        assert_eq!(
            kept.iter().map(|row| row.step).collect::<Vec<_>>(),
            [1, 2, 3, 4]
        );
        assert!(kept[3].loss.is_nan() && kept[3].generation == 2);
        assert_eq!(reader.newest(1).unwrap().unwrap().step, 4);
        assert_eq!(reader.newest(9).unwrap(), None);
        assert_eq!(reader.logs(1).unwrap(), [line("hello")]);
    }

    #[tokio::test]
    async fn long_runs_are_thinned_evenly() {
        let directory = tempfile::tempdir().unwrap();
        let telemetry = Telemetry::with_limit(directory.path(), 100).unwrap();
        for step in 1..=1000 {
            telemetry.measured(1, metrics(step));
        }
        telemetry.written().await;
        let steps: Vec<u64> = telemetry
            .reader()
            .unwrap()
            .metrics(1)
            .unwrap()
            .iter()
            .map(|row| row.step)
            .collect();
        assert!(steps.len() <= 100 && steps.len() > 40, "{}", steps.len());
        assert!(
            steps.windows(2).all(|pair| pair[1] - pair[0] == 16),
            "{steps:?}"
        );
    }

    #[tokio::test]
    async fn long_lines_are_cut_between_characters() {
        let directory = tempfile::tempdir().unwrap();
        let telemetry = Telemetry::open(directory.path()).unwrap();
        telemetry.log(1, line(&"é".repeat(MAX_TEXT)));
        telemetry.written().await;
        assert_eq!(
            telemetry.reader().unwrap().logs(1).unwrap()[0].text.len(),
            MAX_TEXT
        );
    }
}
