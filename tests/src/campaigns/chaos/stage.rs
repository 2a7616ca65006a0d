//! A cluster to which faults happen, and the operator who tidies up: starts again what ended, resumes what stopped.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use supra_proto::v1::RunState;

use super::schedule::{Fault, Kind, Schedule};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::process::{Process, notify};
use crate::programs::Programs;
use crate::proxy::{Mode, Proxy};

/// From the submission to the end of the run.
const LIMIT: Duration = Duration::from_secs(180);

/// For a coordinator that was asked to end, and a drain.
const ORDERLY: Duration = Duration::from_secs(90);

/// How often the operator looks.
const LOOK: Duration = Duration::from_millis(50);

/// Time between two starts of workers that ended.
const REVIVAL: Duration = Duration::from_secs(1);

/// By how much a slow line delays each chunk.
const SLOW: Duration = Duration::from_millis(300);

/// Largest file on a full disk, bytes: less than a checkpoint has, and more than the logs that the same limit holds for.
const FULL: u64 = 100_000;

/// What ends a fault that lasts.
enum Cure {
    Wake(Vec<u32>),
    Heal(String),
    Room,
    /// The drained worker is started again. Without other faults before and meanwhile the command must have gone well.
    Undrain {
        worker: String,
        command: Process,
        alone: bool,
    },
}

/// Coordinator, workers, and a line to each of them that can be disturbed.
pub(super) struct Stage {
    cluster: Cluster,
    lines: BTreeMap<String, Proxy>,
    /// Faults that go on, and until when after the submission.
    going_on: Vec<(Duration, Cure)>,
    /// Workers that were asked to end.
    leaving: Vec<Process>,
    /// Workers ever started under a new name.
    joined: u32,
    revived: Instant,
    inflicted: Vec<Fault>,
}

