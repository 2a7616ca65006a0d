//! A simulated worker's process: the real session, what attaches it, and what does its errands.

use std::time::{Duration, Instant};

use rand::RngExt;
use supra_agent::Exit;
use supra_agent::session::{Action, Input, Session, Unpublished, Unwritten};
use supra_proto::v1::{
    CoordinatorMessage, FaultKind, Hello, OrderedFaultKind, WorkerMessage,
    worker_message::Body as Up,
};

use super::World;
use super::compute::{Job, Stage, Wish, Work};
use super::fault::Phase;
use super::ground;
use super::held::Memory;
use super::mutant::Mutant;
use super::network::Item;
use super::queue::{Event, MS, SECOND, Time};

/// Time between two looks of a session at its clock.
pub(super) const TICK: Time = 250 * MS;

/// How long a training loop may take to come back.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// Time for an answer to Hello.
const ANSWER: Time = 10 * SECOND;

const FIRST_PAUSE: Time = 200 * MS;
const LONGEST_PAUSE: Time = 10 * SECOND;

/// One worker, whichever process it is now.
pub(super) struct Worker {
    pub name: String,
    /// Number of its supervisor.
    pub instance: u64,
    /// Counts its processes.
    pub epoch: u32,
    /// None while there is no process.
    pub session: Option<Session>,
    pub stream: Option<usize>,
    /// The Hello on its stream is answered.
    pub attached: bool,
    /// The coordinator has heard of it before.
    pub known: bool,
    pub job: Option<Job>,
    /// State that outlived its generation.
    pub memory: Option<Memory>,
    pub paused_until: Time,
    /// Until when new streams stand still: down, up.
    pub partition: [Time; 2],
    /// Until when its ring stands still.
    pub ring_stalled_until: Time,
    /// Its next void takes longer than allowed.
    pub slow_abort: bool,
    /// Its clock runs so much faster.
    pub rate: f64,
    pause: Time,
    previous_exit: String,
}

impl Worker {
    pub fn new(number: usize, rate: f64) -> Worker {
        Worker {
            name: format!("w{number:02}"),
            instance: 1,
            epoch: 0,
            session: None,
            stream: None,
            attached: false,
            known: false,
            job: None,
            memory: None,
            paused_until: 0,
            partition: [0; 2],
            ring_stalled_until: 0,
            slow_abort: false,
            rate,
            pause: FIRST_PAUSE,
            previous_exit: String::new(),
        }
    }

    /// What it is doing.
    pub fn phase(&self, mustering: bool) -> Phase {
        match &self.job {
            None if mustering => Phase::Mustering,
            None => Phase::Idle,
            Some(job) => job.phase(),
        }
    }
}

impl World {
    fn instant(&self, worker: usize) -> Instant {
        let rate = self.workers[worker].rate;
        self.birth + Duration::from_micros((self.now as f64 * rate) as u64)
    }

    pub(super) fn worker_starts(&mut self, number: usize) {
        if self.workers[number].session.is_some() {
            return;
        }
        let now = self.instant(number);
        let worker = &mut self.workers[number];
        worker.session = Some(Session::new(ABORT_LIMIT, now));
        worker.pause = FIRST_PAUSE;
        let epoch = worker.epoch;
        self.say(|| format!("worker {number} starts"));
        let worker = number;
        self.queue.push(self.now, Event::Attach { worker, epoch });
    }

    /// The process is gone. `reset`: its machine says so to whoever is connected; `new`: another supervisor takes its place.
    pub(super) fn worker_dies(&mut self, number: usize, reset: bool, new: bool) {
        if self.workers[number].session.is_none() {
            return;
        }
        self.say(|| format!("worker {number} is gone"));
        for stream in self.streams_of(number) {
            self.cut(stream, reset);
        }
        self.leave_ring(number, false);
        let worker = &mut self.workers[number];
        worker.epoch += 1;
        worker.session = None;
        worker.stream = None;
        worker.attached = false;
        worker.job = None;
        worker.memory = None;
        worker.slow_abort = false;
        worker.paused_until = 0;
        worker.previous_exit = "was killed".into();
        if new {
            worker.instance += 1;
            worker.previous_exit.clear();
        }
        let back = self.random.random_range(200 * MS..5 * SECOND);
        self.queue
            .push(self.now + back, Event::WorkerStarts { worker: number });
    }

