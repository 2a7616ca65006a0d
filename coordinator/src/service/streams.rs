//! Streams down to clients: what changes, what is logged, what was trained.

use std::ops::ControlFlow;
use std::time::Duration;

use supra_proto::v1::{LedgerPart, LedgerRecord, LogEntry, RunStatus};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::handle::{Ended, Handle};
use crate::journal::{JournalError, Reader};
use crate::ledger::{Hash, hex, lines};
use crate::machine::RunNumber;

/// Messages that may wait for a slow client.
const QUEUE: usize = 256;

/// A watching client gets no more than ten statuses per second, and looks again after a second without change, since
/// waiting times and speeds change by themselves.
const PAUSE: Duration = Duration::from_millis(100);
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Ledger records that are read at once.
const PAGE: usize = 4096;

pub(super) type Stream<T> = ReceiverStream<Result<T, Status>>;
type Sink<T> = mpsc::Sender<Result<T, Status>>;

fn stream<T>() -> (Sink<T>, Stream<T>) {
    let (sink, receiver) = mpsc::channel(QUEUE);
    (sink, ReceiverStream::new(receiver))
}

/// A stream of what is known already.
pub(super) fn all<T: Send + 'static>(items: Vec<T>) -> Stream<T> {
    let (sink, receiver) = stream();
    tokio::spawn(async move {
        for item in items {
            if sink.send(Ok(item)).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// The status of a run now and at every change, until it has ended.
pub(super) fn watch(owner: Handle, run: RunNumber) -> Stream<RunStatus> {
    let (sink, receiver) = stream();
    tokio::spawn(async move {
        let mut changes = owner.changes();
        let mut last = None;
        loop {
            changes.mark_unchanged();
            let Ok((status, ended)) = owner
                .look(move |owner| (owner.status(run), owner.ended(run)))
                .await
            else {
                let _ = sink.send(Err(Ended.into())).await;
                return;
            };
            if last.as_ref() != Some(&status) {
                last = Some(status.clone());
                if sink.send(Ok(status)).await.is_err() {
                    return;
                }
            }
            if ended {
                return;
            }
            tokio::select! {
                () = sleep(PAUSE) => {}
                () = sink.closed() => return,
            }
            tokio::select! {
                _ = timeout(LOOK_AGAIN, changes.changed()) => {}
                () = sink.closed() => return,
            }
        }
    });
    receiver
}

/// Kept lines of a run, then new ones if asked for.
pub(super) fn logs(
    kept: Vec<LogEntry>,
    run: RunNumber,
    follow: Option<broadcast::Receiver<(RunNumber, LogEntry)>>,
) -> Stream<LogEntry> {
    let (sink, receiver) = stream();
    tokio::spawn(async move {
        for entry in kept {
            if sink.send(Ok(entry)).await.is_err() {
                return;
            }
        }
        let Some(mut lines) = follow else { return };
        loop {
            let next = tokio::select! {
                line = lines.recv() => line,
                () = sink.closed() => return,
            };
            let line = match next {
                Ok((about, entry)) if about == run => Ok(entry),
                Ok(_) => continue,
                Err(broadcast::error::RecvError::Lagged(lines)) => Err(Status::data_loss(format!(
                    "too slow: {lines} lines are missing; ask again"
                ))),
                Err(broadcast::error::RecvError::Closed) => return,
            };
            let over = line.is_err();
            if sink.send(line).await.is_err() || over {
                return;
            }
        }
    });
    receiver
}

/// The ledger of a run from the journal, page by page.
pub(super) fn ledger(reader: Reader, run: RunNumber) -> Stream<LedgerRecord> {
    let (sink, receiver) = stream();
    tokio::task::spawn_blocking(move || {
        let mut from = 0;
        while let ControlFlow::Continue(next) = page(&reader, run, from, &sink) {
            from = next;
        }
    });
    receiver
}

/// Sends one page; continues with the index of the next one.
fn page(
    reader: &Reader,
    run: RunNumber,
    from: u64,
    sink: &Sink<LedgerRecord>,
) -> ControlFlow<(), u64> {
    let records = match reader.ledger(run, from, PAGE) {
        Ok(records) => records,
        Err(error) => {
            let _ = sink.blocking_send(Err(Status::internal(error.to_string())));
            return ControlFlow::Break(());
        }
    };
    let mut next = from;
    for record in records {
        next = record.as_ref().map_or(next, |record| record.index) + 1;
        let wire = record
            .map(|record| LedgerRecord::from(&record))
            .map_err(|error| Status::data_loss(error.to_string()));
        if sink.blocking_send(wire).is_err() {
            return ControlFlow::Break(());
        }
    }
    if next == from {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(next)
    }
}

/// The file of a run's ledger up to the record with the hash `head`, page by page.
pub(super) fn ledger_file(reader: Reader, run: RunNumber, head: Hash) -> Stream<LedgerPart> {
    let (sink, receiver) = stream();
    tokio::task::spawn_blocking(move || {
        let next = Some(0);
        let mut parts = LedgerFile {
            reader,
            run,
            head,
            next,
        };
        parts.try_for_each(|part| sink.blocking_send(part).map_err(drop))
    });
    receiver
}

/// The pages of such a file.
struct LedgerFile {
    reader: Reader,
    run: RunNumber,
    head: Hash,
    /// First record of the next page; none behind the head, or what cannot be read.
    next: Option<u64>,
}

impl Iterator for LedgerFile {
    type Item = Result<LedgerPart, Status>;

    fn next(&mut self) -> Option<Self::Item> {
        let from = self.next.take()?;
        Some(self.page(from))
    }
}

impl LedgerFile {
    fn page(&mut self, from: u64) -> Result<LedgerPart, Status> {
        let internal = |error: JournalError| Status::internal(error.to_string());
        let records = self.reader.ledger(self.run, from, PAGE).map_err(internal)?;
        if records.is_empty() {
            let head = hex(&self.head);
            return Err(Status::not_found(format!(
                "the ledger has no record with the hash {head}"
            )));
        }
        let next = from + records.len() as u64;
        let mut data = Vec::new();
        for record in records {
            let record = record.map_err(|error| Status::data_loss(error.to_string()))?;
            let hash = record.hash;
            lines::append(&mut data, record);
            if hash == self.head {
                return Ok(LedgerPart { data });
            }
        }
        self.next = Some(next);
        Ok(LedgerPart { data })
    }
}
