//! `supra-worker run` is two processes: a supervisor that stays small, and a child that computes.
//!
//! The program asks for its [`role`] before it touches libtorch. As a supervisor it runs itself
//! again with the same arguments ([`supervise`]), as the leader of a process group of its own. A pipe
//! ties the child to its supervisor: through the standard input the child learns of its [`Birth`],
//! and when that closes, because the supervisor died in whatever way, the child's group dies too.

mod cause;
mod parent;
mod tail;

pub use parent::{Pace, Supervisor, supervise};

use std::io::{BufRead, Read};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgrp, getpid};

use crate::error::AgentError;
use crate::worker::Exit;

/// Marks a child. Only ever set on the child's own environment.
const MARK: &str = "SUPRA_SUPERVISED";

/// What a supervisor tells its child.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Birth {
    /// Random, the same for all children of one supervisor.
    pub instance: String,
    /// How the previous child ended, in words; empty for the first.
    pub previous_exit: String,
}

impl Default for Birth {
    /// The birth of a process without supervisor.
    fn default() -> Self {
        Birth {
            instance: format!("{:032x}", rand::random::<u128>()),
            previous_exit: String::new(),
        }
    }
}

/// Which of the two processes this one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// The first: it has to call [`supervise`] and end with its exit code, without touching libtorch.
    Supervisor,
    /// The second: it computes.
    Child(Birth),
}

/// Finds out which process this is. In a child, starts the thread that ends it with its supervisor;
/// call it once.
///
/// # Errors
///
/// When the process is marked as a child and its standard input does not come from a supervisor.
pub fn role() -> Result<Role, AgentError> {
    if std::env::var_os(MARK).is_none() {
        return Ok(Role::Supervisor);
    }
    let fail = |cause: std::io::Error| AgentError::Supervisor {
        what: format!("hear from the supervisor ({MARK} is set, which only a supervisor does)"),
        cause,
    };
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(fail)?;
    let birth = serde_json::from_str(&line).map_err(|error| fail(error.into()))?;
    let watch = std::thread::Builder::new().name("lifeline".to_owned());
    watch.spawn(outlive_nobody).map_err(fail)?;
    Ok(Role::Child(birth))
}

/// Waits for the end of the supervisor, and ends with it.
fn outlive_nobody() {
    let mut stdin = std::io::stdin().lock();
    while matches!(stdin.read(&mut [0; 64]), Ok(1..)) {}
    if getpgrp() == getpid() {
        killpg(getpgrp(), Signal::SIGKILL).ok();
    }
    kill(getpid(), Signal::SIGKILL).ok();
}

/// Ends this process although its training loop is busy: with the exit that was due, or by SIGALRM,
/// so that the supervisor starts another one.
pub(crate) fn die(limit: Duration, exit: Option<&Exit>) -> ! {
    tracing::error!(
        "the training loop did not leave its void generation within {:.1} s: ending the process",
        limit.as_secs_f64()
    );
    // Destructors of libraries may wait for the very thread that hangs.
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_secs(1));
        kill(getpid(), Signal::SIGKILL)
    });
    if exit.is_none() {
        kill(Pid::this(), Signal::SIGALRM).ok();
    }
    std::process::exit(exit.map_or(1, |exit| i32::from(exit.exit_code())))
}
