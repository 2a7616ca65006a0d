//! The line between the compute thread and whoever controls it.
//!
//! [`pair`] makes both ends for one generation: the training loop holds the [`Link`], the control
//! thread the [`LinkControl`]. A test holds the other end itself and needs no coordinator.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use supra_proto::v1::{Evaluated, Formed, Gates, Held, LogLine, Phase, SnapshotTaken, StepReport};
use tokio::sync::mpsc;

use crate::collective::{AbortHandle, Waiting};
use crate::job::Outcome;
use crate::unfinished::Unfinished;

/// Reports that may wait for the control thread before the training loop has to.
pub(crate) const QUEUE: usize = 256;

/// The generation is void: leave it and return [`Outcome::Voided`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the generation is void")]
pub struct Voided;

/// What the training loop tells the control thread.
#[derive(Clone, Debug, PartialEq)]
pub enum Report {
    /// It began something else, or another step.
    Phase(Phase, u64),
    /// The rank has loaded its state and its collective works.
    Formed(Formed),
    /// A step is done.
    Step(StepReport),
    /// The held-out loss of the state behind a step is measured.
    Evaluated(Evaluated),
    /// So are its linearisation gates.
    Gates(Gates),
    /// A checkpoint is on disk and lacks its manifest.
    CheckpointFilled(Unfinished),
    /// A snapshot is whole, with the neighbour's part.
    SnapshotTaken(SnapshotTaken),
    /// A line for `supra logs`.
    Log(LogLine),
    /// The loop is about to return, and this state stays in memory until it gets the next job.
    Held(Held),
    /// The training loop has returned; the last report of a generation.
    Done(Outcome),
}

/// A report and the job that it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Tagged {
    /// Number of the job, counted by this process.
    pub job: u64,
    /// What it says.
    pub report: Report,
}

#[derive(Debug, Default)]
struct Shared {
    void: AtomicBool,
    stop: AtomicBool,
    regroup: AtomicBool,
    checkpoints: Mutex<Checkpoints>,
    told: Mutex<Told>,
    changed: Condvar,
    abort: AbortHandle,
    waiting: Waiting,
}

/// Checkpoints that are asked for.
#[derive(Debug, Default)]
struct Checkpoints {
    /// One that is newer than that of this step is asked for.
    newer_than: Option<u64>,
    /// Step of the last one that was begun.
    begun: Option<u64>,
}

/// What the training loop may wait for.
#[derive(Debug, Default)]
struct Told {
    /// Last published step.
    published: Option<u64>,
}

impl Shared {
    fn checkpoints(&self) -> MutexGuard<'_, Checkpoints> {
        let checkpoints = self.checkpoints.lock();
        checkpoints.unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The training loop's end. Cheap to clone; clones are the same line.
#[derive(Clone, Debug)]
pub struct Link {
    shared: Arc<Shared>,
    job: u64,
    reports: mpsc::Sender<Tagged>,
}

impl Link {
    /// Whether the generation is void. One atomic load: ask at least once per transformer block.
    pub fn void(&self) -> bool {
        self.shared.void.load(Ordering::Relaxed)
    }

