//! The control thread: a current-thread runtime that turns events into inputs of the session and
//! its actions into I/O. It never computes and never calls libtorch.

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal::SIGXFSZ;
use supra_proto::v1::{CoordinatorMessage, OrderedFaultKind};
use supra_proto::{AWAITED_PAUSE, ClientError};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, Sleep, interval, sleep};

use crate::address::DataAddress;
use crate::chaos;
use crate::collective::RingPlan;
use crate::error::AgentError;
use crate::job::{DataPlane, Job};
use crate::ledger;
use crate::line::{self, Line, Pauses};
use crate::link::{self, LinkControl, Tagged};
use crate::place::Place;
use crate::session::{Action, Input, Session};
use crate::supervisor;
use crate::unpublished::Unpublished;
use crate::worker::{Exit, WorkerOptions};

/// How often the session looks at the clock.
const TICK: Duration = Duration::from_millis(100);

/// Everything that the control thread owns. Dropping it voids the job in hand.
pub(crate) struct Controller {
    options: WorkerOptions,
    data: DataAddress,
    jobs: SyncSender<Job>,
    reports_in: mpsc::Sender<Tagged>,
    reports: mpsc::Receiver<Tagged>,
    published_in: mpsc::UnboundedSender<Input>,
    published: mpsc::UnboundedReceiver<Input>,
    session: Session,
    /// The job that was started last.
    current: Option<LinkControl>,
    stream: Stream,
    pauses: Pauses,
    /// When the search for a coordinator that was never reached began; none once it was reached.
    unseen_since: Option<Instant>,
    /// What was said about the last failed attempt: a repeat is not worth a warning.
    complaint: String,
    /// Error that ends the worker as soon as the training loop is back.
    fatal: Option<ClientError>,
}

/// The stream, or the attempt to get one.
enum Stream {
    Up(Box<Line>),
    /// Before an attempt.
    Pausing(Pin<Box<Sleep>>),
    Opening(Pin<Box<dyn Future<Output = Opened> + Send>>),
    /// There will not be another one.
    Over,
}

type Opened = Result<(Line, CoordinatorMessage), ClientError>;

/// What the event loop woke up for.
enum Event {
    Input(Box<Input>),
    Tick,
    /// The pause before an attempt to attach is over.
    Paused,
    Opened(Box<Opened>),
    /// The stream has ended; says how.
    Broken(String),
}

impl Controller {
    pub fn new(
        options: WorkerOptions,
        data: DataAddress,
        jobs: SyncSender<Job>,
        reports_in: mpsc::Sender<Tagged>,
        reports: mpsc::Receiver<Tagged>,
    ) -> Controller {
        let now = Instant::now();
        let (published_in, published) = mpsc::unbounded_channel();
        Controller {
            session: Session::new(options.timing.abort, now),
            options,
            data,
            jobs,
            reports_in,
            reports,
            published_in,
            published,
            current: None,
            stream: Stream::Over,
            pauses: Pauses::new(),
            unseen_since: Some(now),
            complaint: String::new(),
            fatal: None,
        }
    }

    async fn serve(mut self) -> Result<Exit, AgentError> {
        let mut signals = Signals::new()?;
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.stream = Stream::pausing(Duration::ZERO);
        loop {
            let event = tokio::select! {
                Some(tagged) = self.reports.recv() => Event::Input(Box::new(Input::Report(tagged))),
                event = self.stream.event() => event,
                Some(input) = self.published.recv() => Event::Input(Box::new(input)),
                name = signals.next() => {
                    tracing::info!("{name}: leaving");
                    Event::Input(Box::new(Input::Interrupted(format!("the worker was stopped by {name}"))))
                }
                _ = ticks.tick() => Event::Tick,
            };
            let inputs = match event {
                Event::Input(input) => vec![*input],
                Event::Tick => vec![Input::Waited(self.waited()), Input::Tick],
                Event::Paused => {
                    self.attach();
                    Vec::new()
                }
                Event::Opened(opened) => self.on_opened(*opened),
                Event::Broken(cause) => self.on_broken(&cause),
            };
            for input in inputs {
                if let Some(exit) = self.feed(input)? {
                    return self.finish(exit).await;
                }
            }
        }
    }

