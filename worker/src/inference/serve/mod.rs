//! A server that speaks OpenAI's completions interface.
//!
//! Requests live on a tokio runtime, and one thread computes. Between them are bounded queues: orders one way, events the other. The
//! thread never waits for a client, and the runtime never touches libtorch. Decisions are in [`schedule`], which is free of both.
//!
//! ```text
//! connections -> http -> completions -- Job --> compute: client, schedule, engine
//!                             ^                    |
//!                             +------ Batch -------+
//! ```

mod answer;
mod choice;
mod client;
mod completions;
mod compute;
mod connections;
mod fault;
mod fields;
mod follow;
mod http;
mod logprobs;
mod metrics;
mod options;
mod prefixes;
mod request;
mod schedule;
mod served;
mod shared;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use supra_checkpoint::{StoredError, fetch::ModelDirectory};
use thiserror::Error;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::block_in_place,
    time::{Instant, sleep},
};

use self::{
    compute::{Command, Compute},
    served::{Served, last_name},
    shared::Shared,
};
use super::{
    engine::EngineError,
    load::{LoadError, LoadedModel},
};

pub use self::{follow::Source, options::Options, request::Limits};

/// Threads of the runtime: it only moves text.
const THREADS: usize = 2;
/// Prompts that are read by the tokenizer at once.
const TOKENIZING: usize = 4;
/// How often a server that ends looks whether its answers are complete.
const LOOK: Duration = Duration::from_millis(20);
/// How long clients have to hear that there will be no answer.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a server says of itself.
#[derive(Debug)]
pub enum News<'a> {
    /// Connections are taken; requests wait for the model.
    Listening(SocketAddr),
    /// Requests are answered.
    Ready {
        /// Name by which clients ask.
        id: &'a str,
        /// Which weights.
        location: &'a str,
        /// What is not as one may expect.
        remark: Option<&'a str>,
    },
}

/// Why a server does not run.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The address is taken, or none of this machine's.
    #[error("cannot listen on {address}: {source}. Choose another address with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Threads or signals.
    #[error("cannot start: {0}")]
    System(#[from] io::Error),
    /// The files of the model.
    #[error(transparent)]
    Stored(#[from] StoredError),
    /// The model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its memory.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It broke down while computing.
    #[error("the computation broke down, and the server with it: {0}")]
    Broken(String),
}

/// Serves a model until the process is told to stop, by SIGTERM or SIGINT; a second one cuts answers off. The calling thread is the
/// one that computes; the device is open.
///
/// # Errors
///
/// The address or the model cannot be used, or the computation breaks down.
pub fn serve(
    source: &Source,
    options: Options,
    mut tell: impl FnMut(News<'_>),
) -> Result<(), ServeError> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(TOKENIZING)
        .thread_name("serve")
        .enable_all()
        .build()?;
    let (commands, orders) = mpsc::sync_channel(options.slots + options.queue);
    let shared = Arc::new(Shared::new(options, commands));
    let address = listen(&runtime, &shared)?;
    tell(News::Listening(address));

    let files = ModelDirectory::open(&source.location)?;
    let model = LoadedModel::open(files.path(), source.device, source.kind)?;
    let location = files.location().to_owned();
    let id = shared
        .options
        .name
        .clone()
        .unwrap_or_else(|| last_name(&source.location));
    let served = Served::new(&model, &id, &location, 0)?;
    let remark = served
        .tokenizer
        .is_none()
        .then_some("it has no tokenizer.json, so prompts have to be token ids, and answers are");
    let mut compute = Compute::new(Arc::clone(&shared));
    compute.replace(model, served)?;
    tell(News::Ready {
        id: &id,
        location: &location,
        remark,
    });
    let followed = shared.options.follow.then(|| {
        let (over, watch) = mpsc::channel();
        let (source, shared) = (source.clone(), Arc::clone(&shared));
        let follow = move || follow::follow(&source, &id, location, &shared, &watch);
        let thread = thread::Builder::new()
            .name("follow".to_owned())
            .spawn(follow);
        thread.map(|thread| (over, thread))
    });
    let followed = followed.transpose()?;
    let ended = supra_recipes::panic::catch(|| compute.run(&orders));
    // Whoever still computes must not outlive libtorch.
    drop(orders);
    if let Some((over, thread)) = followed {
        drop(over);
        let _ = thread.join();
    }
    runtime.shutdown_timeout(LOOK);
    ended.map_err(ServeError::Broken)
}

/// Begins to take connections.
fn listen(runtime: &Runtime, shared: &Arc<Shared>) -> Result<SocketAddr, ServeError> {
    let wanted = shared.options.listen;
    let refused = |source| ServeError::Listen {
        address: wanted,
        source,
    };
    let listener = runtime
        .block_on(TcpListener::bind(wanted))
        .map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let _guard = runtime.enter();
    let signals = Signals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    };
    runtime.spawn(live(listener, Arc::clone(shared), signals));
    Ok(address)
}

/// What tells the process to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Takes connections until a signal comes, then lets answers end.
async fn live(listener: TcpListener, shared: Arc<Shared>, mut signals: Signals) {
    let (end, over) = watch::channel(false);
    let router = http::router(Arc::clone(&shared));
    let accepting = connections::accept(listener, router, Arc::clone(&shared), over);
    let accepting = tokio::spawn(accepting);
    signals.next().await;
    shared.drain();
    let grace = shared.options.grace;
    tracing::info!(under_way = shared.under_way(), ?grace, "ending");
    tokio::select! {
        () = answered(&shared, grace) => {}
        () = signals.next() => {}
    }
    // Whoever gets no whole answer is told so.
    block_in_place(|| shared.insist(Command::Abandon));
    answered(&shared, FAREWELL).await;
    let _ = end.send(true);
    let _ = accepting.await;
    block_in_place(|| shared.insist(Command::Stop));
}

/// Waits until nothing is under way, or for so long.
async fn answered(shared: &Shared, limit: Duration) {
    let deadline = Instant::now() + limit;
    while shared.under_way() > 0 && Instant::now() < deadline {
        sleep(LOOK).await;
    }
}
