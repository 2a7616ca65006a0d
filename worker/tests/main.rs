//! Integration tests of the worker, in one executable.

mod golden;