    /// Hands an input to the session and does what it says; an exit ends the worker.
    fn feed(&mut self, input: Input) -> Result<Option<Exit>, AgentError> {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for action in self.session.handle(input, Instant::now()) {
                match action {
                    Action::Send {
                        run,
                        generation,
                        body,
                    } => {
                        if let Stream::Up(line) = &mut self.stream
                            && !line.send(run, generation, *body)
                        {
                            inputs.extend(
                                self.on_broken(
                                    "the coordinator does not take what this worker sends",
                                ),
                            );
                        }
                    }
                    Action::Start { job, place } => self.start(job, *place)?,
                    Action::Void => self.tell(LinkControl::void),
                    Action::RequestStop => self.tell(LinkControl::request_stop),
                    Action::RequestRegroup => self.tell(LinkControl::request_regroup),
                    Action::RequestCheckpoint(newest) => {
                        self.tell(|control| control.request_checkpoint(newest));
                    }
                    Action::Break(kind, lasts) => inputs.extend(self.break_down(kind, lasts)),
                    Action::TellPublished(step) => self.tell(|control| control.published(step)),
                    Action::Finish {
                        job,
                        run,
                        root,
                        unfinished,
                        head,
                    } => {
                        let done = self.published_in.clone();
                        let ledger = ledger::Source::new(&self.options, run, head);
                        tokio::spawn(async move {
                            let result = ledger.finish(root, unfinished).await;
                            // Nobody waits for it when the worker ends.
                            done.send(Input::Finished { job, result }).ok();
                        });
                    }
                    Action::Publish {
                        job,
                        step,
                        root,
                        path,
                        manifest_hash,
                    } => {
                        let done = self.published_in.clone();
                        tokio::task::spawn_blocking(move || {
                            let result = root.publish(&path, manifest_hash);
                            let result = result.map_err(|error| Unpublished::new(&root, &error));
                            // Nobody waits for it when the worker ends.
                            done.send(Input::Published {
                                job,
                                step,
                                manifest_hash,
                                result,
                            })
                            .ok();
                        });
                    }
                    Action::End(exit) => return Ok(Some(exit)),
                    Action::Die(exit) => supervisor::die(self.options.timing.abort, exit.as_ref()),
                }
            }
        }
        Ok(None)
    }

    fn waited(&self) -> Duration {
        let control = self.current.as_ref();
        control.map_or(Duration::ZERO, LinkControl::waited)
    }

    fn tell(&self, what: impl FnOnce(&LinkControl)) {
        if let Some(control) = &self.current {
            what(control);
        }
    }

    fn start(&mut self, job: u64, place: Place) -> Result<(), AgentError> {
        let (link, control) = link::on_queue(job, self.reports_in.clone());
        tracing::info!(
            run = place.run,
            generation = place.generation,
            rank = place.rank,
            world = place.world,
            "assigned"
        );
        let ring = RingPlan {
            generation: place.generation,
            rank: place.rank,
            world: place.world,
            next_address: place.next_address,
            key: place.key,
            patience: self.options.timing.connect,
        };
        let job = Job {
            run: place.run,
            generation: place.generation,
            recipe: place.recipe,
            recipe_text: place.recipe_text,
            rank: place.rank,
            world: place.world,
            donation: place.donation,
            restore: place.restore,
            checkpoint_root: place.checkpoint_root,
            until: None,
            link,
            plane: DataPlane::Ring(self.data.listener(), ring.clone()),
            aside: DataPlane::Ring(self.data.listener(), ring),
            address: self.data.advertised().to_string(),
        };
        self.current = Some(control);
        // The training loop is idle, so that there is room; it is gone only after this thread.
        self.jobs
            .try_send(job)
            .map_err(|error| AgentError::Control {
                what: "cannot hand over a job",
                cause: error.to_string(),
            })
    }

    /// Tries to attach, but not before the training loop is back from the generation that ended with the
    /// stream: Hello says what it keeps.
    fn attach(&mut self) {
        if self.session.leaving() {
            self.stream = Stream::pausing(TICK);
            return;
        }
        let options = self.options.clone();
        let address = self.data.advertised().to_string();
        let mut hello = line::hello(&options, address, self.session.held().cloned());
        hello.place = self.session.place();
        let backlog = self.session.backlog();
        let opening = async move { Line::open(&options, hello, backlog).await };
        self.stream = Stream::Opening(Box::pin(opening));
    }

    fn on_opened(&mut self, opened: Opened) -> Vec<Input> {
        let error = match opened {
            Ok((line, answer)) => {
                tracing::info!("attached to {}", self.options.coordinator);
                self.stream = Stream::Up(Box::new(line));
                self.unseen_since = None;
                self.pauses = Pauses::new();
                self.complaint.clear();
                return vec![Input::Message(answer)];
            }
            Err(error) => error,
        };
        let patience = self.options.timing.first_contact;
        if !error.is_transient()
            || self
                .unseen_since
                .is_some_and(|since| since.elapsed() >= patience)
        {
            self.stream = Stream::Over;
            let why = error.to_string();
            self.fatal = Some(error);
            return vec![Input::Interrupted(why)];
        }
        let complaint = error.to_string();
        if complaint != self.complaint {
            tracing::warn!("{complaint}; trying again until it answers");
            self.complaint = complaint;
        }
        self.stream = Stream::pausing(self.pause());
        Vec::new()
    }

    /// The pause before the next attempt to attach.
    fn pause(&mut self) -> Duration {
        let pause = self.pauses.next();
        match self.session.place() {
            Some(_) => pause.min(AWAITED_PAUSE),
            None => pause,
        }
    }

    fn on_broken(&mut self, cause: &str) -> Vec<Input> {
        let pause = self.pause();
        tracing::warn!(
            "lost the coordinator: {cause}; attaching again in {:.1} s",
            pause.as_secs_f64()
        );
        self.stream = Stream::pausing(pause);
        vec![Input::Detached]
    }

    /// Does to this worker what the recipe's `chaos` orders.
    fn break_down(&mut self, kind: OrderedFaultKind, lasts: Duration) -> Vec<Input> {
        tracing::warn!(
            "chaos orders a fault of this worker: {}",
            kind.as_str_name()
        );
        match kind {
            OrderedFaultKind::Unspecified => Vec::new(),
            OrderedFaultKind::Kill => chaos::kill(),
            OrderedFaultKind::Stop => {
                if let Err(error) = chaos::stop(lasts) {
                    tracing::error!("cannot stand still for a while: {error}");
                }
                Vec::new()
            }
            OrderedFaultKind::Disconnect => self.on_broken("chaos orders it"),
            OrderedFaultKind::Reset => {
                self.tell(LinkControl::reset);
                Vec::new()
            }
        }
    }

    async fn finish(mut self, exit: Exit) -> Result<Exit, AgentError> {
        if let Stream::Up(line) = std::mem::replace(&mut self.stream, Stream::Over) {
            line.close().await;
        }
        match self.fatal.take() {
            Some(error) => Err(error.into()),
            None => Ok(exit),
        }
    }
}

