//! The simulated training loop: what a rank does between its start and its return, and the ring that keeps the ranks of a
//! generation in step.

use std::collections::BTreeMap;

use rand::RngExt;
use supra_agent::link::{Report, Tagged};
use supra_agent::session::Input;
use supra_agent::{Outcome, Place, SnapshotTaken, Unfinished};
use supra_proto::v1::{CheckpointWritten, FaultKind, Phase as Said};

use super::World;
use super::disk::Saved;
use super::fault::Phase;
use super::ground::{Model, evaluated, ground};
use super::held::{Memory, Snapshots, Start, has_all};
use super::queue::{Event, MS, SECOND, Time};
use super::worker::Worker;

/// How long ranks look for each other.
const CONNECT: Time = 60 * SECOND;

/// What a training loop says that a fault has hit.
pub(super) const BROKEN: &str = "something is broken";

/// What the training loop comes to.
#[derive(Clone, Debug)]
pub(super) enum Work {
    Begin,
    /// Not all ranks have come.
    Impatient,
    Loaded,
    /// The forward and backward pass of a step is done.
    Computed,
    /// So is that over held-out windows.
    Measured,
    /// All ranks have come to where this one waits. What they agreed on there.
    Passed {
        wish: Wish,
        skipped: bool,
        drifted: bool,
        /// Every rank has its last snapshot whole.
        settled: bool,
    },
    /// The ranks have found that a device computes wrong: that of this rank, if they know.
    Hardware(Option<u32>),
    /// The neighbour's part of a snapshot is here.
    SnapshotPassed,
    /// The ring says that a rank is gone.
    RingBroke,
    Saved,
    ToldPublished(u64),
    /// Something breaks.
    Breaks(FaultKind),
    Aborted,
}

/// Where a rank is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Connecting,
    Loading,
    Computing,
    /// Its gradients are on the ring.
    Reducing,
    /// Measures the held-out loss, and waits for the others': before its first step, or after one at which every rank had its
    /// last snapshot whole, or not.
    Evaluating {
        first: bool,
        settled: bool,
    },
    Saving,
    /// Waits for its last snapshot, then for the one that it leaves for the next membership.
    Settling {
        begun: bool,
    },
    AwaitingPublished,
    /// Waits for rank 0's checkpoint.
    AwaitingRelease,
    Aborting,
}

/// What a rank was asked for; the ranks agree on the greatest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wish {
    #[default]
    Nothing,
    /// Write a checkpoint and go on.
    Checkpoint,
    /// Keep the state, for another membership.
    Regroup,
    /// Write a checkpoint.
    Stop,
}

/// A place in a generation, being worked on.
#[derive(Debug)]
pub(super) struct Job {
    pub number: u64,
    pub place: Place,
    pub stage: Stage,
    pub wish: Wish,
    /// A checkpoint newer than that of this step is asked for, and the step of the last one that was begun.
    pub asked: Option<u64>,
    begun: u64,
    pub model: Model,
    /// It has trained a step, so that its generation knows how long one takes.
    pub stepped: bool,
    /// It does not come back from computing any more.
    pub hangs: bool,
    /// Since when it waits for the other ranks.
    pub waits_since: Option<Time>,
    /// The model is a state, and not just none yet.
    loaded: bool,
    /// What the ranks agreed on after their last step.
    agreed: Wish,
    start: Option<Start>,
    /// What is in the files of its checkpoints.
    saved: BTreeMap<u64, Model>,
    snapshots: Option<Snapshots>,
}

impl Job {
    pub fn new(number: u64, place: Place) -> Job {
        let start = Start::of(&place);
        let wish = if place.stop {
            Wish::Stop
        } else {
            Wish::Nothing
        };
        Job {
            number,
            place,
            stage: Stage::Connecting,
            wish,
            asked: None,
            begun: 0,
            model: Model::default(),
            stepped: false,
            hangs: false,
            waits_since: None,
            loaded: false,
            agreed: Wish::Nothing,
            start,
            saved: BTreeMap::new(),
            snapshots: None,
        }
    }

