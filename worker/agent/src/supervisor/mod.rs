//! `supra-worker run` is two processes: a supervisor that stays small, and a child that computes.

use crate::error::AgentError;

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

/// Finds out which process this is. In a child, starts the thread that ends it with its supervisor.
pub fn role() -> Result<Role, AgentError> {
    Ok(Role::Supervisor)
}

/// Runs this program again with the same arguments, as a child, and again whenever it dies.
pub fn supervise() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
