//! The coordinator's package as processes: one executable for all tests.

mod cli_connect;
mod cli_help;
mod cli_recipes;
mod cli_up;
mod support;