    pub(super) fn attach(&mut self, number: usize, epoch: u32) {
        let worker = &self.workers[number];
        let Some(session) = &worker.session else {
            return;
        };
        if worker.epoch != epoch || worker.stream.is_some() {
            return;
        }
        let (held, place) = (session.held().cloned(), session.place());
        // Hello says what is kept, so the training loop has to be back.
        if self.coordinator.machine.is_none() || session.leaving() {
            return self.try_again(number);
        }
        let stream = self.connect(number);
        let worker = &mut self.workers[number];
        worker.stream = Some(stream);
        worker.attached = false;
        let identity = ground::identity();
        let hello = Hello {
            instance: format!("{}-{}", worker.name, worker.instance),
            name: worker.name.clone(),
            build: identity.build,
            plan_version: identity.plan_version,
            plan_probe: identity.plan_probe,
            device: "cpu".into(),
            data_address: format!("{}:1", worker.name),
            pid: epoch + 1,
            previous_exit: worker.previous_exit.clone(),
            held,
            place,
        };
        self.send_up(number, String::new(), 0, Up::Hello(hello));
        self.queue
            .push(self.now + ANSWER, Event::Unanswered { stream });
    }

    fn try_again(&mut self, number: usize) {
        let worker = &mut self.workers[number];
        let (pause, epoch) = (worker.pause, worker.epoch);
        worker.pause = (pause * 2).min(LONGEST_PAUSE);
        let after = self.random.random_range(pause / 2..pause);
        let worker = number;
        self.queue
            .push(self.now + after, Event::Attach { worker, epoch });
    }

    pub(super) fn unanswered(&mut self, stream: usize) {
        let number = self.streams[stream].worker;
        let worker = &self.workers[number];
        if worker.stream == Some(stream) && !worker.attached {
            self.cut(stream, true);
            self.worker_loses(stream);
        }
    }

    /// The worker's end of a stream has ended.
    pub(super) fn worker_loses(&mut self, stream: usize) {
        let number = self.streams[stream].worker;
        if self.workers[number].stream != Some(stream) {
            return;
        }
        self.workers[number].stream = None;
        if std::mem::take(&mut self.workers[number].attached) {
            self.input(number, Input::Detached);
        }
        self.try_again(number);
    }

    pub(super) fn worker_hears(&mut self, stream: usize, message: CoordinatorMessage) {
        let number = self.streams[stream].worker;
        let worker = &mut self.workers[number];
        if worker.stream != Some(stream) {
            return;
        }
        worker.attached = true;
        worker.pause = FIRST_PAUSE;
        self.say(|| {
            let kind = message.body.as_ref().map(super::kind_of_down);
            format!(
                "worker {number} hears {} of generation {}",
                kind.unwrap_or_default(),
                message.generation
            )
        });
        self.input(number, Input::Message(message));
    }

    pub(super) fn worker_ticks(&mut self, number: usize) {
        self.queue.push(self.now + TICK, Event::WorkerTick(number));
        if self.mutant != Some(Mutant::HideWaits) {
            let job = self.workers[number].job.as_ref();
            let since = job.and_then(|job| job.waits_since).unwrap_or(self.now);
            let waited = Duration::from_micros(self.now - since);
            self.input(number, Input::Waited(waited));
        }
        self.input(number, Input::Tick);
    }

    /// Hands an input to the session and does what it says.
    pub(super) fn input(&mut self, number: usize, input: Input) {
        let now = self.instant(number);
        let Some(session) = &mut self.workers[number].session else {
            return;
        };
        for action in session.handle(input, now) {
            if self.workers[number].session.is_none() {
                return;
            }
            self.act(number, action);
        }
    }

