//! Simulated workers: on the wire they attach, form, report and leave as real ones do, and they compute nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use supra_proto::BUILD;
use supra_proto::v1::workers_client::WorkersClient;
use supra_proto::v1::{
    Assignment, CheckpointBegun, CoordinatorMessage, Formed, Heartbeat, Hello, Left, LeftReason,
    Phase, StepReport, WorkerMessage, coordinator_message::Body as Down,
    worker_message::Body as Up,
};
use supra_recipes::plan::{self, Plan};
use supra_recipes::schema::Recipe;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::task::JoinHandle;
use tokio::time::interval;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::failure::{Failure, Result};
use crate::process::POLL;

/// Streams that share a connection.
const STREAMS: usize = 200;

/// Ticks of the clock that all workers have in common, per second. In each a part of them sends its heartbeat.
const TICKS: usize = 100;

/// Windows and manifest of the training data, as all workers see them.
const WINDOWS: u64 = 1 << 20;
const MANIFEST_HASH: [u8; 32] = [7; 32];

/// Parameters of all ranks, after any step.
const REPLICA_HASH: [u8; 32] = [3; 32];

/// Workers `w00000` … of one coordinator.
pub struct Crowd {
    url: String,
    channels: Vec<Channel>,
    streams: Vec<JoinHandle<()>>,
    hall: Arc<Hall>,
    runtime: Runtime,
}

impl Crowd {
    /// Attaches so many workers, whose reports on a step come within so many ticks of 10 ms.
    pub fn attach(url: &str, workers: usize, spread: usize) -> Result<Crowd> {
        // One thread: it has to leave the coordinator some cores.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let channels = (0..workers.div_ceil(STREAMS))
            .map(|_| runtime.block_on(connect(url)))
            .collect::<Result<_>>()?;
        let hall = Arc::new(Hall(Mutex::new(Told::new(workers))));
        let mut crowd = Crowd {
            url: url.to_owned(),
            channels,
            streams: Vec::new(),
            hall,
            runtime,
        };
        for seat in 0..workers {
            let stream = crowd.sit(seat);
            crowd.streams.push(stream);
        }
        crowd.runtime.spawn(pace(crowd.hall.clone(), spread));
        Ok(crowd)
    }

    /// Attaches a worker that was killed.
    pub fn revive(&mut self, seat: usize) {
        self.streams[seat] = self.sit(seat);
    }

    /// Drops the stream of a worker, as the death of its process does.
    pub fn kill(&mut self, seat: usize) -> Instant {
        // Nobody hears of the death before it is noted, and the stream's task does not see its own end.
        let mut told = self.hall.lock();
        let killed = Instant::now();
        self.streams[seat].abort();
        (told.voided, told.formed) = (0, 0);
        told.seats[seat] = Seat::default();
        killed
    }

    /// Waits until all have a place in the same generation.
    pub fn wait_formed(&self, limit: Duration) -> Result<Instant> {
        self.wait("all workers to form a generation", limit, |told| {
            (told.formed == told.seats.len()).then_some(told.last)
        })
    }

    /// Waits until all but one were told that their generation is void; says when the last one was.
    pub fn wait_voided(&self, limit: Duration) -> Result<Instant> {
        self.wait(
            "all workers to hear that the generation is void",
            limit,
            |told| (told.voided + 1 == told.seats.len()).then_some(told.last),
        )
    }

    /// Waits until this step, or a later one, is reported, and says which.
    pub fn wait_step(&self, step: u64, limit: Duration) -> Result<u64> {
        self.wait("the next step", limit, |told| {
            (told.step >= step).then_some(told.step)
        })
    }

    /// From the last rank's report on a step to the answer that says that it is applied, for the steps since the last call.
    pub fn take_answers(&self) -> Vec<Duration> {
        std::mem::take(&mut self.hall.lock().answers)
    }

    /// Last step that was reported.
    pub fn step(&self) -> u64 {
        self.hall.lock().step
    }

