//! A coordinator and its workers as processes on this machine, and questions to them.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::signal::Signal;
use supra_proto::v1::{
    Checkpoint, LedgerRecord, LogEntry, RunState, RunStatus, StepMetrics, WorkerStatus,
};
use supra_proto::{Client, ClientError};

use crate::failure::{Failure, Result, While};
use crate::process::{Output, POLL, Process, run};
use crate::programs::Programs;

/// How long a command of the command line may take.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// How long workers may take to open their devices.
const ATTACH_LIMIT: Duration = Duration::from_secs(90);

/// The ports of [`free_port`].
const LOWEST_PORT: u16 = 10_000;
const PORTS: u32 = 20_000;

/// Where the workers of a cluster compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// On the processor.
    Cpu,
    /// Each on a GPU of its own, or all on the first, if there are fewer GPUs.
    Cuda,
}

impl Device {
    /// The device of one of so many workers, as `supra-worker --device` takes it.
    pub fn of_worker(self, number: u32, workers: u32) -> String {
        match self {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda if workers > gpus() => "cuda:0".to_owned(),
            Device::Cuda => format!("cuda:{number}"),
        }
    }
}

/// GPUs that the driver shows here.
fn gpus() -> u32 {
    let nodes = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let names = nodes.filter_map(|node| node.file_name().into_string().ok());
    let numbers = names.filter_map(|name| name.strip_prefix("nvidia")?.parse::<u32>().ok());
    numbers.count() as u32
}

/// A coordinator with its workers. Dropping it ends all of them.
pub struct Cluster {
    programs: Programs,
    directory: PathBuf,
    url: String,
    coordinator: Option<Process>,
    workers: BTreeMap<String, Process>,
}

impl Cluster {
    /// Starts a coordinator with its state and all logs below `directory`.
    pub fn start(programs: &Programs, directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let mut cluster = Self {
            programs: programs.clone(),
            directory: directory.to_owned(),
            // A port of our own, which a restarted coordinator gets again.
            url: format!("http://127.0.0.1:{}", free_port()?),
            coordinator: None,
            workers: BTreeMap::new(),
        };
        cluster.start_coordinator()?;
        Ok(cluster)
    }

    /// Starts a coordinator and workers `w0` … `wN-1`.
    pub fn with_workers(programs: &Programs, directory: &Path, workers: u32) -> Result<Self> {
        let mut cluster = Self::start(programs, directory)?;
        for worker in 0..workers {
            cluster.start_worker(&format!("w{worker}"))?;
        }
        Ok(cluster)
    }

    /// Starts a coordinator and workers that share the whole machine, and waits until they are there.
    pub fn on(device: Device, programs: &Programs, directory: &Path, workers: u32) -> Result<Self> {
        let mut cluster = Self::start(programs, directory)?;
        for number in 0..workers {
            cluster.start_worker_on(device, number, workers)?;
        }
        cluster.wait_attached(workers as usize, ATTACH_LIMIT)?;
        Ok(cluster)
    }

    /// Starts worker `w<number>` of so many that share the whole machine.
    pub fn start_worker_on(&mut self, device: Device, number: u32, workers: u32) -> Result<()> {
        let name = format!("w{number}");
        let mut command = self.programs.worker();
        command.args(["run", "--coordinator", &self.url, "--name", &name]);
        command.args(["--device", &device.of_worker(number, workers)]);
        command.args(["--local-workers", &workers.to_string()]);
        if device == Device::Cuda && workers > gpus() {
            // Those that share a GPU are hosts of their own for NCCL.
            command.env("NCCL_HOSTID", &name);
        }
        self.adopt_worker(&name, command)
    }

    /// Address of the coordinator.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where the coordinator keeps its state.
    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// The command that starts this cluster's coordinator.
    pub fn coordinator_command(&self) -> Command {
        let mut command = self.programs.coordinator();
        let listen = self.url.trim_start_matches("http://");
        command
            .arg("run")
            .arg("--state")
            .arg(self.state())
            .args(["--listen", listen]);
        command
    }

    /// The command that starts a worker for this cluster.
    pub fn worker_command(&self, name: &str) -> Command {
        self.worker_command_on("cpu", name)
    }

    /// The same, on another device. Workers that share a GPU are hosts of their own for NCCL.
    pub fn worker_command_on(&self, device: &str, name: &str) -> Command {
        self.worker_command_by(&self.url, device, name)
    }

    /// The same, by another way to the coordinator than its own address.
    pub fn worker_command_by(&self, url: &str, device: &str, name: &str) -> Command {
        let mut command = self.programs.worker();
        command.args(["run", "--coordinator", url, "--name", name]);
        // One thread: many ranks share few cores here, and bits must not depend on how many.
        command.args(["--device", device, "--threads", "1"]);
        command.env("NCCL_HOSTID", name);
        command
    }

