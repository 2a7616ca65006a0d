//! The agent from outside: real sockets, real processes, a real gRPC server.

#![allow(clippy::unwrap_used)] // also in helpers, which clippy does not take for tests

mod collective;
mod coordinator;
mod session;
mod supervisor;
mod worker;
