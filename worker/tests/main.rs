//! Integration tests of the worker, in one executable.

mod checkpoint;
mod cli;
mod fixture;
mod forms;
mod golden;
mod import;
mod train;
