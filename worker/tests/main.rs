//! Integration tests of the worker, in one executable.

mod forms;
mod golden;
mod import;