    /// Whether the coordinator asked to stop after the step in hand, with a checkpoint. The ranks
    /// learn it at different moments and have to agree on the step among themselves.
    pub fn stop_requested(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// Whether the coordinator asked to end the generation after the step in hand, for another
    /// membership. The ranks agree on the step as for a stop, which goes before it.
    pub fn regroup_requested(&self) -> bool {
        self.shared.regroup.load(Ordering::Relaxed)
    }

    /// Whether the coordinator asked for a checkpoint after the step in hand, and none was begun since. Only rank 0 is asked: it
    /// tells the others.
    pub fn checkpoint_requested(&self) -> bool {
        let checkpoints = self.shared.checkpoints();
        let asked = checkpoints.newer_than;
        asked.is_some_and(|newest| checkpoints.begun.is_none_or(|begun| begun <= newest))
    }

    /// Says what the worker is doing; `step` is the step in hand, 0 outside training.
    pub fn phase(&self, phase: Phase, step: u64) {
        self.send(Report::Phase(phase, step));
    }

    /// Says that state is loaded and the collective works.
    pub fn formed(&self, formed: Formed) {
        self.send(Report::Formed(formed));
    }

    /// Reports an applied or skipped step.
    pub fn step(&self, report: StepReport) {
        self.send(Report::Step(report));
    }

    /// Reports the held-out loss of the state behind a step.
    pub fn evaluated(&self, evaluated: Evaluated) {
        self.send(Report::Evaluated(evaluated));
    }

    /// Reports the linearisation gates of such a state (rank 0 only).
    pub fn gates(&self, gates: Gates) {
        self.send(Report::Gates(gates));
    }

    /// Says that the checkpoint of a step is being written: one that is asked for need not be begun again.
    pub fn checkpoint_begun(&self, step: u64) {
        self.shared.checkpoints().begun = Some(step);
    }

    /// Reports a synced checkpoint of a step that this rank has reported; its manifest follows when the coordinator has heard
    /// of the step from all ranks (rank 0 only).
    pub fn checkpoint_filled(&self, checkpoint: Unfinished) {
        self.send(Report::CheckpointFilled(checkpoint));
    }

    /// Reports a snapshot that is whole, with the neighbour's part.
    pub fn snapshot_taken(&self, taken: SnapshotTaken) {
        self.send(Report::SnapshotTaken(taken));
    }

    /// Says which state stays in memory when the loop has returned. Only the last thing before that.
    pub fn held(&self, held: Held) {
        self.send(Report::Held(held));
    }

    /// Blocks until the checkpoint of `step` is published. Only for the rank that wrote it: the
    /// others learn of it from that rank.
    pub fn await_published(&self, step: u64) -> Result<(), Voided> {
        let mut told = self.shared.told();
        loop {
            if self.void() {
                return Err(Voided);
            }
            if told.published >= Some(step) {
                return Ok(());
            }
            told = self
                .shared
                .changed
                .wait(told)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Adds a line to `supra logs`; `level` is "INFO", "WARN" or "ERROR".
    pub fn log(&self, level: &str, text: impl Into<String>) {
        let since_epoch = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let unix_ms = since_epoch.as_millis() as u64;
        self.send(Report::Log(LogLine {
            unix_ms,
            level: level.to_owned(),
            text: text.into(),
        }));
    }

    /// Blocks while the queue is full; without anybody at the other end reports go nowhere.
    pub(crate) fn send(&self, report: Report) {
        let tagged = Tagged {
            job: self.job,
            report,
        };
        self.reports.blocking_send(tagged).ok();
    }

    pub(crate) fn job(&self) -> u64 {
        self.job
    }

    /// What ends the collectives of this generation when it becomes void.
    pub fn abort_handle(&self) -> AbortHandle {
        self.shared.abort.clone()
    }

    /// The clock of this rank's waits for others: whoever blocks in an exchange says so with it.
    pub fn waiting(&self) -> Waiting {
        self.shared.waiting.clone()
    }
}

/// The controlling end of a [`Link`]. Dropping it voids the generation.
#[derive(Debug)]
pub struct LinkControl {
    shared: Arc<Shared>,
}

impl LinkControl {
    /// Voids the generation: raises the flag, aborts the collective, frees waiters.
    pub fn void(&self) {
        {
            // Under the lock of the waiters, or one that has just looked would sleep on.
            let _told = self.shared.told();
            self.shared.void.store(true, Ordering::SeqCst);
            self.shared.changed.notify_all();
        }
        self.shared.abort.abort();
    }

    /// Asks to stop after the step in hand, with a checkpoint.
    pub fn request_stop(&self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }

    /// Asks to end the generation after the step in hand, for another membership.
    pub fn request_regroup(&self) {
        self.shared.regroup.store(true, Ordering::SeqCst);
    }

    /// For how long the training loop has waited in an exchange for other ranks; zero when it does not.
    pub fn waited(&self) -> Duration {
        self.shared.waiting.lasted()
    }

    /// Asks for a checkpoint after the step in hand, newer than that of step `newest`.
    pub fn request_checkpoint(&self, newest: u64) {
        self.shared.checkpoints().newer_than = Some(newest);
    }

    /// Shuts the connections to other ranks down, as a broken network would.
    pub fn reset(&self) {
        self.shared.abort.reset();
    }

    /// Frees whoever waits for the publication of the checkpoint of `step`.
    pub fn published(&self, step: u64) {
        let mut told = self.shared.told();
        told.published = told.published.max(Some(step));
        self.shared.changed.notify_all();
    }
}

impl Drop for LinkControl {
    fn drop(&mut self) {
        self.void();
    }
}

/// The reports of a [`pair`], for tests and for training without a coordinator.
#[derive(Debug)]
pub struct Reports {
    receiver: mpsc::Receiver<Tagged>,
}

impl Reports {
    /// The next report; blocks. None when every clone of the link is gone.
    pub fn recv(&mut self) -> Option<Report> {
        self.receiver.blocking_recv().map(|tagged| tagged.report)
    }

    /// The next report if there is one.
    pub fn try_recv(&mut self) -> Option<Report> {
        self.receiver.try_recv().ok().map(|tagged| tagged.report)
    }
}

/// Both ends of a line of its own, and what comes over it.
///
/// At most 256 reports wait: somebody has to receive them.
pub fn pair() -> (Link, LinkControl, Reports) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (link, control) = on_queue(0, sender);
    (link, control, Reports { receiver })
}

/// Both ends of a line for job number `job` that reports to `reports`.
pub(crate) fn on_queue(job: u64, reports: mpsc::Sender<Tagged>) -> (Link, LinkControl) {
    let shared = Arc::new(Shared::default());
    let link = Link {
        shared: Arc::clone(&shared),
        job,
        reports,
    };
    (link, LinkControl { shared })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_publication_frees_the_waiter() {
        let (link, control, _reports) = pair();
        let waiter = std::thread::spawn(move || link.await_published(7));
        control.published(6);
        control.published(7);
        assert_eq!(waiter.join().unwrap(), Ok(()));
    }

    #[test]
    fn a_checkpoint_is_asked_for_until_a_newer_one_begins() {
        let (link, control, _reports) = pair();
        assert!(!link.checkpoint_requested());
        control.request_checkpoint(3);
        assert!(link.checkpoint_requested());
        link.checkpoint_begun(7);
        assert!(!link.checkpoint_requested());
        control.request_checkpoint(3);
        assert!(!link.checkpoint_requested(), "a repeat changes nothing");
        control.request_checkpoint(7);
        assert!(link.checkpoint_requested());
    }

    #[test]
    fn a_void_frees_the_waiter_and_aborts_the_collective() {
        let (link, control, _reports) = pair();
        let abort = link.abort_handle();
        let waiter = std::thread::spawn(move || link.await_published(7));
        std::thread::sleep(Duration::from_millis(20));
        control.void();
        assert_eq!(waiter.join().unwrap(), Err(Voided));
        assert!(abort.aborted());
    }

    #[test]
    fn losing_the_control_end_voids() {
        let (link, control, _reports) = pair();
        assert!(!link.void());
        drop(control);
        assert!(link.void());
        assert_eq!(link.await_published(1), Err(Voided));
    }

    #[test]
    fn reports_without_a_receiver_do_not_block() {
        let (link, _control, reports) = pair();
        drop(reports);
        let start = Instant::now();
        for step in 0..1000 {
            link.phase(Phase::Training, step);
        }
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}
