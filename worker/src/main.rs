//! `supra-worker`: joins a coordinator and trains, converts models, and uses them.

#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
