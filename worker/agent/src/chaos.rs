//! Faults of this very process, as the recipe's `chaos` orders them: real signals, as a machine that fails would look.

use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::getpid;

/// Ends this process by SIGKILL: no destructor runs, nobody is told.
pub(crate) fn kill() -> ! {
    loop {
        // A process may always signal itself; the loop is for the moment until it arrives.
        send(getpid(), Signal::SIGKILL).ok();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Stands still, with all threads, for so long. Who stands still cannot wake itself, so a shell does it, in the same process
/// group: it does not outlive this process.
///
/// # Errors
/// The shell cannot be started, and nothing stands still.
pub(crate) fn stop(lasts: Duration) -> io::Result<()> {
    let mut waker = Command::new("/bin/sh")
        .args(["-c", "sleep \"$1\"; kill -CONT \"$2\"", "sh"])
        .arg(format!("{:.3}", lasts.as_secs_f64()))
        .arg(getpid().to_string())
        .stdin(Stdio::null())
        .spawn()?;
    std::thread::Builder::new()
        .name("waker".to_owned())
        .spawn(move || waker.wait())?;
    send(getpid(), Signal::SIGSTOP).map_err(io::Error::from)
}