    pub fn phase(&self) -> Phase {
        match self.stage {
            Stage::Connecting => Phase::Forming,
            Stage::Loading => Phase::Loading,
            Stage::Computing
            | Stage::Reducing
            | Stage::Evaluating { .. }
            | Stage::Settling { .. } => Phase::Training,
            Stage::Saving | Stage::AwaitingPublished | Stage::AwaitingRelease => {
                Phase::Checkpointing
            }
            Stage::Aborting => Phase::Leaving,
        }
    }

    /// It stands still in the middle of a step.
    pub fn stands_still(&self) -> bool {
        self.hangs && self.stage == Stage::Computing
    }

    /// What it tells the others at the end of a step.
    fn wishes(&self) -> Wish {
        let asked = self.asked.is_some_and(|newest| self.begun <= newest);
        self.wish.max(if asked {
            Wish::Checkpoint
        } else {
            Wish::Nothing
        })
    }

    fn unsettled(&self) -> bool {
        let snapshots = self.snapshots.as_ref();
        snapshots.is_some_and(|snapshots| snapshots.under_way.is_some())
    }

    fn key(&self) -> (String, u64) {
        (self.place.run.clone(), self.place.generation)
    }
}

/// The ranks of a generation that have found each other so far.
#[derive(Debug, Default)]
pub(super) struct Ring {
    members: Vec<Option<usize>>,
    arrived: Vec<bool>,
    wish: Wish,
    broken: bool,
    unsettled: bool,
    /// State that a holder gives to the others.
    held: Option<Model>,
    /// The same in parts: whose part of which state.
    parts: BTreeMap<u32, Model>,
}

