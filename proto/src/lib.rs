//! `supra.v1`: the only wire contract between coordinator, workers and clients.
//!
//! Generated messages and services live in [`v1`]; [`Client`] speaks the client's half of it,
//! [`attach`] opens the worker's half. [`Token`] is the shared secret, [`Bearer`] sends it and
//! [`TokenCheck`] asks for it.

#![forbid(unsafe_code)]

mod channel;
mod client;
mod error;
mod token;

pub use channel::{CONNECT_TIMEOUT, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, attach};
pub use client::{Client, Incoming};
pub use error::ClientError;
pub use token::{Bearer, Token, TokenCheck, TokenError};

/// Generated from `proto/supra/v1/*.proto`; the comments there are the documentation.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("supra.v1");

    /// Encoded `FileDescriptorSet`, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/supra.v1.bin"));
}