    fn wait<T>(&self, what: &str, limit: Duration, look: impl Fn(&Told) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            {
                let told = self.hall.lock();
                if let Some(failure) = &told.failure {
                    return Err(Failure::new(failure.clone()));
                }
                if let Some(found) = look(&told) {
                    return Ok(found);
                }
                if Instant::now() > deadline {
                    return Err(Failure::new(format!(
                        "waited {limit:?} for {what}: {} formed, {} heard of a void",
                        told.formed, told.voided
                    )));
                }
            }
            std::thread::sleep(POLL);
        }
    }

    fn sit(&self, seat: usize) -> JoinHandle<()> {
        let (out, outgoing) = mpsc::unbounded_channel();
        let name = format!("w{seat:05}");
        self.hall.lock().seats[seat] = Seat {
            out: Some(out),
            ..Seat::default()
        };
        self.hall.lock().say(seat, Up::Hello(hello(&name)));
        let mut client = WorkersClient::new(self.channels[seat / STREAMS].clone());
        let (hall, url) = (self.hall.clone(), self.url.clone());
        self.runtime.spawn(async move {
            let ended = async {
                let outgoing = UnboundedReceiverStream::new(outgoing);
                let mut incoming = client.attach(outgoing).await?.into_inner();
                while let Some(message) = incoming.message().await? {
                    hall.lock().hear(seat, message);
                }
                Ok::<(), tonic::Status>(())
            };
            let cause = match ended.await {
                Ok(()) => "the coordinator closed it".to_owned(),
                Err(status) => status.to_string(),
            };
            let failure = format!("the stream of {name} to {url} ended: {cause}");
            hall.lock().failure.get_or_insert(failure);
        })
    }
}

/// A connection of its own.
pub async fn connect(url: &str) -> Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.tcp_nodelay(true);
    Ok(endpoint.connect().await?)
}

/// Takes a millisecond or two, and is the same for all.
static PROBE: LazyLock<[u8; 32]> = LazyLock::new(plan::probe);

/// A hello that is let in.
pub fn hello(name: &str) -> Hello {
    // Whoever comes back is another one: a worker that is lost again and again would be put aside.
    static STARTED: AtomicU64 = AtomicU64::new(0);
    Hello {
        instance: format!("{name}-{}", STARTED.fetch_add(1, Ordering::Relaxed)),
        name: name.to_owned(),
        build: BUILD.to_owned(),
        plan_version: plan::VERSION,
        plan_probe: PROBE.to_vec(),
        device: "cpu".to_owned(),
        data_address: "127.0.0.1:1".to_owned(),
        ..Hello::default()
    }
}

/// All workers together.
struct Hall(Mutex<Told>);

impl Hall {
    fn lock(&self) -> MutexGuard<'_, Told> {
        // A task that panicked says so itself; what it left is as good as any state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What all workers know, and where each stands.
struct Told {
    seats: Vec<Seat>,
    /// The newest generation.
    run: String,
    generation: u64,
    plan: Option<Plan>,
    formed: usize,
    voided: usize,
    /// When somebody last formed or heard of a void.
    last: Instant,
    /// Last step that was reported, and when the last rank had done so.
    step: u64,
    reported: Instant,
    answers: Vec<Duration>,
    failure: Option<String>,
}

/// One worker.
#[derive(Default)]
struct Seat {
    out: Option<UnboundedSender<WorkerMessage>>,
    sequence: u64,
    rank: Option<u32>,
}

impl Told {
    fn new(workers: usize) -> Told {
        let now = Instant::now();
        Told {
            seats: (0..workers).map(|_| Seat::default()).collect(),
            run: String::new(),
            generation: 0,
            plan: None,
            formed: 0,
            voided: 0,
            last: now,
            step: 0,
            reported: now,
            answers: Vec::new(),
            failure: None,
        }
    }

    fn hear(&mut self, seat: usize, message: CoordinatorMessage) {
        match message.body {
            Some(Down::Assignment(assignment)) => {
                if message.generation != self.generation {
                    self.begin(message.run, message.generation, &assignment);
                }
                self.seats[seat].rank = Some(assignment.rank);
                self.form(seat);
            }
            Some(Down::Void(_)) => {
                self.voided += 1;
                self.last = Instant::now();
                self.seats[seat].rank = None;
                let reason = LeftReason::Void.into();
                self.say(seat, Up::Left(Left { reason, held: None }));
            }
            Some(Down::LedgerHead(head)) if head.step == self.step => {
                self.answers.push(self.reported.elapsed());
            }
            Some(Down::Refusal(refusal)) => {
                self.failure.get_or_insert(refusal.message);
            }
            _ => {}
        }
    }

