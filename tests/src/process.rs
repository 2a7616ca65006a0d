//! Real processes with an end: every wait has a limit, and nothing outlives its owner.

use std::fs::{File, OpenOptions};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::failure::{Failure, Result, While};

/// How often a wait looks again.
pub const POLL: Duration = Duration::from_millis(20);

/// A started program. Dropping it kills it and everything below it.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; both output streams are appended to `DIRECTORY/NAME.log`.
    ///
    /// Its standard input is a pipe that we hold: our programs end when it closes, so that nothing
    /// outlives a test that is killed.
    pub fn spawn(name: &str, mut command: Command, directory: &Path) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = OpenOptions::new().create(true).append(true).open(&log)?;
        let child = command
            .env("SUPRA_PARENT_PIPE", "1")
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .while_doing(format_args!("starting {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it has printed so far.
    pub fn output(&self) -> String {
        std::fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let output = self.output();
                return Err(Failure::new(format!(
                    "{} did not end within {limit:?}; it printed:\n{output}",
                    self.name
                )));
            }
            sleep(POLL);
        }
    }

    /// Sends a signal to the process itself.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(pid(self.pid()), signal)?)
    }

    /// `kill -9` of the process alone; what it started is left to notice.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Limits the size of files that it and what it started may write; none lifts the limit. What they start later
    /// inherits it.
    pub fn limit_files(&self, bytes: Option<u64>) -> Result<()> {
        // A soft limit, which may be raised again.
        let limit = match bytes {
            Some(bytes) => format!("--fsize={bytes}:"),
            None => "--fsize=unlimited:".to_owned(),
        };
        for process in [self.pid()].into_iter().chain(descendants(self.pid())) {
            let mut prlimit = Command::new("prlimit");
            prlimit.arg("--pid").arg(process.to_string()).arg(&limit);
            let output = run(prlimit, Duration::from_secs(10))?;
            if lives(process) {
                output.expect_code(0)?;
            }
        }
        Ok(())
    }

    /// `kill -9` of what it started, and not of itself.
    pub fn kill_children(&self) -> Result<()> {
        self.signal_children(Signal::SIGKILL);
        Ok(())
    }

    /// Sends a signal to what it started, and not to itself; returns the ids of these processes.
    pub fn signal_children(&self, signal: Signal) -> Vec<u32> {
        let children = descendants(self.pid());
        children.iter().for_each(|child| notify(*child, signal));
        children
    }

    /// `kill -9` of the process and of everything below it.
    pub fn kill_tree(&mut self) -> Result<()> {
        let below = descendants(self.pid());
        self.kill()?;
        for process in below {
            notify(process, Signal::SIGKILL);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.kill_tree();
        }
    }
}

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Output {
    /// Exit code, or 128 + the signal that ended it, as shells count.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Fails, showing everything, unless the program ended with `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.code == code {
            return Ok(self);
        }
        Err(Failure::new(format!(
            "ended with {} instead of {code}\n{self}",
            self.code
        )))
    }

    /// Fails unless both output streams together contain every one of `words`, whatever the case.
    pub fn expect_words(self, words: &[&str]) -> Result<Self> {
        let all = format!("{}\n{}", self.stdout, self.stderr).to_lowercase();
        // Reports wrap lines with a border: compare words, not lines.
        let all = all
            .replace('│', " ")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        match words
            .iter()
            .find(|word| !all.contains(&word.to_lowercase()))
        {
            None => Ok(self),
            Some(word) => Err(Failure::new(format!("does not say \"{word}\"\n{self}"))),
        }
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "exit code {}\nstdout:\n{}\nstderr:\n{}",
            self.code, self.stdout, self.stderr
        )
    }
}

/// Runs a program to its end.
pub fn run(mut command: Command, limit: Duration) -> Result<Output> {
    let scratch = tempfile::tempdir()?;
    let (out, err) = (scratch.path().join("out"), scratch.path().join("err"));
    let child = command
        .stdin(Stdio::null())
        .stdout(File::create(&out)?)
        .stderr(File::create(&err)?)
        .spawn()
        .while_doing(format_args!("starting {command:?}"))?;
    let mut process = Process {
        name: format!("{command:?}"),
        child,
        log: err.clone(),
    };
    let status = process.wait(limit)?;
    Ok(Output {
        code: status
            .code()
            .or(status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1),
        stdout: String::from_utf8_lossy(&std::fs::read(&out)?).into_owned(),
        stderr: String::from_utf8_lossy(&std::fs::read(&err)?).into_owned(),
    })
}

/// Sends a signal to a process that may have ended meanwhile.
pub fn notify(process: u32, signal: Signal) {
    let _ = kill(pid(process), signal);
}

fn lives(process: u32) -> bool {
    kill(pid(process), None).is_ok()
}

fn descendants(process: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut open = vec![process];
    while let Some(parent) = open.pop() {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else {
            continue;
        };
        for thread in threads.flatten() {
            let children = std::fs::read_to_string(thread.path().join("children"));
            let children = children.unwrap_or_default();
            let children = children
                .split_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok());
            for child in children {
                found.push(child);
                open.push(child);
            }
        }
    }
    found
}

fn pid(process: u32) -> Pid {
    Pid::from_raw(process.cast_signed())
}
