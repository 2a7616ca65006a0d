//! `supra.v1`: the only wire contract between coordinator, workers and clients.
//!
//! Generated messages and services live in [`v1`]; [`Client`] speaks the client's half of it,
//! [`attach`] opens the worker's half, and [`ledger`] is what rank 0 puts into checkpoints. [`Token`] is the shared secret, [`Bearer`] sends it and
//! [`TokenCheck`] asks for it.

#![forbid(unsafe_code)]

use std::time::Duration;

mod channel;
mod client;
mod error;
mod token;

pub use channel::{CONNECT_TIMEOUT, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, attach, ledger};
pub use client::{Client, Incoming};
pub use error::ClientError;
pub use token::{Bearer, Token, TokenCheck, TokenError};

/// Version and commit of this build, such as `0.1.0 (1a2b3c4d5e6f)`; the version alone where the sources came without
/// their history, and `0.1.0 (debug build)` outside the release profile. All programs show it, and
/// coordinator and worker compare it when they meet: it stands here, and not in each of them, so that programs that were
/// built together always agree. Changes that are not committed do not show.
pub const BUILD: &str = env!("SUPRA_BUILD");

/// Longest pause of a worker between two looks for a coordinator that may wait for its generation.
pub const AWAITED_PAUSE: Duration = Duration::from_secs(2);

/// Generated from `proto/supra/v1/*.proto`; the comments there are the documentation.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("supra.v1");

    /// Encoded `FileDescriptorSet`, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/supra.v1.bin"));
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    #[test]
    fn a_release_names_its_commit_and_a_debug_build_itself() {
        let git = |arguments: &[&str]| {
            let output = Command::new("git")
                .args(arguments)
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .output()
                .ok()?;
            let answer = String::from_utf8(output.stdout).ok()?;
            output.status.success().then_some(answer)
        };
        let ours = git(&["ls-files", "--error-unmatch", "build.rs"]);
        let head = ours.and_then(|_| git(&["rev-parse", "HEAD"]));
        let version = env!("CARGO_PKG_VERSION");
        let expected = match head {
            _ if cfg!(debug_assertions) => format!("{version} (debug build)"),
            Some(head) => format!("{version} ({})", &head[..12]),
            None => version.to_owned(),
        };
        assert_eq!(super::BUILD, expected);
    }
}
