//! The gRPC shell around the machine: sockets in, decisions from [`crate::machine`], facts to [`crate::journal`].
//!
//! One task, the *owner*, has the machine; everything else asks it over a channel. Worker streams have bounded queues in
//! both directions: a worker that does not read is lost, and never holds up the others.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use supra_proto::v1::runs_server::RunsServer;
use supra_proto::v1::workers_server::WorkersServer;
use supra_proto::{BUILD, KEEP_ALIVE_INTERVAL, KEEP_ALIVE_TIMEOUT, Token, TokenCheck, v1};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::address;
use crate::journal::{JournalError, StateLock};
use crate::machine::{Identity, Limits};

mod accounts;
mod adoptions;
mod audits;
mod capsules;
mod handle;
mod owner;
mod receipt;
mod runs;
mod speed;
mod streams;
mod verifier;
mod workers;

use handle::Handle;
use owner::Owner;
pub use owner::{Ending, OwnerError};

/// How long streams get to carry their last messages.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How a coordinator is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to listen, `HOST:PORT`; port 0 takes a free one.
    pub listen: String,
    /// State directory: journal, telemetry, address file, default place of checkpoints.
    pub state: PathBuf,
    /// Secret that every call has to bring.
    pub token: Option<Token>,
    /// Listen beyond loopback without encryption.
    pub insecure_plaintext: bool,
    /// Serve gRPC reflection.
    pub reflection: bool,
    /// Times and counts.
    pub limits: Limits,
    /// Build that workers must have.
    pub build: String,
}

impl Options {
    /// A coordinator on a free loopback port, with defaults otherwise.
    pub fn local(state: &Path) -> Options {
        Options {
            listen: "127.0.0.1:0".into(),
            state: state.to_owned(),
            token: None,
            insecure_plaintext: false,
            reflection: false,
            limits: Limits::default(),
            build: BUILD.into(),
        }
    }
}

/// A coordinator that cannot start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// No such address.
    #[error("cannot listen on {listen}: {cause}\n  write HOST:PORT, for example 127.0.0.1:7070")]
    Address {
        /// What was asked for.
        listen: String,
        /// What is wrong with it.
        cause: String,
    },
    /// An address that others reach, without the safeguards.
    #[error(
        "{0} can be reached from other machines, and the connection is not encrypted\n  listen on 127.0.0.1, or, on a \
         network that you trust, add --insecure-plaintext and --token-file FILE"
    )]
    Exposed(SocketAddr),
    /// The port is taken.
    #[error(
        "port {} of {} is in use, perhaps by another coordinator\n  stop what uses it, or choose another port: \
         --listen {}:PORT (0 takes a free one)",
        _0.port(), _0.ip(), _0.ip()
    )]
    InUse(SocketAddr),
    /// The system does not let us listen.
    #[error("cannot listen on {address}: {cause}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The state directory.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The metrics.
    #[error("{}: {cause}", path.display())]
    Telemetry {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        cause: rusqlite::Error,
    },
    /// The address file.
    #[error("cannot write {}: {cause}", path.display())]
    AddressFile {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It ran, and had to stop.
    #[error(transparent)]
    Owner(#[from] OwnerError),
}

impl ServiceError {
    /// The input is wrong, as opposed to something that failed.
    pub fn is_bad_input(&self) -> bool {
        matches!(
            self,
            ServiceError::Address { .. } | ServiceError::Exposed(_)
        )
    }
}

/// A coordinator at work.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    state: PathBuf,
    handle: Handle,
    owner: JoinHandle<Result<Ending, OwnerError>>,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    _lock: StateLock,
}

impl Service {
    /// Takes the state directory, replays the journal, binds the port and serves.
    ///
    /// # Errors
    /// Each of these can fail; nothing is left behind then.
    pub async fn start(options: Options) -> Result<Service, ServiceError> {
        let listen = resolve(&options).await?;
        let lock = StateLock::take(&options.state)?;
        let state = options
            .state
            .canonicalize()
            .unwrap_or_else(|_| options.state.clone());
        let listener = bind(listen).await?;
        let address = listener.local_addr().map_err(|cause| ServiceError::Bind {
            address: listen,
            cause,
        })?;
        let identity = Identity {
            build: options.build.clone(),
            plan_version: supra_recipes::plan::VERSION,
            plan_probe: supra_recipes::plan::probe().to_vec(),
        };
        let (handle, owner) = Owner::start(&state, options.limits.clone(), identity)?;
        address::write(&state, address).map_err(|cause| ServiceError::AddressFile {
            path: address::path(&state),
            cause,
        })?;
        let server = serve(listener, &options, &state, handle.clone()).await;
        Ok(Service {
            address,
            state,
            handle,
            owner,
            server,
            _lock: lock,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What asks for the end while somebody waits for it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.handle.clone())
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// The journal could not be written.
    pub async fn wait(self) -> Result<Ending, ServiceError> {
        let ending = self.owner.await.unwrap_or(Err(OwnerError::Broken));
        let mut server = self.server;
        if timeout(LAST_WORDS, &mut server).await.is_err() {
            server.abort();
        }
        if let Err(error) = address::remove(&self.state) {
            tracing::warn!("cannot remove the address file: {error}");
        }
        Ok(ending?)
    }
}

/// Asks a coordinator to end.
#[derive(Clone, Debug)]
pub struct Stopper(Handle);

impl Stopper {
    /// The run in hand is stopped with a checkpoint and workers are told; [`Service::wait`] returns when that is done.
    pub async fn shut_down(&self, reason: &str) {
        self.0.shut_down(reason.to_owned()).await;
    }
}

/// The address to listen on, if it is one that may be listened on.
async fn resolve(options: &Options) -> Result<SocketAddr, ServiceError> {
    let bad = |cause: String| ServiceError::Address {
        listen: options.listen.clone(),
        cause,
    };
    let mut found = tokio::net::lookup_host(&options.listen)
        .await
        .map_err(|error| bad(error.to_string()))?;
    let address = found
        .next()
        .ok_or_else(|| bad("there is no such host".into()))?;
    let guarded = options.insecure_plaintext && options.token.is_some();
    if !address.ip().is_loopback() && !guarded {
        return Err(ServiceError::Exposed(address));
    }
    Ok(address)
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ServiceError> {
    TcpListener::bind(address)
        .await
        .map_err(|cause| match cause.kind() {
            std::io::ErrorKind::AddrInUse => ServiceError::InUse(address),
            _ => ServiceError::Bind { address, cause },
        })
}

async fn serve(
    listener: TcpListener,
    options: &Options,
    state: &Path,
    handle: Handle,
) -> JoinHandle<Result<(), tonic::transport::Error>> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<RunsServer<runs::RunsService>>().await;
    health
        .set_serving::<WorkersServer<workers::WorkersService>>()
        .await;
    let reflection = options.reflection.then(|| {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
            .build_v1()
            .inspect_err(|error| tracing::warn!("no reflection: {error}"))
            .ok()
    });
    let ended = handle.clone();
    let router = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
        .layer(InterceptorLayer::new(TokenCheck(options.token.clone())))
        .add_service(health_service)
        .add_optional_service(reflection.flatten())
        .add_service(WorkersServer::new(workers::WorkersService::new(
            handle.clone(),
        )))
        .add_service(RunsServer::new(runs::RunsService::new(handle, state)));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    tokio::spawn(router.serve_with_incoming_shutdown(incoming, async move { ended.ended().await }))
}
