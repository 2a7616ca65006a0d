//! What can go wrong.

use std::time::Duration;

use crate::memory::DataType;
use crate::symbols::RawResult;

/// Why `libnccl.so.2` cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// No place has it.
    #[error(
        "cannot load NCCL: {}. Install it (`pip install nvidia-nccl-cu13`, or the system's package libnccl2) and put \
         its directory into LD_LIBRARY_PATH",
        tried.join("; ")
    )]
    NotFound {
        /// What was tried, in order, each with the loader's words.
        tried: Vec<String>,
    },

    /// The library that was loaded is no NCCL, or too old to have this function.
    #[error(
        "the NCCL library has no function {name} ({cause}). Install NCCL {} or later",
        crate::Version::OLDEST
    )]
    MissingFunction {
        /// Name of the function.
        name: String,
        /// The loader's words.
        cause: String,
    },

    /// The library is older than this crate can use.
    #[error("NCCL {found} is too old: install {} or later", crate::Version::OLDEST)]
    TooOld {
        /// Its version.
        found: crate::Version,
    },
}

/// Why an operation failed. After an error a communicator is of no more use: abort or drop it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library cannot be used.
    #[error(transparent)]
    Load(#[from] LoadError),

    /// NCCL says so.
    #[error("{call}: {message}{}", detail(last_error))]
    Nccl {
        /// The function that failed, or behind which the failure was noticed.
        call: &'static str,
        /// What kind of failure it is.
        status: Status,
        /// NCCL's words for this kind (`ncclGetErrorString`).
        message: String,
        /// NCCL's words for this very failure (`ncclGetLastError`); empty when it has none.
        last_error: String,
    },

    /// The communicator was aborted, by this thread or another.
    #[error("{call}: the communicator was aborted")]
    Aborted {
        /// The function that was called or waited for.
        call: &'static str,
    },

    /// The background work of a call did not end in time: most likely a peer is missing.
    #[error("{call}: not done after {:.1} s; most likely another rank is missing", after.as_secs_f64())]
    Timeout {
        /// The function that was waited for.
        call: &'static str,
        /// How long was waited.
        after: Duration,
    },

    /// Two buffers of one operation do not fit each other.
    #[error(
        "{call}: {send} elements of {send_type:?} to send do not fit {receive} elements of {receive_type:?} to receive \
         in a world of {world}"
    )]
    Mismatch {
        /// The function that was to be called.
        call: &'static str,
        /// Elements to send.
        send: usize,
        /// Their type.
        send_type: DataType,
        /// Elements to receive.
        receive: usize,
        /// Their type.
        receive_type: DataType,
        /// Number of ranks.
        world: u32,
    },

    /// A rank outside the world was named.
    #[error("{call}: there is no rank {rank} in a world of {world}")]
    NoSuchRank {
        /// The function that was to be called.
        call: &'static str,
        /// The rank that was named.
        rank: u32,
        /// Number of ranks.
        world: u32,
    },
}

/// NCCL's words for this very failure, in brackets.
fn detail(last_error: &str) -> String {
    match last_error {
        "" => String::new(),
        words => format!(" ({words})"),
    }
}

/// `ncclResult_t`: the kind of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// A call to CUDA failed.
    UnhandledCuda,
    /// A call to the operating system failed.
    System,
    /// A bug of NCCL, or damaged memory.
    Internal,
    /// An argument is wrong.
    InvalidArgument,
    /// A call at the wrong time, or with what does not fit the calls before.
    InvalidUsage,
    /// A peer is lost: its process ended or the network broke.
    Remote,
    /// One that this crate does not know.
    Other(i32),
}

impl Status {
    pub(crate) fn new(result: RawResult) -> Status {
        match result {
            1 => Status::UnhandledCuda,
            2 => Status::System,
            3 => Status::Internal,
            4 => Status::InvalidArgument,
            5 => Status::InvalidUsage,
            6 => Status::Remote,
            other => Status::Other(other),
        }
    }
}

/// An error and its sources in one line: libloading keeps the loader's words in a source.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