    fn act(&mut self, number: usize, action: Action) {
        match action {
            Action::Send {
                run,
                generation,
                body,
            } => self.send_up(number, run, generation, *body),
            Action::Start { job, place } => {
                self.workers[number].job = Some(Job::new(job, *place));
                self.work(number, MS, Work::Begin);
            }
            Action::Void => {
                let slow = std::mem::take(&mut self.workers[number].slow_abort);
                let after = if slow {
                    8 * SECOND
                } else {
                    self.random.random_range(MS..600 * MS)
                };
                self.leave_ring(number, false);
                if let Some(job) = &mut self.workers[number].job {
                    if job.stands_still() {
                        return;
                    }
                    job.stage = Stage::Aborting;
                }
                self.work(number, after, Work::Aborted);
            }
            Action::RequestStop => {
                if let Some(job) = &mut self.workers[number].job {
                    job.wish = Wish::Stop;
                }
            }
            Action::RequestRegroup => {
                if let Some(job) = &mut self.workers[number].job {
                    job.wish = job.wish.max(Wish::Regroup);
                }
            }
            Action::RequestCheckpoint(newest) => {
                if let Some(job) = &mut self.workers[number].job {
                    job.asked = Some(newest);
                }
            }
            Action::Break(kind, lasts) => self.break_down(number, kind, lasts),
            Action::Publish {
                job,
                step,
                root,
                path,
                manifest_hash,
            } => {
                let run = root.url().rsplit('/').next().unwrap_or_default();
                let result = self.checkpoints.publish(run, &path, manifest_hash);
                let result = result.map_err(|message| Unpublished {
                    kind: FaultKind::CheckpointDamaged,
                    message,
                });
                self.errand(
                    number,
                    Input::Published {
                        job,
                        step,
                        manifest_hash,
                        result,
                    },
                );
            }
            Action::TellPublished(step) => self.work(number, MS, Work::ToldPublished(step)),
            Action::Finish {
                job,
                run,
                unfinished,
                head,
                ..
            } => {
                // The ledger comes from a coordinator that may have died since it named the head.
                let result = match self.coordinator.machine {
                    None => Err(Unwritten::NoLedger(unfinished)),
                    Some(_) => self
                        .finished(number, &run, &unfinished, head)
                        .map_err(Unwritten::Refused),
                };
                self.errand(number, Input::Finished { job, result });
            }
            Action::End(exit) => self.ends(number, exit),
            Action::Die(_) => self.worker_dies(number, true, false),
        }
    }

    /// Something that is done beside the session ends, which hears of it.
    fn errand(&mut self, worker: usize, input: Input) {
        let after = self.random.random_range(MS..300 * MS);
        let (epoch, input) = (self.workers[worker].epoch, Box::new(input));
        self.queue.push(
            self.now + after,
            Event::Errand {
                worker,
                epoch,
                input,
            },
        );
    }

    /// What the recipe's `chaos` orders.
    fn break_down(&mut self, number: usize, kind: OrderedFaultKind, lasts: Duration) {
        if self.calm {
            // The time in which everything has to be well again begins anew.
            self.calm_at = self.now;
        }
        match kind {
            OrderedFaultKind::Unspecified => {}
            OrderedFaultKind::Kill => self.worker_dies(number, true, false),
            OrderedFaultKind::Stop => {
                let until = self.now + lasts.as_micros() as Time;
                let worker = &mut self.workers[number];
                worker.paused_until = worker.paused_until.max(until);
            }
            OrderedFaultKind::Disconnect => self.break_streams(number),
            OrderedFaultKind::Reset => self.work(number, MS, Work::RingBroke),
        }
    }

    /// An orderly end. Somebody starts the worker again later.
    fn ends(&mut self, number: usize, exit: Exit) {
        self.say(|| format!("worker {number} ends: {exit:?}"));
        if let Some(stream) = self.workers[number].stream {
            self.send(stream, Item::EndOfUp);
        }
        self.workers[number].epoch += 1;
        self.workers[number].stream = None;
        self.worker_dies(number, true, true);
    }

    fn send_up(&mut self, number: usize, run: String, generation: u64, body: Up) {
        let Some(stream) = self.workers[number].stream else {
            return;
        };
        if !matches!(body, Up::Heartbeat(_)) {
            self.say(|| {
                format!(
                    "worker {number} says {} of generation {generation}",
                    super::kind_of_up(&body)
                )
            });
        }
        self.streams[stream].sequence_up += 1;
        let message = WorkerMessage {
            run,
            generation,
            sequence: self.streams[stream].sequence_up,
            body: Some(body),
        };
        self.send(stream, Item::Up(Box::new(message)));
    }
}
