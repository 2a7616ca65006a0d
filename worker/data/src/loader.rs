//! Samples in the plan's order, batches of one rank, and reading them ahead.
use crate::{DataError, Reader};
use supra_recipes::Plan;
/// One sample: a window of the packed stream with its number in the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Sample number: counts from 0 over the whole run.
    pub id: u64,
    /// `sequence_length + 1` tokens: inputs are all but the last, targets all but the first.
    pub tokens: Vec<u32>,
    /// Ascending positions `p` in `0..=sequence_length` at which token `p` begins a document.
    pub starts: Vec<u32>,
}
/// The samples of one rank in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// In the plan's order.
    pub samples: Vec<Sample>,
}
/// Samples of a plan.
#[derive(Debug)]
pub struct Loader {
    reader: Reader,
    plan: Plan,
}
impl Loader {
    /// Joins a reader and the plan made for its dataset.
    pub fn new(reader: Reader, plan: Plan) -> Loader {
        Loader { reader, plan }
    }
    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }
    /// Sample `i`.
    ///
    /// # Errors
    /// Bad input.
    pub fn sample(&mut self, i: u64) -> Result<Sample, DataError> {
        let (tokens, starts) = self.reader.window(self.plan.window(i))?;
        Ok(Sample {
            id: i,
            tokens,
            starts,
        })
    }
}
/// The samples that rank `rank` of `world` trains in step `step` (counted from 1).
///
/// # Errors
/// Bad input.
pub fn batch(loader: &mut Loader, step: u64, rank: u32, world: u32) -> Result<Batch, DataError> {
    let range = loader.plan.rank_samples(step, rank, world);
    Ok(Batch {
        samples: range.map(|i| loader.sample(i)).collect::<Result<_, _>>()?,
    })
}
/// A thread that reads batches ahead.
#[derive(Debug)]
pub struct Prefetch {
    receiver: std::sync::mpsc::Receiver<Result<(u64, Batch), DataError>>,
}
impl Prefetch {
    /// Reads the batches of `rank` of `world` from step `from` to the plan's last, at most `ahead` steps ahead.
    pub fn start(mut loader: Loader, from: u64, rank: u32, world: u32, ahead: usize) -> Prefetch {
        let (sender, receiver) = std::sync::mpsc::sync_channel(ahead);
        std::thread::spawn(move || {
            for step in from..=loader.plan.steps {
                let item = batch(&mut loader, step, rank, world).map(|batch| (step, batch));
                if sender.send(item).is_err() {
                    break;
                }
            }
        });
        Prefetch { receiver }
    }
}
/// Yields `(step, batch)`; ends after the plan's last step, or after an error.
impl Iterator for Prefetch {
    type Item = Result<(u64, Batch), DataError>;
    fn next(&mut self) -> Option<Self::Item> {
        self.receiver.recv().ok()
    }
}
