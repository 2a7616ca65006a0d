//! How a command ends: exit codes and errors told in one paragraph.

use std::fmt;
use std::process::ExitCode;

use supra_proto::ClientError;
use tonic::Code;

/// Exit codes of the command line; part of its contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for is done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The input is wrong: arguments, recipe, data, an unknown run.
    Input = 2,
    /// The coordinator cannot be reached.
    Unreachable = 3,
    /// An audit or verification found something broken, or a comparison a difference.
    Broken = 4,
    /// Stopped on request, with everything kept that a resume needs.
    Stopped = 75,
    /// Interrupted by a signal before anything was kept.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// Whoever read our output has gone; nothing is left to say.
    Closed,
    /// An error to print: what, where, cause and remedy.
    Told {
        /// The exit code that goes with it.
        exit: Exit,
        /// The paragraph, without a leading "error:".
        message: String,
    },
}

impl Failure {
    /// It went wrong while running.
    pub fn failed(message: impl Into<String>) -> Failure {
        Failure::Told {
            exit: Exit::Failed,
            message: message.into(),
        }
    }

    /// What the user gave is wrong.
    pub fn input(message: impl Into<String>) -> Failure {
        Failure::Told {
            exit: Exit::Input,
            message: message.into(),
        }
    }

    /// Nobody answers.
    pub fn unreachable(message: impl Into<String>) -> Failure {
        Failure::Told {
            exit: Exit::Unreachable,
            message: message.into(),
        }
    }

    /// Prints the error to stderr and gives the exit code. A closed stdout is no error.
    pub fn report(self) -> Exit {
        match self {
            Failure::Closed => Exit::Done,
            Failure::Told { exit, message } => {
                super::out::complain(&format!("error: {message}"));
                exit
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Closed => f.write_str("standard output is closed"),
            Failure::Told { message, .. } => f.write_str(message),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        let exit = match error.exit_code() {
            2 => Exit::Input,
            3 => Exit::Unreachable,
            _ => Exit::Failed,
        };
        let message = match &error {
            ClientError::Status { code: Code::Unimplemented, .. } => {
                "the coordinator does not know this request: it is of another version, update both to the same".to_owned()
            }
            _ => error.to_string(),
        };
        Failure::Told { exit, message }
    }
}

/// An error and its causes on one line, each only once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Status;

    fn told(status: &Status) -> (Exit, String) {
        match Failure::from(ClientError::from_status("http://h:1", status)) {
            Failure::Told { exit, message } => (exit, message),
            Failure::Closed => unreachable!("a status is told"),
        }
    }

    #[test]
    fn a_validation_report_is_passed_on_as_it_is() {
        let (exit, message) = told(&Status::invalid_argument("recipe.yaml:3:5: no"));
        assert_eq!(
            (exit, message.as_str()),
            (Exit::Input, "recipe.yaml:3:5: no")
        );
    }

    #[test]
    fn a_lost_coordinator_is_unreachable() {
        assert_eq!(told(&Status::unavailable("gone")).0, Exit::Unreachable);
    }

    #[test]
    fn an_older_coordinator_is_named_as_such() {
        assert!(
            told(&Status::unimplemented(""))
                .1
                .contains("another version")
        );
    }

    #[test]
    fn a_repeated_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read: no such file")]
        struct Outer(#[source] Inner);
        #[derive(Debug, thiserror::Error)]
        #[error("no such file")]
        struct Inner;
        assert_eq!(chain(&Outer(Inner)), "cannot read: no such file");
    }
}