    /// Starts the coordinator again, after it was killed, and waits until it answers.
    pub fn start_coordinator(&mut self) -> Result<()> {
        let command = self.coordinator_command();
        let mut process = Process::spawn("coordinator", command, &self.directory)?;
        let deadline = Instant::now() + COMMAND_LIMIT;
        while let Err(error) = ask(async { self.client().await?.list().await }) {
            if process.ended()?.is_some() || Instant::now() > deadline {
                let output = process.output();
                return Err(Failure::new(format!(
                    "no coordinator: {error}; it printed:\n{output}"
                )));
            }
            sleep(POLL);
        }
        self.coordinator = Some(process);
        Ok(())
    }

    /// Starts a worker of this name.
    pub fn start_worker(&mut self, name: &str) -> Result<()> {
        self.adopt_worker(name, self.worker_command(name))
    }

    /// Starts a worker by another command; it is ended and watched like the others.
    pub fn adopt_worker(&mut self, name: &str, command: Command) -> Result<()> {
        let process = Process::spawn(name, command, &self.directory)?;
        self.workers.insert(name.to_owned(), process);
        Ok(())
    }

    /// The coordinator's process.
    pub fn coordinator(&mut self) -> Result<&mut Process> {
        self.coordinator
            .as_mut()
            .ok_or_else(|| Failure::new("no coordinator is running"))
    }

    /// A worker's process (its supervisor).
    pub fn worker(&mut self, name: &str) -> Result<&mut Process> {
        self.workers
            .get_mut(name)
            .ok_or_else(|| Failure::new(format!("no worker {name}")))
    }

    /// Ends a worker for good.
    pub fn remove_worker(&mut self, name: &str) -> Result<()> {
        self.worker(name)?.kill_tree()?;
        self.workers.remove(name);
        Ok(())
    }

    /// Asks a worker to leave, and leaves it to its owner to wait for that.
    pub fn dismiss_worker(&mut self, name: &str) -> Result<Process> {
        self.worker(name)?.signal(Signal::SIGTERM)?;
        let worker = self.workers.remove(name);
        worker.ok_or_else(|| Failure::new(format!("no worker {name}")))
    }

    /// Starts a command of `supra` against this coordinator beside everything else.
    pub fn start_supra(&self, arguments: &[&str]) -> Result<Process> {
        let mut command = self.programs.supra();
        command.args(arguments).args(["--coordinator", &self.url]);
        Process::spawn("supra", command, &self.directory)
    }

    /// Names of the workers that were started and not removed.
    pub fn worker_names(&self) -> Vec<String> {
        self.workers.keys().cloned().collect()
    }

    /// Runs a command of `supra` against this coordinator.
    pub fn supra(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.programs.supra();
        command.args(arguments).args(["--coordinator", &self.url]);
        run(command, COMMAND_LIMIT).while_doing(format_args!("supra {}", arguments.join(" ")))
    }

