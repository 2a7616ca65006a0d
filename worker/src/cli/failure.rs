//! How a command ends that could not do its work.

use std::{error::Error, process::ExitCode};

use supra_checkpoint::{StoredError, sums::SumsError};
use supra_worker::{
    checkpoint::CheckpointError,
    device::DeviceError,
    failure::chain,
    inference::{
        engine::EngineError, evaluate::EvaluateError, generate::GenerateError, load::LoadError,
        report::ReportError, saved::SavedError, scorer::ScoreError, serve::ServeError,
        tasks::TaskError,
    },
    model::ModelError,
};

/// The command failed.
const FAILED: u8 = 1;
/// What the user gave is wrong.
const INPUT: u8 = 2;
/// Something stored is not what was stored, or computed is not what it has to be.
const BROKEN: u8 = 4;
/// Ended by Ctrl-C, as shells say it.
pub(super) const INTERRUPTED: u8 = 130;

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// Whoever read our output has gone; nothing is left to say.
    Closed,
    /// Somebody has had enough; what was written stands.
    Interrupted,
    /// A paragraph to print, and the exit code that goes with it.
    Told {
        /// Exit code.
        code: u8,
        /// What, where, why, and what to do.
        message: String,
    },
}

impl Failure {
    /// An error with an exit code of its own.
    pub fn with_code(code: u8, error: &dyn Error) -> Failure {
        Failure::Told {
            code,
            message: chain(error),
        }
    }

    /// It went wrong while running.
    pub fn failed(message: String) -> Failure {
        Failure::Told {
            code: FAILED,
            message,
        }
    }

    /// What the user gave is wrong.
    pub fn input(message: String) -> Failure {
        Failure::Told {
            code: INPUT,
            message,
        }
    }

    /// Something is not what it has to be.
    pub fn broken(message: String) -> Failure {
        Failure::Told {
            code: BROKEN,
            message,
        }
    }

    /// Prints the error and gives the exit code. A closed stdout is no error.
    pub fn report(self) -> ExitCode {
        match self {
            Failure::Closed => ExitCode::SUCCESS,
            Failure::Interrupted => ExitCode::from(INTERRUPTED),
            Failure::Told { code, message } => {
                super::out::complain(&format!("error: {message}"));
                ExitCode::from(code)
            }
        }
    }
}

impl From<DeviceError> for Failure {
    fn from(error: DeviceError) -> Failure {
        Failure::with_code(FAILED, &error)
    }
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Failure {
        match error {
            CheckpointError::Stored(error) => error.into(),
            other => Failure::with_code(INPUT, &other),
        }
    }
}

impl From<StoredError> for Failure {
    fn from(error: StoredError) -> Failure {
        let code = match error {
            StoredError::Damaged { .. } => BROKEN,
            ref error if error.is_transient() => FAILED,
            _ => INPUT,
        };
        Failure::with_code(code, &error)
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Failure {
        let code = match error {
            EngineError::Memory { .. } | EngineError::Kernel(_) => FAILED,
            _ => INPUT,
        };
        Failure::with_code(code, &error)
    }
}

impl From<SavedError> for Failure {
    fn from(error: SavedError) -> Failure {
        let code = match error {
            SavedError::Damaged { .. } => BROKEN,
            SavedError::Io {
                action: "write", ..
            }
            | SavedError::Torch(_) => FAILED,
            _ => INPUT,
        };
        Failure::with_code(code, &error)
    }
}

impl From<SumsError> for Failure {
    fn from(error: SumsError) -> Failure {
        let code = match error {
            SumsError::Damaged { .. } => BROKEN,
            SumsError::Absent { .. } | SumsError::Io { .. } => INPUT,
        };
        Failure::with_code(code, &error)
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Failure {
        match error {
            ServeError::Stored(error) => error.into(),
            ServeError::Load(error) => error.into(),
            ServeError::Engine(error) => error.into(),
            ServeError::Listen { .. } => Failure::with_code(INPUT, &error),
            ServeError::System(_) | ServeError::Broken(_) => Failure::with_code(FAILED, &error),
        }
    }
}

/// These speak of what the user named.
macro_rules! input_errors {
    ($($error:ty),*) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                Failure::with_code(INPUT, &error)
            }
        })*
    };
}

input_errors!(
    ModelError,
    LoadError,
    EvaluateError,
    GenerateError,
    ReportError,
    ScoreError,
    TaskError,
    supra_data::DataError,
    supra_proto::TokenError
);
