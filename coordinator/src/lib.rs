//! The head node: decides who trains what, writes down what was trained, and answers people.
//!
//! [`machine`] decides and is pure; [`journal`] remembers; [`ledger`] is the hash-chained account of
//! trained samples and [`audit`] proves it; [`goodput`] is the account of time; [`interval`] says how
//! often a checkpoint is worth while, [`adopt`] reads a run out of one, [`chaos`] what a run does to its own workers;
//! [`forecast`] foretells its held-out loss, [`gates`] judges what became of its attention; [`capsule`] packs what is known of a run,
//! and [`diff`] says why two differ; [`service`] is the gRPC shell around them.

#![forbid(unsafe_code)]

pub mod address;
pub mod adopt;
pub mod audit;
pub mod capsule;
pub mod chaos;
pub mod cli;
pub mod diff;
pub mod forecast;
pub mod gates;
pub mod goodput;
pub mod interval;
pub mod journal;
pub mod ledger;
pub mod machine;
pub mod service;
pub mod telemetry;
