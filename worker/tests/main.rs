//! Integration tests of the worker, in one executable.

// Clippy allows this in test functions, but not in their helpers.
#![allow(clippy::unwrap_used)]

mod broken;
mod checkpoint;
mod cli;
mod eval;
mod evaluation;
mod export;
mod fixture;
mod foreign;
mod forms;
mod generate;
mod golden;
mod gpu;
mod import;
mod kept;
mod network;
mod padding;
mod replay;
mod sequences;
mod snapshots;
mod speed;
mod step;
mod train;
mod witness;
