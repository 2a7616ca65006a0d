//! One coordinator and up to 10,000 workers: what it costs, and how fast it answers and tells.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use supra_proto::Client;
use supra_proto::v1::workers_client::WorkersClient;
use supra_proto::v1::{
    SubmitRequest, WorkerMessage, coordinator_message::Body as Down, worker_message::Body as Up,
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;

use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::programs::Programs;
use crate::report::{Row, rounded, table};

mod crowd;

use crowd::{Crowd, connect, hello};

/// What the report says above its table.
pub const ABOUT: &str = "One coordinator process and so many simulated workers in another process of the same machine, over real \
    gRPC on the loopback, 200 streams per connection. All are ranks of one generation; each sends a heartbeat and the report \
    of a step every second, and all ranks report within 0.2 s, as they end a step together. `hello` is the time from the hello of a \
    further worker to its welcome, `status` that of a `Runs.Status` call, both ten times a second from a thread and a \
    connection of their own; `step` the time from the last rank's report to the ledger's head, which rank 0 asks for and gets once the \
    step is applied. `p50_ms` and `p99_ms` are those of the three together. `tell_all_ms` is the time from the death \
    of one worker until the last of the others has the void, `form_ms` that from its return until all are assigned to the \
    next generation. `rss_mb` is the most memory that the coordinator had, `cpu` its processor time per second of \
    training. Simulated workers and coordinator share the cores: of three measurements the best stands here.";

/// No handling takes longer in 99 of 100 cases, and no death is told later.
const P99_LIMIT: Duration = Duration::from_millis(50);
const TELL_LIMIT: Duration = Duration::from_secs(1);
const RSS_LIMIT: f64 = 1000.0;

/// Measurements of which the best counts.
const ROUNDS: usize = 3;

/// Ticks of 10 ms within which all ranks report a step.
const SPREAD: usize = 20;

/// How long coming together may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Units per second in which Linux tells processor time.
const USER_HZ: f64 = 100.0;

/// Runs the campaign.
///
/// # Errors
/// A coordinator that loses somebody or falls behind; with `quick` also one that is slower or larger than promised, where
/// the table would not be kept.
pub fn run(programs: &Programs, directory: &Path, quick: bool) -> Result<Vec<Row>> {
    let (sizes, window): (&[usize], u64) = if quick {
        (&[10, 300], 4)
    } else {
        (&[10, 100, 1_000, 10_000], 10)
    };
    let mut rows = Vec::new();
    for &workers in sizes {
        let directory = directory.join(workers.to_string());
        let window = Duration::from_secs(window);
        let size = measure(programs, &directory, workers, window)
            .while_doing(format_args!("{workers} workers"))?;
        let row = size.row(workers);
        print!("{}", table(std::slice::from_ref(&row)));
        if quick {
            size.expect_promised()?;
        }
        rows.push(row);
    }
    Ok(rows)
}

fn measure(
    programs: &Programs,
    directory: &Path,
    workers: usize,
    window: Duration,
) -> Result<Size> {
    let mut cluster = Cluster::start(programs, directory)?;
    let pid = cluster.coordinator()?.pid();
    let run = submit(cluster.url(), workers)?;
    let mut crowd = Crowd::attach(cluster.url(), workers, SPREAD)?;
    let mut best: Option<Load> = None;
    let (mut told, mut formed) = (Duration::MAX, Duration::MAX);
    let mut died_at = 0;
    for _ in 0..ROUNDS {
        crowd.wait_formed(PATIENCE)?;
        // Until the first steps are applied.
        sleep(Duration::from_secs(2));
        crowd.take_answers();
        let load = Load::take(cluster.url(), pid, window, || crowd.take_answers())?;
        let (applied, reported) = (cluster.status(&run)?.step, crowd.step());
        if applied + 1 < reported {
            return Err(Failure::new(format!(
                "step {reported} is reported while {applied} are applied"
            )));
        }
        best = best.into_iter().chain([load]).min_by_key(Load::p99);
        // A run gives up when generations die at the same step again and again.
        died_at = crowd.wait_step(died_at + 2, PATIENCE)?;
        let victim = workers / 2;
        let killed = crowd.kill(victim);
        told = told.min(crowd.wait_voided(PATIENCE)?.duration_since(killed));
        let back = Instant::now();
        crowd.revive(victim);
        formed = formed.min(crowd.wait_formed(PATIENCE)?.duration_since(back));
    }
    let load = best.ok_or_else(|| Failure::new("nothing was measured"))?;
    Ok(Size {
        load,
        rss_mb: peak_mb(pid)?,
        told,
        formed,
    })
}

/// Submits a run of which so many workers are one generation.
fn submit(url: &str, workers: usize) -> Result<String> {
    let recipe = format!(
        "name: scale\n\
         base: {{ path: /base }}\n\
         data: {{ train: /tokens, repeat: true }}\n\
         budget: {{ tokens: {} }}\n\
         batch: {{ tokens: {}, micro_batch: 1, sequence_length: 32 }}\n\
         optimizer: {{ warmup: 5 steps }}\n\
         workers: {{ min: {workers}, max: {workers} }}\n",
        workers * 32 * 1_000_000,
        workers * 32,
    );
    let request = SubmitRequest {
        recipe,
        file_name: "scale.yaml".to_owned(),
        base_directory: "/".to_owned(),
        strict: false,
    };
    runtime()?.block_on(async { Ok(Client::connect(url, None).await?.submit(request).await?) })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// What one size showed.
struct Size {
    load: Load,
    rss_mb: f64,
    told: Duration,
    formed: Duration,
}

impl Size {
    fn expect_promised(&self) -> Result<()> {
        let (p99, told, rss_mb) = (self.load.p99(), self.told, self.rss_mb);
        if p99 > P99_LIMIT || told > TELL_LIMIT || rss_mb > RSS_LIMIT {
            return Err(Failure::new(format!(
                "p99 {p99:?}, a death told within {told:?}, {rss_mb} MB: wanted are {P99_LIMIT:?}, {TELL_LIMIT:?} and {RSS_LIMIT} MB"
            )));
        }
        Ok(())
    }

    fn row(&self, workers: usize) -> Row {
        let load = &self.load;
        let all = load.all();
        Row::new()
            .with("workers", workers)
            .with("p50_ms", ms(quantile(&all, 0.5)))
            .with("p99_ms", ms(quantile(&all, 0.99)))
            .with("hello_p99_ms", ms(quantile(&load.hellos, 0.99)))
            .with("status_p99_ms", ms(quantile(&load.statuses, 0.99)))
            .with("step_p50_ms", ms(quantile(&load.steps, 0.5)))
            .with("step_p99_ms", ms(quantile(&load.steps, 0.99)))
            .with("cpu", rounded(load.cpu, 2))
            .with("rss_mb", rounded(self.rss_mb, 0))
            .with("tell_all_ms", ms(self.told))
            .with("form_ms", ms(self.formed))
    }
}

/// How the coordinator answered while workers reported.
struct Load {
    hellos: Vec<Duration>,
    statuses: Vec<Duration>,
    steps: Vec<Duration>,
    cpu: f64,
}

impl Load {
    fn take(
        url: &str,
        pid: u32,
        window: Duration,
        steps: impl FnOnce() -> Vec<Duration>,
    ) -> Result<Load> {
        let (clock, cpu) = (Instant::now(), cpu_seconds(pid)?);
        let (mut hellos, mut statuses) = runtime()?.block_on(probe(url, window))?;
        let cpu = (cpu_seconds(pid)? - cpu) / clock.elapsed().as_secs_f64();
        let mut steps = steps();
        if steps.is_empty() {
            return Err(Failure::new("no step was applied"));
        }
        hellos.sort_unstable();
        statuses.sort_unstable();
        steps.sort_unstable();
        Ok(Load {
            hellos,
            statuses,
            steps,
            cpu,
        })
    }

    fn all(&self) -> Vec<Duration> {
        let mut all = [&self.hellos[..], &self.statuses, &self.steps].concat();
        all.sort_unstable();
        all
    }

    fn p99(&self) -> Duration {
        quantile(&self.all(), 0.99)
    }
}

/// Says hello as a further worker, and asks for the newest run's status, ten times a second.
async fn probe(url: &str, window: Duration) -> Result<(Vec<Duration>, Vec<Duration>)> {
    let channel = connect(url).await?;
    let mut client = Client::connect(url, None).await?;
    let (mut hellos, mut statuses) = (Vec::new(), Vec::new());
    let mut ticks = interval(Duration::from_millis(100));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = Instant::now() + window;
    while Instant::now() < end {
        ticks.tick().await;
        // By name the last, so that no generation would take it, and a new one each time.
        hellos.push(welcome(&channel, &format!("x{}", hellos.len())).await?);
        let asked = Instant::now();
        client.status("").await?;
        statuses.push(asked.elapsed());
    }
    Ok((hellos, statuses))
}

async fn welcome(channel: &Channel, name: &str) -> Result<Duration> {
    let (out, outgoing) = tokio::sync::mpsc::unbounded_channel();
    let asked = Instant::now();
    let message = WorkerMessage {
        sequence: 1,
        body: Some(Up::Hello(hello(name))),
        ..WorkerMessage::default()
    };
    out.send(message)?;
    let mut client = WorkersClient::new(channel.clone());
    let outgoing = UnboundedReceiverStream::new(outgoing);
    let mut incoming = client.attach(outgoing).await?.into_inner();
    let answer = incoming.message().await?.and_then(|message| message.body);
    match answer {
        Some(Down::Welcome(_)) => Ok(asked.elapsed()),
        other => Err(Failure::new(format!("a hello was answered with {other:?}"))),
    }
}

/// The value below which so many of the sorted ones are.
fn quantile(sorted: &[Duration], part: f64) -> Duration {
    let place = (sorted.len() as f64 * part).ceil() as usize;
    sorted
        .get(place.saturating_sub(1))
        .copied()
        .unwrap_or_default()
}

fn ms(duration: Duration) -> f64 {
    rounded(duration.as_secs_f64() * 1e3, 2)
}

/// Processor time of a process, all threads together.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The fields after the name, which is in parentheses and may hold anything.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks: f64 = ticks.filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / USER_HZ)
}

/// The most memory that a process had, MB.
fn peak_mb(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    let kib = kib.ok_or_else(|| Failure::new(format!("no VmHWM of process {pid}")))?;
    Ok(kib * 1024.0 / 1e6)
}
