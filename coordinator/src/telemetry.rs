//! Metrics, log lines and accounts of time: shown to people, decided on by nobody, so kept beside the journal.
//!
//! `STATE/telemetry.db`, written by one thread in batches. Both stores are bounded: metrics of a long run are thinned to
//! every second, fourth, … step; of log lines the newest are kept. If it cannot be written the runs go on without it.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use rusqlite::Connection;
use supra_proto::v1::{LogEntry, StepMetrics};
use tokio::sync::oneshot;

use crate::machine::RunNumber;

mod reader;
mod writer;

pub use reader::TelemetryReader;
use writer::Writer;

/// Rows that a run may have before every second one goes.
const MAX_METRICS: u64 = 100_000;

/// Longest text of a log line, bytes.
const MAX_TEXT: usize = 8192;

const FORMAT: i64 = 3;

const TABLES: &str = "
    CREATE TABLE metrics (
        run INTEGER NOT NULL, step INTEGER NOT NULL, generation INTEGER NOT NULL, tokens INTEGER NOT NULL,
        loss REAL, grad_norm REAL, learning_rate REAL, skipped INTEGER NOT NULL,
        seconds REAL, data_seconds REAL, exposed_comm_ms REAL,
        PRIMARY KEY (run, step)
    ) WITHOUT ROWID;
    CREATE TABLE strides (run INTEGER PRIMARY KEY, stride INTEGER NOT NULL);
    CREATE TABLE logs (
        id INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER NOT NULL, unix_ms INTEGER NOT NULL,
        source TEXT NOT NULL, level TEXT NOT NULL, text TEXT NOT NULL
    );
    CREATE INDEX logs_of_run ON logs (run, id);
";

/// Came with format 3.
const ACCOUNTS: &str =
    "CREATE TABLE IF NOT EXISTS accounts (run INTEGER PRIMARY KEY, account TEXT NOT NULL);";

enum Item {
    Metrics(RunNumber, StepMetrics),
    Void { run: RunNumber, after_step: u64 },
    Log(RunNumber, LogEntry),
    Account { run: RunNumber, json: String },
    Flush(oneshot::Sender<()>),
}

/// The writing end.
#[derive(Debug)]
pub struct Telemetry {
    items: Option<mpsc::Sender<Item>>,
    thread: Option<thread::JoinHandle<()>>,
    path: PathBuf,
}

/// The store of a state directory.
pub fn file(directory: &Path) -> PathBuf {
    directory.join("telemetry.db")
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
        let path = file(directory);
        let connection = Connection::open(&path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let steps = match version {
            0 => TABLES,
            // Then all of the communication was exposed.
            1 => {
                "ALTER TABLE metrics RENAME COLUMN comm_seconds TO exposed_comm_ms;
                 UPDATE metrics SET exposed_comm_ms = 1000 * exposed_comm_ms;"
            }
            _ => "",
        };
        connection.execute_batch(&format!(
            "BEGIN; {steps} {ACCOUNTS} PRAGMA user_version = {FORMAT}; COMMIT;"
        ))?;
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

    /// Keeps the account of a run's time, as JSON; the one before is replaced.
    pub fn account(&self, run: RunNumber, json: String) {
        self.send(Item::Account { run, json });
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
        telemetry.account(1, "{}".into());
        telemetry.account(1, "[]".into());
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
        assert_eq!(reader.account(1).unwrap().as_deref(), Some("[]"));
        assert_eq!(reader.account(2).unwrap(), None);
    }

    #[tokio::test]
    async fn the_seconds_of_an_older_store_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let connection = Connection::open(directory.path().join("telemetry.db")).unwrap();
        let old = TABLES.replace("exposed_comm_ms", "comm_seconds");
        let row = "INSERT INTO metrics VALUES (1, 1, 1, 10, 2.0, 1.0, 0.1, 0, 0.5, 0.0, 0.25)";
        connection
            .execute_batch(&format!("{old} {row}; PRAGMA user_version = 1;"))
            .unwrap();
        drop(connection);
        for _ in 0..2 {
            let telemetry = Telemetry::open(directory.path()).unwrap();
            let newest = telemetry.reader().unwrap().newest(1).unwrap().unwrap();
            assert_eq!((newest.seconds, newest.exposed_comm_ms), (0.5, 250.0));
            assert_eq!(telemetry.reader().unwrap().account(1).unwrap(), None);
        }
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
