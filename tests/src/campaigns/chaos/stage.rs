//! A cluster to which faults happen, and the operator who tidies up: starts again what ended, resumes what stopped.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use supra_proto::v1::RunState;

use super::lines::Lines;
use super::schedule::{Fault, Kind, Schedule};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::process::{Process, notify};
use crate::programs::Programs;
use crate::proxy::Mode;

/// From the submission to the end of the run.
const LIMIT: Duration = Duration::from_secs(300);

/// For a coordinator that was asked to end, and a drain.
const ORDERLY: Duration = Duration::from_secs(90);

/// How often the operator looks.
const LOOK: Duration = Duration::from_millis(50);

/// Time between two starts of workers that ended.
const REVIVAL: Duration = Duration::from_secs(1);

/// Largest file on a full disk, bytes: less than a checkpoint has, and than the journal of a run, and more than the logs
/// that the same limit holds for.
const FULL: u64 = 100_000;

/// What ends a fault that lasts.
enum Cure {
    Wake(Vec<u32>),
    HealControl(String),
    HealData(String),
    Room,
    /// For the journal.
    JournalRoom,
    /// The drained worker is started again. Without other faults before and meanwhile the command must have gone well.
    Undrain {
        worker: String,
        command: Process,
        alone: bool,
    },
    /// A worker joins, in place of one that left.
    Join,
    /// The worker that joined leaves.
    Leave(String),
}

/// Coordinator, workers, and lines to each of them that can be disturbed.
pub(super) struct Stage {
    cluster: Cluster,
    lines: BTreeMap<String, Lines>,
    /// Faults that go on, and until when after the submission.
    going_on: Vec<(Duration, Cure)>,
    /// Workers that were asked to end.
    leaving: Vec<Process>,
    /// Workers ever started under a new name.
    joined: u32,
    revived: Instant,
    inflicted: Vec<Fault>,
    /// Ranks of the generations that were seen.
    worlds: BTreeMap<u64, u32>,
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
            worlds: BTreeMap::new(),
        };
        for _ in 0..workers {
            stage.join()?;
        }
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

    /// How many ranks the generations had, by their numbers; those that were too short to be seen are missing.
    pub fn worlds(&self) -> &BTreeMap<u64, u32> {
        &self.worlds
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
            if !self.asleep()? && self.finished(run)? {
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
        let Some(name) = names.get(fault.worker % names.len().max(1)).cloned() else {
            // All have left: there is nobody to whom anything could happen.
            return Ok(None);
        };
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
            // It has no process when its disk is full.
            Kind::CoordinatorStopped if self.cluster.coordinator()?.ended()?.is_some() => {}
            Kind::CoordinatorStopped => {
                let coordinator = self.cluster.coordinator()?.pid();
                notify(coordinator, Signal::SIGSTOP);
                return Ok(Some(Cure::Wake(vec![coordinator])));
            }
            Kind::Control(how) => {
                self.lines(&name)?.control.set(how.into());
                return Ok(Some(Cure::HealControl(name)));
            }
            Kind::Data(how) => {
                self.lines(&name)?.data.set(how.into());
                return Ok(Some(Cure::HealData(name)));
            }
            Kind::DiskFull => {
                self.limit_files(Some(FULL))?;
                return Ok(Some(Cure::Room));
            }
            Kind::JournalFull => {
                self.cluster.coordinator()?.limit_files(Some(FULL))?;
                return Ok(Some(Cure::JournalRoom));
            }
            Kind::Restart => self.restart_coordinator()?,
            Kind::Replaced => {
                self.leave(&name)?;
                self.join()?;
            }
            Kind::Joined => {
                let name = self.join()?;
                return Ok(Some(Cure::Leave(name)));
            }
            Kind::Left => {
                self.leave(&name)?;
                return Ok(Some(Cure::Join));
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

    fn lines(&self, worker: &str) -> Result<&Lines> {
        let lines = self.lines.get(worker);
        lines.ok_or_else(|| Failure::new(format!("no lines to worker {worker}")))
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
                Cure::HealControl(worker) => self.lines(&worker)?.control.set(Mode::Pass),
                Cure::HealData(worker) => self.lines(&worker)?.data.set(Mode::Pass),
                Cure::Room => self.limit_files(None)?,
                Cure::JournalRoom => self.cluster.coordinator()?.limit_files(None)?,
                Cure::Undrain {
                    worker,
                    command,
                    alone,
                } => self.undrain(&worker, command, alone)?,
                Cure::Join => drop(self.join()?),
                Cure::Leave(worker) => self.leave(&worker)?,
            }
        }
        Ok(())
    }

    fn undrain(&mut self, worker: &str, mut command: Process, alone: bool) -> Result<()> {
        if alone && command.wait(ORDERLY)?.code() != Some(0) {
            let said = command.output();
            return Err(Failure::new(format!("{worker} is not drained: {said}")));
        }
        if self
            .cluster
            .worker_names()
            .iter()
            .any(|name| name == worker)
        {
            self.restart_worker(worker)?;
        }
        Ok(())
    }

    /// The coordinator stands still, and whoever asks it would wait for the answer; or it has ended for want of room.
    fn asleep(&mut self) -> Result<bool> {
        let coordinator = self.cluster.coordinator()?;
        let (process, ended) = (coordinator.pid(), coordinator.ended()?.is_some());
        Ok(self.going_on.iter().any(|(_, cure)| match cure {
            Cure::Wake(processes) => processes.contains(&process),
            Cure::JournalRoom => ended,
            _ => false,
        }))
    }

    /// Looks after the run. A coordinator whose disk was full may end at any moment; when there is room it is started again.
    fn finished(&mut self, run: &str) -> Result<bool> {
        let looked = self.look_after(run);
        if looked.is_ok() || !self.suffered(Kind::JournalFull) {
            return looked;
        }
        if self.cluster.coordinator()?.ended()?.is_some() && !self.asleep()? {
            self.cluster.start_coordinator()?;
        }
        Ok(false)
    }

    /// Such a fault has happened.
    fn suffered(&self, kind: Kind) -> bool {
        self.inflicted.iter().any(|fault| fault.kind == kind)
    }

    /// In order: it stops its run with a checkpoint and sends its workers away.
    fn restart_coordinator(&mut self) -> Result<()> {
        let coordinator = self.cluster.coordinator()?;
        if coordinator.ended()?.is_some() {
            return self.cluster.start_coordinator();
        }
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
        if status.world > 0 {
            self.worlds.insert(status.generation, status.world);
        }
        let full = |(_, cure): &(_, Cure)| matches!(cure, Cure::Room);
        let was_full = self.suffered(Kind::DiskFull);
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

    /// A worker under a new name, which is returned.
    fn join(&mut self) -> Result<String> {
        let name = format!("w{}", self.joined);
        self.joined += 1;
        let lines = Lines::start(self.cluster.url())?;
        self.lines.insert(name.clone(), lines);
        self.start_worker(&name)?;
        Ok(name)
    }

    /// Asks a worker to end, unless it was asked before.
    fn leave(&mut self, name: &str) -> Result<()> {
        if self
            .cluster
            .worker_names()
            .iter()
            .any(|other| other == name)
        {
            let leaving = self.cluster.dismiss_worker(name)?;
            self.leaving.push(leaving);
        }
        Ok(())
    }

    fn start_worker(&mut self, name: &str) -> Result<()> {
        let lines = self.lines(name)?;
        let mut command = self
            .cluster
            .worker_command_by(&lines.coordinator(), "cpu", name);
        command.args(lines.arguments());
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
