//! The `supra` command line; see [`supra_coordinator::cli`].

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    supra_coordinator::cli::main()
}
