//! Whole-system tests: real processes, real sockets, real files.
//!
//! The library is the harness ([`Programs`], [`Process`], [`Cluster`], [`Fixture`]) and the campaigns
//! ([`campaigns`]) that `scripts/prove` runs large and the tests run small.
#![forbid(unsafe_code)]

pub mod campaigns;
pub mod cluster;
pub mod failure;
pub mod fixture;
pub mod http;
pub mod ledger;
pub mod models;
pub mod preload;
pub mod process;
pub mod programs;
pub mod proxy;
pub mod report;
pub mod server;
pub mod simulation;
pub mod training;
pub mod weights;

pub use cluster::{Cluster, Device};
pub use failure::{Failure, Result};
pub use fixture::{Fixture, TinyRecipe};
pub use process::Process;
pub use programs::Programs;
pub use proxy::Proxy;
pub use server::Server;
