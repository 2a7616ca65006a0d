//! Ending with the program that started this one.

use std::{io, thread};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use super::failure::Failure;

/// Set to 1 by a program that holds a pipe to our standard input and wants this one to end when it does.
const PARENT_PIPE: &str = "SUPRA_PARENT_PIPE";

/// If the parent wants it: asks this process to stop, as SIGTERM does, when its standard input ends, for then the parent is gone,
/// however it went.
pub fn end_with_parent() -> Result<(), Failure> {
    if std::env::var_os(PARENT_PIPE).is_none_or(|value| value != "1") {
        return Ok(());
    }
    let watch = || {
        // An error of reading says the same as the end.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = signal::kill(Pid::this(), Signal::SIGTERM);
    };
    let started = thread::Builder::new()
        .name("parent".to_owned())
        .spawn(watch);
    started
        .map(drop)
        .map_err(|error| Failure::failed(format!("cannot watch the parent process: {error}")))
}