impl Stage {
    /// Starts a coordinator and so many workers.
    pub fn start(programs: &Programs, directory: &Path, workers: u32) -> Result<Self> {
        let mut stage = Self {
            cluster: Cluster::start(programs, directory)?,
            lines: BTreeMap::new(),
            going_on: Vec::new(),
            leaving: Vec::new(),
            joined: 0,
            revived: Instant::now(),
            inflicted: Vec::new(),
        };
        (0..workers).try_for_each(|_| stage.join())?;
        stage.cluster.wait_attached(workers as usize, ORDERLY)?;
        Ok(stage)
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The faults up to now, with their moments.
    pub fn inflicted(&self) -> Vec<String> {
        self.inflicted.iter().map(Fault::to_string).collect()
    }

    /// Lets the schedule happen until the run has finished; says which faults came before that.
    pub fn endure(&mut self, run: &str, schedule: &Schedule) -> Result<Vec<Kind>> {
        let clock = Instant::now();
        let mut ahead = schedule.faults.iter().peekable();
        loop {
            self.cure(clock.elapsed())?;
            while let Some(fault) = ahead.next_if(|fault| fault.at <= clock.elapsed()) {
                let at = clock.elapsed();
                self.inflicted.push(Fault { at, ..*fault });
                let cure = self.inflict(fault).while_doing(fault)?;
                let until = clock.elapsed() + fault.lasts;
                self.going_on.extend(cure.map(|cure| (until, cure)));
            }
            if !self.asleep()? && self.look_after(run)? {
                return Ok(self.inflicted.iter().map(|fault| fault.kind).collect());
            }
            if clock.elapsed() > LIMIT {
                let status = self.cluster.status(run)?;
                return Err(Failure::new(format!(
                    "not finished after {LIMIT:?}: {status:#?}"
                )));
            }
            sleep(LOOK);
        }
    }

    fn inflict(&mut self, fault: &Fault) -> Result<Option<Cure>> {
        let names = self.cluster.worker_names();
        let name = names[fault.worker % names.len()].clone();
        self.disturb_drains();
        match fault.kind {
            Kind::ComputeKilled => self.cluster.worker(&name)?.kill_children()?,
            Kind::SupervisorKilled => {
                self.cluster.worker(&name)?.kill()?;
                self.start_worker(&name)?;
            }
            Kind::CoordinatorKilled => {
                self.cluster.coordinator()?.kill()?;
                self.cluster.start_coordinator()?;
            }
            Kind::EverythingKilled => {
                self.cluster.coordinator()?.kill()?;
                for name in &names {
                    self.cluster.worker(name)?.kill_tree()?;
                }
                self.cluster.start_coordinator()?;
                names.iter().try_for_each(|name| self.start_worker(name))?;
            }
            Kind::ComputeStopped => {
                let worker = self.cluster.worker(&name)?;
                let stopped = worker.signal_children(Signal::SIGSTOP);
                return Ok(Some(Cure::Wake(stopped)));
            }
            Kind::CoordinatorStopped => {
                let coordinator = self.cluster.coordinator()?.pid();
                notify(coordinator, Signal::SIGSTOP);
                return Ok(Some(Cure::Wake(vec![coordinator])));
            }
            Kind::Cut => return Ok(self.disturb(name, Mode::Cut)),
            Kind::HalfOpen => return Ok(self.disturb(name, Mode::HalfOpen)),
            Kind::Slow => return Ok(self.disturb(name, Mode::Delay(SLOW))),
            Kind::DiskFull => {
                self.limit_files(Some(FULL))?;
                return Ok(Some(Cure::Room));
            }
            Kind::Restart => self.restart_coordinator()?,
            Kind::Replaced => {
                let leaving = self.cluster.dismiss_worker(&name)?;
                self.leaving.push(leaving);
                self.join()?;
            }
            Kind::Drained => {
                let command = self.cluster.start_supra(&["drain", &name])?;
                return Ok(Some(Cure::Undrain {
                    worker: name,
                    command,
                    alone: self.inflicted.len() == 1,
                }));
            }
        }
        Ok(None)
    }

    fn disturb(&self, worker: String, mode: Mode) -> Option<Cure> {
        self.lines.get(&worker)?.set(mode);
        Some(Cure::Heal(worker))
    }

    /// From now on a drain may fail for another reason than its own.
    fn disturb_drains(&mut self) {
        for (_, cure) in &mut self.going_on {
            if let Cure::Undrain { alone, .. } = cure {
                *alone = false;
            }
        }
    }

    fn limit_files(&mut self, bytes: Option<u64>) -> Result<()> {
        for name in self.cluster.worker_names() {
            self.cluster.worker(&name)?.limit_files(bytes)?;
        }
        Ok(())
    }

    /// Ends what has lasted long enough.
    fn cure(&mut self, now: Duration) -> Result<()> {
        let due = self.going_on.extract_if(.., |(until, _)| *until <= now);
        for (_, cure) in due.collect::<Vec<_>>() {
            match cure {
                Cure::Wake(processes) => wake(&processes),
                Cure::Heal(worker) => {
                    self.lines.get(&worker).inspect(|line| line.set(Mode::Pass));
                }
                Cure::Room => self.limit_files(None)?,
                Cure::Undrain {
                    worker,
                    mut command,
                    alone,
                } => {
                    if alone && command.wait(ORDERLY)?.code() != Some(0) {
                        let said = command.output();
                        return Err(Failure::new(format!("{worker} is not drained: {said}")));
                    }
                    if self.cluster.worker_names().contains(&worker) {
                        self.restart_worker(&worker)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The coordinator stands still: whoever asks it would wait for the answer.
    fn asleep(&mut self) -> Result<bool> {
        let coordinator = self.cluster.coordinator()?.pid();
        Ok(self.going_on.iter().any(
            |(_, cure)| matches!(cure, Cure::Wake(processes) if processes.contains(&coordinator)),
        ))
    }

    /// In order: it stops its run with a checkpoint and sends its workers away.
    fn restart_coordinator(&mut self) -> Result<()> {
        let coordinator = self.cluster.coordinator()?;
        // A process that stands still ends when it goes on.
        wake(&[coordinator.pid()]);
        coordinator.signal(Signal::SIGTERM)?;
        let end = coordinator.wait(ORDERLY)?;
        match end.code() {
            Some(0 | 75) => self.cluster.start_coordinator(),
            _ => Err(Failure::new(format!("the coordinator ended with {end}"))),
        }
    }

    /// What an operator does between two looks; whether the run has finished.
    fn look_after(&mut self, run: &str) -> Result<bool> {
        let status = self.cluster.status(run)?;
        let full = |(_, cure): &(_, Cure)| matches!(cure, Cure::Room);
        let was_full = self
            .inflicted
            .iter()
            .any(|fault| fault.kind == Kind::DiskFull);
        match status.state() {
            RunState::Finished => return Ok(true),
            RunState::Failed if !was_full => {
                return Err(Failure::new(format!("it failed: {}", status.reason)));
            }
            RunState::Failed if self.going_on.iter().any(full) => {}
            RunState::Failed | RunState::Cancelled => {
                self.cluster.supra(&["resume", run])?.expect_code(0)?;
            }
            _ => {}
        }
        if self.revived.elapsed() >= REVIVAL {
            self.revived = Instant::now();
            self.revive()?;
        }
        Ok(false)
    }

    /// Starts workers again that were sent away or refused, and, when all faults are over, those that were put aside.
    fn revive(&mut self) -> Result<()> {
        for name in self.cluster.worker_names() {
            if self.cluster.worker(&name)?.ended()?.is_some() {
                self.start_worker(&name)?;
            }
        }
        if self.going_on.is_empty() {
            for name in self.cluster.aside()? {
                self.restart_worker(&name)?;
            }
        }
        Ok(())
    }

    /// A worker under a new name.
    fn join(&mut self) -> Result<()> {
        let name = format!("w{}", self.joined);
        self.joined += 1;
        let coordinator = self.cluster.url().trim_start_matches("http://");
        let coordinator: SocketAddr = coordinator.parse()?;
        self.lines.insert(name.clone(), Proxy::start(coordinator)?);
        self.start_worker(&name)
    }

    fn start_worker(&mut self, name: &str) -> Result<()> {
        let line = self.lines.get(name);
        let line = line.ok_or_else(|| Failure::new(format!("no line to worker {name}")))?;
        let url = format!("http://{}", line.address());
        let command = self.cluster.worker_command_by(&url, "cpu", name);
        self.cluster.adopt_worker(name, command)
    }

    fn restart_worker(&mut self, name: &str) -> Result<()> {
        self.cluster.remove_worker(name)?;
        self.start_worker(name)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A process whose supervisor was killed while it stood still ends by itself once it goes on.
        for (_, cure) in &self.going_on {
            if let Cure::Wake(processes) = cure {
                wake(processes);
            }
        }
    }
}

fn wake(processes: &[u32]) {
    for process in processes {
        notify(*process, Signal::SIGCONT);
    }
}
