//! The worker's process: one thread computes, one keeps the line to the coordinator.

use std::net::SocketAddr;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use supra_proto::Token;
use supra_proto::v1::FaultKind;
use supra_recipes::panic;
use tokio::sync::mpsc;

use crate::address::DataAddress;
use crate::advertise::Advertise;
use crate::control::{self, Controller};
use crate::error::AgentError;
use crate::job::{Job, Outcome};
use crate::limits;
use crate::line::Pauses;
use crate::link::{QUEUE, Report, Tagged};
use crate::supervisor::Birth;

/// What a worker is told by its user and its supervisor.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Address of the coordinator, `http://host:port`.
    pub coordinator: String,
    /// Name for people; host name and device when none is given.
    pub name: Option<String>,
    /// Where the other ranks reach this one; at the address of the route to the coordinator when nothing is given.
    pub advertise: Option<Advertise>,
    /// Where to listen for them; on the advertised address when nothing is given.
    pub listen: Option<SocketAddr>,
    /// Secret of the coordinator, if it has one.
    pub token: Option<Token>,
    /// "cpu" or "cuda:N", for people.
    pub device: String,
    /// Version and commit of the program. Has to be the coordinator's.
    pub build: String,
    /// What the supervisor says about this process.
    pub birth: Birth,
    /// Time limits.
    pub timing: Timing,
}

impl WorkerOptions {
    /// Options with every default: no name, no token, not supervised.
    pub fn new(
        coordinator: impl Into<String>,
        device: impl Into<String>,
        build: impl Into<String>,
    ) -> Self {
        WorkerOptions {
            coordinator: coordinator.into(),
            name: None,
            advertise: None,
            listen: None,
            token: None,
            device: device.into(),
            build: build.into(),
            birth: Birth::default(),
            timing: Timing::default(),
        }
    }
}

/// Time limits of a worker.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long to look for a coordinator that was never reached. One that was reached once is
    /// looked for without end.
    pub first_contact: Duration,
    /// How long ranks may take to find each other.
    pub connect: Duration,
    /// How long the training loop may take to come back from a void generation before the process
    /// ends.
    pub abort: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            first_contact: Duration::from_secs(60),
            connect: Duration::from_secs(60),
            abort: Duration::from_secs(5),
        }
    }
}

/// How a worker ended that did nothing wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The coordinator has shut down for good.
    Goodbye,
    /// The coordinator does not want this worker, and says why.
    Refused(String),
    /// SIGTERM or SIGINT.
    Interrupted,
}

impl Exit {
    /// Exit code of the program: 0, 2 and 130.
    pub fn exit_code(&self) -> u8 {
        match self {
            Exit::Goodbye => 0,
            Exit::Refused(_) => 2,
            Exit::Interrupted => 130,
        }
    }
}

/// Attaches to the coordinator and runs `train` for every assignment, one at a time, on the calling
/// thread, until the coordinator says goodbye. Broken connections are made again.
///
/// A panic inside `train` becomes a transient fault. When `train` does not return in time after its
/// generation became void ([`Timing::abort`]), the process ends by SIGALRM: only a new process gets rid of a thread
/// that hangs, and the supervisor starts one.
///
/// # Errors
///
/// When the coordinator cannot be reached, when it does not accept the token, or when the data plane
/// cannot be set up.
pub fn run_worker(
    options: WorkerOptions,
    train: impl FnMut(Job) -> Outcome,
) -> Result<Exit, AgentError> {
    limits::raise_open_files();
    let data = bind(&options)?;
    tracing::info!(address = %data.advertised(), "peers reach this worker here");

    let (jobs_in, jobs) = std::sync::mpsc::sync_channel(1);
    let (reports, reports_out) = mpsc::channel(QUEUE);
    let controller = Controller::new(options, data, jobs_in, reports.clone(), reports_out);
    let thread = std::thread::Builder::new()
        .name("control".to_owned())
        .spawn(move || control::run(controller))
        .map_err(|error| AgentError::Control {
            what: "cannot be started",
            cause: error.to_string(),
        })?;

    compute(&jobs, &reports, train);
    match thread.join() {
        Ok(result) => result,
        Err(payload) => Err(AgentError::Control {
            what: "panicked",
            cause: panic::text(&*payload),
        }),
    }
}

/// Sets up the data plane. The coordinator's name may take as long to appear as the coordinator, and a predecessor that is
/// just ending may hold the port.
fn bind(options: &WorkerOptions) -> Result<DataAddress, AgentError> {
    let start = Instant::now();
    let mut pauses = Pauses::new();
    loop {
        let bound = DataAddress::bind(
            &options.coordinator,
            options.listen,
            options.advertise.as_ref(),
        );
        match bound {
            Err(error)
                if error.is_transient() && start.elapsed() < options.timing.first_contact =>
            {
                tracing::warn!("{error}; trying again");
                std::thread::sleep(pauses.next());
            }
            result => return result,
        }
    }
}

/// Trains what comes, until the control thread ends.
fn compute(
    jobs: &Receiver<Job>,
    reports: &mpsc::Sender<Tagged>,
    mut train: impl FnMut(Job) -> Outcome,
) {
    while let Ok(job) = jobs.recv() {
        let number = job.link.job();
        let outcome = panic::catch(|| train(job)).unwrap_or_else(|message| Outcome::Fault {
            kind: FaultKind::Transient,
            message: format!("the worker has a bug: {message}"),
        });
        let report = Report::Done(outcome);
        if reports
            .blocking_send(Tagged {
                job: number,
                report,
            })
            .is_err()
        {
            return;
        }
    }
}
