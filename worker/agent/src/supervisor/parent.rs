//! The parent process: starts the child, listens to it, starts it again.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, kill, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{sleep, sleep_until};

use super::cause::describe;
use super::tail::Tail;
use super::{Birth, MARK};
use crate::error::AgentError;

/// Exit codes after which another child would end the same way, or is not wanted: done, bad input,
/// unreachable, stopped, interrupted.
const FINAL: [i32; 5] = [0, 2, 3, 75, 130];

/// Exit code of a supervisor that was stopped and whose child did not say how it ended.
const INTERRUPTED: u8 = 130;

/// Time for the rest of a dead child's output to come through.
const OUTPUT: Duration = Duration::from_secs(1);

/// NCCL's variables that decide in which order it adds, and so the last bits: left alone, it chooses anew for every
/// communicator.
const NCCL: [(&str, &str); 2] = [("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple")];

/// What of it a child gets: what the user has not set.
fn pinned(set: impl Fn(&str) -> bool) -> impl Iterator<Item = (&'static str, &'static str)> {
    NCCL.into_iter().filter(move |(name, _)| !set(name))
}

/// How fast a supervisor acts.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Pause before the first restart; it doubles with every one.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// A child that lived this long makes the next pause the first one again.
    pub healthy: Duration,
    /// Time for a child that was asked to stop; then it is killed.
    pub stop: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            first_pause: Duration::from_secs(1),
            longest_pause: Duration::from_secs(30),
            healthy: Duration::from_secs(60),
            stop: Duration::from_secs(30),
        }
    }
}

/// Runs a program as a child, and again whenever it dies.
#[derive(Clone, Debug)]
pub struct Supervisor {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// How fast to act.
    pub pace: Pace,
}

