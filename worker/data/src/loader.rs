//! Samples in the plan's order, the batches of one rank, and a thread that reads them ahead.

use std::fmt;
use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use supra_recipes::Plan;

use crate::{DataError, Manifest, Reader};

/// One sample: a window of the packed stream, with its number in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Sample number: counts from 0 over the whole run.
    pub id: u64,
    /// `sequence_length + 1` tokens: inputs are all but the last, targets all but the first.
    pub tokens: Vec<u32>,
    /// Ascending positions `p` in `0..=sequence_length` at which token `p` begins a document. Position 0 is among them
    /// only if a document really begins there.
    pub starts: Vec<u32>,
}

/// The samples of one rank in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// In the plan's order.
    pub samples: Vec<Sample>,
}

/// Reads the samples of a plan.
#[derive(Debug)]
pub struct Loader {
    reader: Reader,
    plan: Plan,
    /// Samples of the pool that the reader holds.
    pool: Range<u64>,
}

impl Loader {
    /// Joins a reader and the plan made for its dataset.
    pub fn new(reader: Reader, plan: Plan) -> Loader {
        Loader {
            reader,
            plan,
            pool: 0..0,
        }
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The dataset.
    pub fn manifest(&self) -> &Manifest {
        self.reader.manifest()
    }

    /// Sample `i`. Samples of one pool may come in any order at no cost; another pool is fetched first.
    ///
    /// # Errors
    /// When the plan was made for another dataset or sequence length; when a file cannot be read or has changed.
    pub fn sample(&mut self, i: u64) -> Result<Sample, DataError> {
        let (planned, found) = (
            (self.plan.windows, self.plan.sequence_length),
            (self.reader.windows(), self.reader.sequence_length()),
        );
        if planned != found {
            return Err(DataError::Request(format!(
                "{}: the plan is for {} windows of {} tokens, the dataset holds {} of {}: plan again with this dataset",
                self.manifest().path().display(),
                planned.0,
                planned.1,
                found.0,
                found.1
            )));
        }
        if !self.pool.contains(&i) {
            let pool = self.plan.pool_of(i);
            // Empty while the fetch is under way, so that one that fails is tried again.
            self.pool = 0..0;
            self.reader.hold(&pool.blocks)?;
            self.pool = pool.samples;
        }
        let (tokens, starts) = self.reader.window(self.plan.window(i))?;
        Ok(Sample {
            id: i,
            tokens,
            starts,
        })
    }
}

/// The samples that rank `rank` of `world` trains in step `step` (counted from 1; a step outside the plan has none).
///
/// # Errors
/// As [`Loader::sample`].
pub fn batch(loader: &mut Loader, step: u64, rank: u32, world: u32) -> Result<Batch, DataError> {
    let samples = loader.plan.rank_samples(step, rank, world);
    Ok(Batch {
        samples: samples
            .map(|i| loader.sample(i))
            .collect::<Result<_, _>>()?,
    })
}

/// A thread that reads one rank's batches ahead, and makes something of each; an iterator over `(step, that)`.
///
/// It ends after the plan's last step or after an error. Dropping it ends the thread.
pub struct Prefetch<T> {
    /// `None` only while it is dropped.
    receiver: Option<Receiver<Result<(u64, T), DataError>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Prefetch<T> {
    /// Reads the batches of rank `rank` of `world` from step `first` to the plan's last, up to `ahead` steps ahead (at
    /// least one), and calls `prepare` with each. When the system gives no thread, the first item says so.
    pub fn start(
        mut loader: Loader,
        first: u64,
        rank: u32,
        world: u32,
        ahead: usize,
        mut prepare: impl FnMut(Batch) -> T + Send + 'static,
    ) -> Prefetch<T> {
        let (sender, receiver) = sync_channel(ahead.max(1));
        let path = loader.manifest().path().to_owned();
        let no_thread = sender.clone();
        let read = move || {
            for step in first..=loader.plan.steps {
                let item =
                    batch(&mut loader, step, rank, world).map(|batch| (step, prepare(batch)));
                let failed = item.is_err();
                if sender.send(item).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("read-ahead".to_owned())
            .spawn(read);
        let thread = thread
            .map_err(DataError::io("start a thread to read", &path))
            .map_err(|error| no_thread.try_send(Err(error)))
            .ok();
        Prefetch {
            receiver: Some(receiver),
            thread,
        }
    }
}

impl<T> Iterator for Prefetch<T> {
    type Item = Result<(u64, T), DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Ok(item) = self.receiver.as_ref()?.recv() {
            return Some(item);
        }
        // The thread is gone: it is done, has reported its error, or has panicked, which must not look like the end.
        let panicked = self.thread.take()?.join().is_err();
        panicked.then(|| {
            Err(DataError::Request(
                "the thread that reads ahead panicked; see its message above".to_owned(),
            ))
        })
    }
}

impl<T> Drop for Prefetch<T> {
    fn drop(&mut self) {
        // Closing the channel first frees a thread that waits to send.
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // Whoever drops this wants no more batches, nor the reason why there would be none.
            let _ = thread.join();
        }
    }
}

impl<T> fmt::Debug for Prefetch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prefetch")
    }
}