impl World {
    /// Lets the training loop of a worker get on after a while.
    pub(super) fn work(&mut self, worker: usize, after: Time, work: Work) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let (epoch, job) = (self.workers[worker].epoch, job.number);
        self.queue.push(
            self.now + after,
            Event::Work {
                worker,
                epoch,
                job,
                work,
            },
        );
    }

    fn report(&mut self, worker: usize, report: Report) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let tagged = Tagged {
            job: job.number,
            report,
        };
        self.input(worker, Input::Report(tagged));
    }

    pub(super) fn works(&mut self, worker: usize, epoch: u32, number: u64, work: Work) {
        let stalled = self.workers[worker].ring_stalled_until;
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        if self.workers[worker].epoch != epoch || job.number != number || job.stands_still() {
            return;
        }
        let stage = job.stage;
        match (stage, work) {
            (Stage::Aborting, Work::Aborted) => self.done(worker, Outcome::Voided),
            (Stage::Aborting, _) => {}
            (_, Work::Begin | Work::Computed) if stalled > self.now => {
                let work = match stage {
                    Stage::Connecting => Work::Begin,
                    _ => Work::Computed,
                };
                self.work(worker, stalled - self.now, work);
            }
            (Stage::Connecting, Work::Begin) => {
                self.enter_held(worker);
                self.report(worker, Report::Phase(Said::Forming, 0));
                self.work(worker, CONNECT, Work::Impatient);
                self.join_ring(worker);
            }
            (Stage::Connecting, Work::Impatient) => {
                self.breaks(worker, FaultKind::Peer, "a neighbour did not come");
            }
            (Stage::Loading, Work::Loaded) => self.loaded(worker),
            (Stage::Computing, Work::Computed) => {
                self.enter(worker, Stage::Reducing);
                self.arrive(worker);
            }
            (Stage::Evaluating { .. }, Work::Measured) => self.arrive(worker),
            (
                _,
                Work::Passed {
                    wish,
                    skipped,
                    drifted,
                    settled,
                },
            ) => self.passed(worker, wish, skipped, drifted, settled),
            (_, Work::SnapshotPassed) => self.snapshot_passed(worker),
            (_, Work::Hardware(culprit)) => {
                let message = "a device computes wrong".to_owned();
                self.done(worker, Outcome::Hardware { culprit, message });
            }
            (_, Work::RingBroke) => self.breaks(worker, FaultKind::Peer, "a peer vanished"),
            (Stage::Saving, Work::Saved) => self.saved(worker),
            (Stage::AwaitingPublished, Work::ToldPublished(step)) if step >= job.model.step => {
                self.enter(worker, Stage::AwaitingRelease);
                self.arrive(worker);
            }
            (_, Work::Breaks(kind)) => self.breaks(worker, kind, BROKEN),
            _ => {}
        }
    }

    fn enter(&mut self, worker: usize, stage: Stage) {
        if let Some(job) = &mut self.workers[worker].job {
            job.stage = stage;
        }
    }

    fn breaks(&mut self, worker: usize, kind: FaultKind, message: &str) {
        let message = message.to_owned();
        self.done(worker, Outcome::Fault { kind, message });
    }

    /// The training loop is back; what another generation may start from stays in memory.
    fn done(&mut self, worker: usize, outcome: Outcome) {
        let orderly = matches!(
            outcome,
            Outcome::Finished | Outcome::Stopped | Outcome::Regrouped
        );
        self.leave_ring(worker, orderly);
        let Some(job) = self.workers[worker].job.take() else {
            return;
        };
        let memory = &mut self.workers[worker].memory;
        if job.loaded {
            let all = has_all(&job.place).then_some((job.place.generation, job.model));
            let kept = Memory {
                run: job.place.run.clone(),
                whole: all,
                parts: job
                    .snapshots
                    .map_or(Vec::new(), |snapshots| snapshots.whole),
            };
            let empty = kept.whole.is_none() && kept.parts.is_empty();
            *memory = (!empty).then_some(kept);
        }
        match outcome {
            Outcome::Voided | Outcome::Regrouped => {}
            Outcome::Fault {
                kind: FaultKind::Transient | FaultKind::Peer,
                ..
            } => {}
            // What is in the memory of a broken device is not kept.
            Outcome::Hardware { culprit, .. } if culprit != Some(job.place.rank) => {}
            _ => *memory = None,
        }
        if let Some(held) = memory.as_ref().map(Memory::held) {
            let report = Report::Held(held);
            self.input(
                worker,
                Input::Report(Tagged {
                    job: job.number,
                    report,
                }),
            );
        }
        let tagged = Tagged {
            job: job.number,
            report: Report::Done(outcome),
        };
        self.input(worker, Input::Report(tagged));
    }

    fn join_ring(&mut self, worker: usize) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let (world, rank) = (job.place.world as usize, job.place.rank as usize);
        let ring = self.rings.entry(job.key()).or_insert_with(|| Ring {
            members: vec![None; world],
            arrived: vec![false; world],
            ..Ring::default()
        });
        ring.members[rank] = Some(worker);
        if ring.broken {
            return self.work(worker, 100 * MS, Work::RingBroke);
        }
        self.arrive(worker);
    }

    /// A rank waits for the others; the last one frees all.
    fn arrive(&mut self, worker: usize) {
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        // Whoever connects has a limit of its own.
        job.waits_since = (job.stage != Stage::Connecting).then_some(self.now);
        let reducing = job.stage == Stage::Reducing;
        let step = job.model.step + 1;
        let key = job.key();
        let Some(ring) = self.rings.get_mut(&key) else {
            return;
        };
        ring.arrived[job.place.rank as usize] = true;
        if reducing {
            ring.wish = ring.wish.max(job.wishes());
            ring.unsettled |= job.unsettled();
        }
        if ring.broken || ring.arrived.contains(&false) {
            return;
        }
        ring.arrived.fill(false);
        let wish = std::mem::take(&mut ring.wish);
        let settled = !std::mem::take(&mut ring.unsettled);
        let members: Vec<usize> = ring.members.iter().flatten().copied().collect();
        let work = if !reducing {
            Work::Passed {
                wish,
                skipped: false,
                drifted: false,
                settled,
            }
        } else if members.len() > 1 && std::mem::take(&mut self.hardware) {
            let culprit = self.random.random_range(0..members.len() as u32);
            Work::Hardware(self.random.random_bool(0.8).then_some(culprit))
        } else {
            let fresh = self.skips.entry((key.0.clone(), step));
            let skipped = *fresh.or_insert_with(|| std::mem::take(&mut self.nonfinite));
            let drifted = !skipped && std::mem::take(&mut self.drift);
            self.watch
                .trained(&key.0, key.1, step, members.len(), drifted);
            Work::Passed {
                wish,
                skipped,
                drifted,
                settled,
            }
        };
        for member in members {
            let after = self.random.random_range(MS..15 * MS);
            self.work(member, after, work.clone());
        }
    }

    /// A rank is gone. Unless it has left in order, the others learn of it, or hang.
    pub(super) fn leave_ring(&mut self, worker: usize, orderly: bool) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let (key, rank) = (job.key(), job.place.rank as usize);
        let Some(ring) = self.rings.get_mut(&key) else {
            return;
        };
        if ring.members[rank].take().is_none() || orderly || ring.broken {
            return;
        }
        ring.broken = true;
        let members: Vec<usize> = ring.members.iter().flatten().copied().collect();
        for member in members {
            if self.random.random_bool(0.7) {
                let after = self.random.random_range(MS..900 * MS);
                self.work(member, after, Work::RingBroke);
            }
        }
    }

    fn passed(&mut self, worker: usize, wish: Wish, skipped: bool, drifted: bool, settled: bool) {
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        job.waits_since = None;
        match job.stage {
            Stage::Connecting => {
                job.stage = Stage::Loading;
                self.offer(worker);
                self.report(worker, Report::Phase(Said::Loading, 0));
                let after = self.random.random_range(50 * MS..700 * MS);
                self.work(worker, after, Work::Loaded);
            }
            Stage::Reducing => {
                job.model = job.model.trained(job.place.generation);
                job.agreed = wish;
                job.stepped = true;
                let (rank, world) = (job.place.rank, job.place.world);
                let model = job.model;
                let mut report = ground().report(&model, rank, world, skipped);
                if drifted {
                    report.loss_sum *= 2.0;
                }
                self.report(worker, Report::Step(report));
                self.evaluate(worker, false, settled);
            }
            Stage::Evaluating { first, settled } => {
                let report = Report::Evaluated(evaluated(job.model.step));
                self.report(worker, report);
                self.go_on(worker, first, settled);
            }
            Stage::Settling { begun: false } => {
                self.begin_snapshot(worker);
                self.enter(worker, Stage::Settling { begun: true });
            }
            Stage::Settling { begun: true } => {
                let (step, rank, wish) = (job.model.step, job.place.rank, job.agreed);
                self.after_step(worker, step, wish, rank);
            }
            Stage::AwaitingRelease => {
                let step = job.model.step;
                if step == ground().plan.steps {
                    self.done(worker, Outcome::Finished);
                } else {
                    match job.agreed {
                        Wish::Nothing | Wish::Checkpoint => self.next_step(worker),
                        Wish::Regroup => self.done(worker, Outcome::Regrouped),
                        Wish::Stop => self.done(worker, Outcome::Stopped),
                    }
                }
            }
            _ => {}
        }
    }

    /// Measures the held-out loss where that is due.
    fn evaluate(&mut self, worker: usize, first: bool, settled: bool) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let step = job.model.step;
        if !ground().plan.evaluation_due(step) {
            return self.go_on(worker, first, settled);
        }
        self.enter(worker, Stage::Evaluating { first, settled });
        self.report(worker, Report::Phase(Said::Evaluating, step));
        let after = self.random.random_range(10 * MS..200 * MS);
        self.work(worker, after, Work::Measured);
    }

    /// What comes after the state behind a step is measured.
    fn go_on(&mut self, worker: usize, first: bool, settled: bool) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        if first {
            self.begin(worker);
        } else {
            self.snapshot_after(worker, job.agreed, settled);
        }
    }

    fn after_step(&mut self, worker: usize, step: u64, wish: Wish, rank: u32) {
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        match wish {
            _ if ground().due(&job.place.recipe, step) => {}
            Wish::Nothing => return self.next_step(worker),
            Wish::Regroup => return self.done(worker, Outcome::Regrouped),
            Wish::Checkpoint | Wish::Stop => {}
        }
        job.begun = step;
        self.report(worker, Report::Phase(Said::Checkpointing, step));
        if rank == 0 {
            self.enter(worker, Stage::Saving);
            let after = self.random.random_range(20 * MS..800 * MS);
            self.work(worker, after, Work::Saved);
        } else {
            self.enter(worker, Stage::AwaitingRelease);
            self.arrive(worker);
        }
    }

    fn next_step(&mut self, worker: usize) {
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        let step = job.model.step + 1;
        if step > ground().plan.steps {
            // It started from the end, whose checkpoint was not published before.
            return self.done(worker, Outcome::Finished);
        }
        job.stage = Stage::Computing;
        self.report(worker, Report::Phase(Said::Training, step));
        let after = self.random.random_range(150 * MS..450 * MS);
        self.work(worker, after, Work::Computed);
    }

    /// A generation that is to start from a state in memory has it as its own, even if it comes to nothing.
    fn enter_held(&mut self, worker: usize) {
        let Worker { job, memory, .. } = &mut self.workers[worker];
        let (Some(job), Some(memory)) = (job, memory) else {
            return;
        };
        if let Some(start) = &job.start
            && let Some(model) = memory.whole(&start.state)
        {
            memory.whole = Some((job.place.generation, model));
        }
    }

    /// A holder gives its state, or the parts that it was asked for, to the ring. Of anything else there is no room for two.
    fn offer(&mut self, worker: usize) {
        let Worker { job, memory, .. } = &mut self.workers[worker];
        let Some(job) = job else { return };
        let Some(Start {
            state,
            holder,
            parts,
        }) = &job.start
        else {
            return *memory = None;
        };
        let Some(ring) = self.rings.get_mut(&job.key()) else {
            return;
        };
        if *holder {
            let held = memory.as_ref().and_then(|memory| memory.whole(state));
            ring.held = ring.held.or(held);
        } else if parts.is_empty() || memory.as_ref().is_some_and(|it| it.whole.is_some()) {
            *memory = None;
        }
        let asked = (0..)
            .zip(parts)
            .filter(|(_, part)| part.rank == job.place.rank);
        for (index, part) in asked {
            let held = memory.as_ref();
            if let Some(model) = held.and_then(|it| it.part(state, index, &part.hash)) {
                ring.parts.insert(index, model);
            }
        }
    }

    /// What a rank gets of the state that a generation is to start from.
    fn given(&self, job: &Job, start: &Start) -> Option<Model> {
        let ring = self.rings.get(&job.key())?;
        if start.parts.is_empty() {
            return ring.held;
        }
        let mut parts = ring.parts.values().copied();
        let first = parts.next()?;
        let all = ring.parts.len() == start.parts.len() && parts.all(|part| part == first);
        all.then_some(first)
    }

    /// A step is done: takes a snapshot where one is due, or leaves one for the next membership.
    fn snapshot_after(&mut self, worker: usize, wish: Wish, settled: bool) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let (step, rank) = (job.model.step, job.place.rank);
        let ends = wish == Wish::Stop || step == ground().plan.steps;
        if let Some(snapshots) = job.snapshots.as_ref().filter(|_| !ends) {
            if wish == Wish::Regroup {
                let waits = snapshots.under_way.is_some();
                self.enter(worker, Stage::Settling { begun: false });
                if !waits {
                    self.arrive(worker);
                }
                return;
            }
            if settled && snapshots.due(step) {
                self.begin_snapshot(worker);
            }
        }
        self.after_step(worker, step, wish, rank);
    }

    fn begin_snapshot(&mut self, worker: usize) {
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        if let Some(snapshots) = &mut job.snapshots {
            snapshots.begin(&job.place, job.model);
            let after = self.random.random_range(20 * MS..900 * MS);
            self.work(worker, after, Work::SnapshotPassed);
        }
    }

    /// The neighbour's part has arrived, unless the neighbour is gone.
    fn snapshot_passed(&mut self, worker: usize) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let before = (job.place.rank + job.place.world - 1) % job.place.world;
        let ring = self.rings.get(&job.key());
        let Some(neighbour) = ring.and_then(|ring| ring.members[before as usize]) else {
            return;
        };
        let last = |worker: usize| {
            let job = self.workers[worker].job.as_ref()?;
            Some(job.snapshots.as_ref()?.last)
        };
        if last(neighbour) < last(worker) {
            // It has not come so far.
            return self.work(worker, 50 * MS, Work::SnapshotPassed);
        }
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        let Some(snapshots) = &mut job.snapshots else {
            return;
        };
        let Some(parts) = snapshots.under_way.take() else {
            return;
        };
        let name = parts.name();
        snapshots.whole.push(parts);
        let waits = matches!(job.stage, Stage::Settling { .. });
        let [own, kept] = [0, 1].map(|place| name.parts.get(place).cloned());
        let taken = SnapshotTaken {
            step: name.step,
            own,
            kept,
        };
        self.report(worker, Report::SnapshotTaken(taken));
        if waits {
            self.arrive(worker);
        }
    }

    fn loaded(&mut self, worker: usize) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let model = match (&job.start, &job.place.restore) {
            (Some(start), _) => self.given(job, start),
            (None, Some(restore)) => self
                .checkpoints
                .read(&job.place.run, &restore.path, restore.manifest_hash)
                .map(|saved| saved.model),
            (None, None) => Some(Model::default()),
        };
        let Some(model) = model else {
            let kind = match job.start {
                Some(_) => FaultKind::Transient,
                None => FaultKind::CheckpointDamaged,
            };
            return self.breaks(worker, kind, "there is nothing to start from");
        };
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        let (run, generation) = (&job.place.run, job.place.generation);
        self.watch.started(run, generation, model);
        (job.model, job.loaded) = (model, true);
        let before = self.workers[worker].memory.take();
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        job.snapshots = Snapshots::of(&job.place, model.step, before);
        self.report(worker, Report::Formed(model.formed()));
        self.evaluate(worker, true, false);
    }

    /// The state that the generation starts from is measured.
    fn begin(&mut self, worker: usize) {
        let Some(job) = &self.workers[worker].job else {
            return;
        };
        let (model, rank) = (job.model, job.place.rank);
        let from_memory = job.start.is_some();
        let written = job.place.restore.as_ref().map_or(0, |restore| restore.step);
        let due = ground().due(&job.place.recipe, model.step);
        if from_memory {
            self.begin_snapshot(worker);
        }
        if due && written != model.step {
            // The generation that trained it did not come to write its checkpoint.
            return self.after_step(worker, model.step, Wish::Nothing, rank);
        }
        self.next_step(worker);
    }

    /// All files but the manifest are there. Only at the end anybody waits for more.
    fn saved(&mut self, worker: usize) {
        let Some(job) = &mut self.workers[worker].job else {
            return;
        };
        let (step, generation) = (job.model.step, job.place.generation);
        job.saved.insert(step, job.model);
        let end = step == ground().plan.steps || job.agreed == Wish::Stop;
        let unfinished = Unfinished {
            step,
            path: format!("step-{step:08}-gen-{generation}"),
            bytes: 100,
            manifest: Default::default(),
            seconds: 0.1,
        };
        self.report(worker, Report::CheckpointFilled(unfinished));
        if end {
            return self.enter(worker, Stage::AwaitingPublished);
        }
        self.enter(worker, Stage::AwaitingRelease);
        self.arrive(worker);
    }

    /// The manifest of a checkpoint is written.
    pub(super) fn finished(
        &mut self,
        worker: usize,
        run: &str,
        unfinished: &Unfinished,
        head: [u8; 32],
    ) -> Result<CheckpointWritten, String> {
        let job = self.workers[worker].job.as_ref();
        let model = job.and_then(|job| job.saved.get(&unfinished.step));
        let model = model.ok_or("the files of the checkpoint are gone")?;
        let saved = Saved::pending(*model, head);
        let manifest_hash = saved.manifest_hash.to_vec();
        self.checkpoints.write(run, &unfinished.path, saved);
        Ok(CheckpointWritten {
            step: unfinished.step,
            path: unfinished.path.clone(),
            bytes: unfinished.bytes,
            manifest_hash,
            seconds: unfinished.seconds,
        })
    }
}