impl Stream {
    fn pausing(pause: Duration) -> Stream {
        Stream::Pausing(Box::pin(sleep(pause)))
    }

    async fn event(&mut self) -> Event {
        match self {
            Stream::Up(line) => match line.receive().await {
                Ok(Some(message)) => Event::Input(Box::new(Input::Message(message))),
                Ok(None) => Event::Broken("it closed the stream".to_owned()),
                Err(status) => Event::Broken(status.message().to_owned()),
            },
            Stream::Pausing(pause) => {
                pause.await;
                Event::Paused
            }
            Stream::Opening(opening) => Event::Opened(Box::new(opening.await)),
            Stream::Over => std::future::pending().await,
        }
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Only caught: a write beyond the limit of file sizes is then an error that names its file, and no sudden end.
    _file_size: Signal,
}

impl Signals {
    fn new() -> Result<Signals, AgentError> {
        let listen = |kind| {
            signal(kind).map_err(|error| AgentError::Control {
                what: "cannot listen to signals",
                cause: error.to_string(),
            })
        };
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            _file_size: listen(SignalKind::from_raw(SIGXFSZ as i32))?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Runs until the worker ends.
pub(crate) fn run(controller: Controller) -> Result<Exit, AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| AgentError::Control {
        what: "cannot start its runtime",
        cause: error.to_string(),
    })?;
    runtime.block_on(controller.serve())
}