    fn begin(&mut self, run: String, generation: u64, assignment: &Assignment) {
        let plan = Recipe::parse(&assignment.recipe, "the assignment")
            .map_err(|error| error.to_string())
            .and_then(|recipe| {
                Plan::new(&recipe, WINDOWS, MANIFEST_HASH).map_err(|error| error.to_string())
            });
        match plan {
            Ok(plan) => self.plan = Some(plan),
            Err(cause) => self.failure = Some(cause),
        }
        (self.run, self.generation) = (run, generation);
        self.step = assignment.restore.as_ref().map_or(0, |from| from.step);
        self.formed = 0;
    }

    fn form(&mut self, seat: usize) {
        self.formed += 1;
        self.last = Instant::now();
        let formed = Formed {
            step: self.step,
            replica_hash: REPLICA_HASH.to_vec(),
            windows: WINDOWS,
            manifest_hash: MANIFEST_HASH.to_vec(),
        };
        self.say(seat, Up::Formed(formed));
    }

    /// All have a place, and nobody has died since.
    fn training(&self) -> bool {
        self.formed == self.seats.len()
    }

    fn beat(&mut self, seat: usize) {
        let (phase, step) = match self.seats[seat].rank {
            Some(_) => (Phase::Training.into(), self.step),
            None => (Phase::Idle.into(), 0),
        };
        let beat = Heartbeat {
            phase,
            step,
            in_phase_ms: 500,
            waiting_ms: 0,
        };
        self.say(seat, Up::Heartbeat(beat));
    }

    /// What a rank says after a step that all have trained alike.
    fn report(&mut self, seat: usize) {
        let (Some(plan), Some(rank)) = (&self.plan, self.seats[seat].rank) else {
            return;
        };
        let (step, world) = (self.step, self.seats.len() as u32);
        let samples = plan.step_samples(step);
        let fed = plan.rank_samples(step, rank, world);
        let report = StepReport {
            step,
            first_sample: samples.start,
            samples: samples.end - samples.start,
            fed_samples: fed.end - fed.start,
            fed_digest: number(1),
            loss_sum: 2.0 * samples.end as f64,
            targets: plan.sequence_length * (samples.end - samples.start),
            grad_norm: 1.0,
            learning_rate: plan.learning_rate(step),
            replica_hash: if plan.replica_check_due(step) {
                REPLICA_HASH.to_vec()
            } else {
                Vec::new()
            },
            seconds: 1.0,
            step_digest: number(world),
            bucket_hashes: Vec::new(),
            ..StepReport::default()
        };
        self.say(seat, Up::Step(report));
    }

    /// Asks, as rank 0, for an answer once the step is applied.
    fn ask(&mut self) {
        let Some(first) = self.seats.iter().position(|seat| seat.rank == Some(0)) else {
            return;
        };
        self.reported = Instant::now();
        let step = self.step;
        self.say(first, Up::CheckpointBegun(CheckpointBegun { step }));
    }

    fn say(&mut self, seat: usize, body: Up) {
        let seat = &mut self.seats[seat];
        seat.sequence += 1;
        let message = WorkerMessage {
            run: self.run.clone(),
            generation: self.generation,
            sequence: seat.sequence,
            body: Some(body),
        };
        if let Some(out) = &seat.out {
            // Fails when the stream has ended, which its task notes.
            let _ = out.send(message);
        }
    }
}

/// A number modulo 2^256, little-endian.
fn number(value: u32) -> Vec<u8> {
    let mut bytes = vec![0; 32];
    bytes[..4].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// Has every worker say once per second that it is alive, and report a step once per second, those of a generation within
/// `spread` ticks.
async fn pace(hall: Arc<Hall>, spread: usize) {
    let mut ticks = interval(Duration::from_secs(1) / TICKS as u32);
    let mut under_way = false;
    for tick in (0..TICKS).cycle() {
        ticks.tick().await;
        let mut told = hall.lock();
        let workers = told.seats.len();
        for seat in (tick..workers).step_by(TICKS) {
            told.beat(seat);
        }
        if tick == 0 {
            under_way = told.training();
            told.step += u64::from(under_way);
        }
        // A death in the middle of a step.
        under_way &= told.training();
        if under_way && tick < spread {
            for seat in (tick..workers).step_by(spread) {
                told.report(seat);
            }
        }
        if under_way && tick + 1 == spread {
            told.ask();
        }
    }
}
