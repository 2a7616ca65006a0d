//! Ctrl-C during work that ends well when it is asked to.

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use super::failure::Failure;

/// From now on the first Ctrl-C only asks the work to end, and the returned function tells whether it has; the second one ends
/// the process.
pub fn watch() -> Result<impl Fn() -> bool, Failure> {
    let failed = |error| Failure::failed(format!("cannot listen for Ctrl-C: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let asked = Arc::new(AtomicBool::new(false));
    let flag = asked.clone();
    // Registered before this returns, so that none is lost.
    let mut signals = {
        let _inside = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt()).map_err(failed)?
    };
    let listen = move || {
        runtime.block_on(async {
            while signals.recv().await.is_some() {
                if flag.swap(true, Ordering::Relaxed) {
                    process::exit(super::failure::INTERRUPTED.into());
                }
            }
        });
    };
    thread::Builder::new()
        .name("interrupt".to_owned())
        .spawn(listen)
        .map_err(failed)?;
    Ok(move || asked.load(Ordering::Relaxed))
}