/// Runs this program again with the same arguments, as a child, and again whenever it dies. Passes
/// its output on. The first SIGTERM or SIGINT asks the child to stop, the second kills it. Ends with
/// the child's exit code when that says that there is nothing to repeat: 0, 2, 3, 75 or 130.
pub fn supervise() -> ExitCode {
    let run = || {
        let program = std::env::current_exe().map_err(|cause| AgentError::Supervisor {
            what: "find this program".to_owned(),
            cause,
        })?;
        let arguments = std::env::args_os().skip(1).collect();
        Supervisor {
            program,
            arguments,
            pace: Pace::default(),
        }
        .run()
    };
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// How a child's life ended.
struct Death {
    status: ExitStatus,
    last_words: String,
    /// A signal asked for it.
    stopped: bool,
}

impl Supervisor {
    /// Supervises until there is nothing to repeat; returns the exit code. Blocks.
    ///
    /// # Errors
    ///
    /// When the program cannot be started at all.
    pub fn run(&self) -> Result<u8, AgentError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.map_err(|cause| failed("start the supervisor", cause))?;
        runtime.block_on(self.watch())
    }

    async fn watch(&self) -> Result<u8, AgentError> {
        let mut stops = Stops::new().map_err(|cause| failed("listen to signals", cause))?;
        let mut birth = Birth::default();
        let mut pause = self.pace.first_pause;
        loop {
            let born = Instant::now();
            let death = self.raise(&birth, &mut stops).await?;
            let code = death.status.code();
            if death.stopped {
                return Ok(code
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(INTERRUPTED));
            }
            if let Some(code) = code.filter(|code| FINAL.contains(code)) {
                return Ok(code as u8);
            }
            if born.elapsed() >= self.pace.healthy {
                pause = self.pace.first_pause;
            }
            birth.previous_exit = describe(death.status, &death.last_words);
            tracing::warn!(
                "the worker process ended: {}; starting another one in {:.1} s",
                birth.previous_exit,
                pause.as_secs_f64()
            );
            tokio::select! {
                () = sleep(pause) => {}
                () = stops.next() => return Ok(INTERRUPTED),
            }
            pause = (pause * 2).min(self.pace.longest_pause);
        }
    }

    /// One child, from birth to death.
    async fn raise(&self, birth: &Birth, stops: &mut Stops) -> Result<Death, AgentError> {
        let start = || {
            failed(
                &format!("start {}", self.program.display()),
                std::io::ErrorKind::Other.into(),
            )
        };
        let set_by_the_user = |name: &str| std::env::var_os(name).is_some();
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .env(MARK, "1")
            .envs(pinned(set_by_the_user))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|cause| failed(&format!("start {}", self.program.display()), cause))?;
        let pid = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .map(Pid::from_raw)
            .ok_or_else(start)?;
        // Held until the child is dead: the child takes its closing for our death.
        let mut lifeline = child.stdin.take().ok_or_else(start)?;
        let (stdout, stderr) = (
            child.stdout.take().ok_or_else(start)?,
            child.stderr.take().ok_or_else(start)?,
        );
        let (said, complained) = (Tail::default(), Tail::default());
        let output = copy(&said, stdout.into_owned_fd(), std::io::stdout())?;
        let errors = copy(&complained, stderr.into_owned_fd(), std::io::stderr())?;

        let letter = serde_json::to_string(birth)
            .map_err(|error| failed("write to the child", error.into()))?;
        // A child that is dead already shows in its status.
        lifeline
            .write_all(format!("{letter}\n").as_bytes())
            .await
            .ok();

        let (status, stopped) = self.wait(&mut child, pid, stops).await?;
        // Whatever it left behind in its group would hold the output and the device.
        killpg(pid, signal::Signal::SIGKILL).ok();
        for copied in [output, errors] {
            copied.recv_timeout(OUTPUT).ok();
        }
        let last_words = Some(complained.last_words()).filter(|words| !words.is_empty());
        Ok(Death {
            status,
            last_words: last_words.unwrap_or_else(|| said.last_words()),
            stopped,
        })
    }

    /// Waits for the child's end; whether it was asked to.
    async fn wait(
        &self,
        child: &mut Child,
        pid: Pid,
        stops: &mut Stops,
    ) -> Result<(ExitStatus, bool), AgentError> {
        let mut deadline = None;
        loop {
            let overdue = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                status = child.wait() => {
                    let status = status.map_err(|cause| failed("wait for the child", cause))?;
                    return Ok((status, deadline.is_some()));
                }
                () = stops.next() => {
                    if deadline.is_none() {
                        kill(pid, signal::Signal::SIGTERM).ok();
                        deadline = Some(tokio::time::Instant::now() + self.pace.stop);
                    } else {
                        killpg(pid, signal::Signal::SIGKILL).ok();
                    }
                }
                () = overdue => {
                    tracing::warn!("the worker process does not stop: killing it");
                    killpg(pid, signal::Signal::SIGKILL).ok();
                    deadline = Some(tokio::time::Instant::now() + self.pace.stop);
                }
            }
        }
    }
}

/// Copies an output in a thread of its own. The receiver hears when it has come to its end.
fn copy(
    tail: &Tail,
    from: std::io::Result<OwnedFd>,
    to: impl Write + Send + 'static,
) -> Result<Receiver<()>, AgentError> {
    let (done, copied) = channel();
    let tail = tail.clone();
    from.and_then(|from| {
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || {
                tail.pass(File::from(from), to);
                done.send(()).ok();
            })
    })
    .map_err(|cause| failed("read the child's output", cause))?;
    Ok(copied)
}

/// Signals that ask to stop.
struct Stops {
    terminate: Signal,
    interrupt: Signal,
}

impl Stops {
    fn new() -> std::io::Result<Stops> {
        Ok(Stops {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn failed(what: &str, cause: std::io::Error) -> AgentError {
    AgentError::Supervisor {
        what: what.to_owned(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_has_set_for_nccl_stays() {
        let given = |set: &str| pinned(|name| name == set).collect::<Vec<_>>();
        assert_eq!(given(""), NCCL);
        assert_eq!(given("NCCL_ALGO"), [("NCCL_PROTO", "Simple")]);
    }
}