    /// The same, which must succeed and print JSON.
    pub fn supra_json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut all = arguments.to_vec();
        all.push("--json");
        let output = self
            .supra(&all)?
            .expect_code(0)
            .while_doing(arguments.join(" "))?;
        serde_json::from_str(&output.stdout).while_doing(format_args!("reading {}", output.stdout))
    }

    /// Submits a recipe; returns the id of the run.
    pub fn submit(&self, recipe: &Path) -> Result<String> {
        let recipe = recipe.to_string_lossy();
        let answer = self.supra_json(&["submit", &recipe])?;
        answer["run"]
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| Failure::new(format!("submit --json has no `run`: {answer}")))
    }

    /// The run now.
    pub fn status(&self, run: &str) -> Result<RunStatus> {
        ask(async { self.client().await?.status(run).await })
    }

    /// Waits until `wanted` holds. A failed run ends the wait too.
    pub fn wait(
        &self,
        run: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&RunStatus) -> bool,
    ) -> Result<RunStatus> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self
                .status(run)
                .while_doing(format_args!("{what}\n{}", self.logs()))?;
            if wanted(&status) {
                return Ok(status);
            }
            if status.state() == RunState::Failed || Instant::now() > deadline {
                let logs = self.logs();
                return Err(Failure::new(format!(
                    "not {what} after {limit:?}: {status:#?}\n{logs}"
                )));
            }
            sleep(POLL);
        }
    }

    /// Waits until the budget is spent.
    pub fn wait_finished(&self, run: &str, limit: Duration) -> Result<RunStatus> {
        self.wait(run, "finished", limit, |status| {
            status.state() == RunState::Finished
        })
    }

    /// Waits for a failed run and returns its reason.
    pub fn wait_failed(&self, run: &str, limit: Duration) -> Result<String> {
        let failed = |status: &RunStatus| status.state() == RunState::Failed;
        Ok(self.wait(run, "failed", limit, failed)?.reason)
    }

    /// `supra audit` with everything it can check; fails unless it agrees.
    pub fn audit(&self, run: &str) -> Result<serde_json::Value> {
        self.supra_json(&["audit", run])
    }

    /// Journalled checkpoints, oldest first.
    pub fn checkpoints(&self, run: &str) -> Result<Vec<Checkpoint>> {
        ask(async { self.client().await?.checkpoints(run).await })
    }

    /// Directory of the newest published checkpoint.
    pub fn last_checkpoint(&self, run: &str) -> Result<PathBuf> {
        let published = self
            .checkpoints(run)?
            .into_iter()
            .rfind(|checkpoint| checkpoint.published);
        let checkpoint = published
            .ok_or_else(|| Failure::new(format!("run {run} has no published checkpoint")))?;
        Ok(checkpoint.path.into())
    }

    /// Metrics of all applied steps, in order.
    pub fn metrics(&self, run: &str) -> Result<Vec<StepMetrics>> {
        ask(async { self.client().await?.metrics(run).await?.all().await })
    }

    /// What the run's workers and the coordinator said, in order.
    pub fn log_entries(&self, run: &str) -> Result<Vec<LogEntry>> {
        ask(async { self.client().await?.logs(run, false).await?.all().await })
    }

    /// The texts of [`log_entries`](Self::log_entries).
    pub fn log_lines(&self, run: &str) -> Result<Vec<String>> {
        let entries = self.log_entries(run)?;
        Ok(entries.into_iter().map(|entry| entry.text).collect())
    }

    /// The ledger, in order.
    pub fn ledger(&self, run: &str) -> Result<Vec<LedgerRecord>> {
        ask(async { self.client().await?.ledger(run).await?.all().await })
    }

    /// Names and phases of all workers that are attached.
    pub fn attached(&self) -> Result<BTreeMap<String, String>> {
        let workers = ask(async { self.client().await?.workers().await })?;
        let attached = workers.into_iter().filter(|worker| worker.phase != "lost");
        Ok(attached.map(|worker| (worker.name, worker.phase)).collect())
    }

    /// Numbers in the names (`w0` and so on) of the workers that have a place in the run's generation, by rank.
    pub fn ranks(&self, run: &str) -> Result<Vec<u32>> {
        let workers = ask(async { self.client().await?.workers().await })?;
        let mut members: Vec<&WorkerStatus> = workers
            .iter()
            .filter(|worker| worker.phase != "lost" && worker.run == run)
            .collect();
        members.sort_by_key(|worker| worker.rank);
        let number = |worker: &&WorkerStatus| worker.name.strip_prefix('w')?.parse().ok();
        Ok(members.iter().filter_map(number).collect())
    }

    /// Names of attached workers that no generation takes.
    pub fn aside(&self) -> Result<Vec<String>> {
        let workers = ask(async { self.client().await?.workers().await })?;
        let aside = |worker: &WorkerStatus| worker.phase != "lost" && !worker.aside.is_empty();
        let aside = workers.into_iter().filter(aside);
        Ok(aside.map(|worker| worker.name).collect())
    }

    /// Waits until so many workers are attached.
    pub fn wait_attached(&self, count: usize, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let attached = self.attached()?;
            if attached.len() == count {
                return Ok(());
            }
            if Instant::now() > deadline {
                let logs = self.logs();
                return Err(Failure::new(format!(
                    "attached after {limit:?}: {attached:?}\n{logs}"
                )));
            }
            sleep(POLL);
        }
    }

    /// The ends of all logs, for a failed test.
    pub fn logs(&self) -> String {
        let processes = self
            .coordinator
            .iter()
            .map(|process| ("coordinator", process));
        let workers = self
            .workers
            .iter()
            .map(|(name, process)| (name.as_str(), process));
        let mut text = String::new();
        for (name, process) in processes.chain(workers) {
            let output = process.output();
            let lines: Vec<&str> = output.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            text.push_str(&format!("--- {name} ---\n{}\n", tail.join("\n")));
        }
        text
    }

    async fn client(&self) -> std::result::Result<Client, ClientError> {
        Client::connect(&self.url, None).await
    }
}

/// A port of the loopback that nobody listens on now. It lies below those that systems give to whoever asks for any: they
/// would give it to somebody else meanwhile. Not the same twice within a process.
pub fn free_port() -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(101);
    for _ in 0..PORTS {
        let number = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        let port = LOWEST_PORT + number as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(Failure::new("no port of the loopback is free"))
}

/// Runs one exchange with the coordinator to its end.
fn ask<T>(exchange: impl Future<Output = std::result::Result<T, ClientError>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(async { tokio::time::timeout(COMMAND_LIMIT, exchange).await })??)
}
