//! `supra.v1`: the only wire contract between coordinator, workers and clients.
//!
//! Generated messages and services live in [`v1`].

/// Generated from `proto/supra/v1/*.proto`; the comments there are the documentation.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("supra.v1");

    /// Encoded `FileDescriptorSet`, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/supra.v1.bin"));
}
