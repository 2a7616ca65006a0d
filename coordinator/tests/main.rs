//! The coordinator's package as processes: one executable for all tests.

mod cli_audit;
mod cli_capsule;
mod cli_connect;
mod cli_drain;
mod cli_help;
mod cli_recipes;
mod cli_replay;
mod cli_up;
mod server_process;
mod server_rig;
mod server_runs;
mod support;
