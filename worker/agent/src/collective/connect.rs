//! How the ranks of a generation find each other.
//!
//! Every rank calls the next and answers the one before at the same time. Peers start at different
//! moments, so both are tried again until the plan's patience ends.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::apart::apart;
use super::handshake::{self, Edge};
use super::{AbortHandle, CollectiveError};

/// Longest wait that cannot see an abort.
const SLICE: Duration = Duration::from_millis(50);

/// Time for one TCP connection. Lost packets are sent again after a second.
const CONNECT: Duration = Duration::from_secs(1);

/// Time for a stranger to complete the handshake, while the true neighbour waits in the queue.
const HANDSHAKE: Duration = Duration::from_secs(2);

/// What a rank has to know to join the ring.
#[derive(Clone, Debug)]
pub struct RingPlan {
    /// Number of the generation.
    pub generation: u64,
    /// This rank.
    pub rank: u32,
    /// Number of ranks, at least 2.
    pub world: u32,
    /// Data-plane address of the next rank, `host:port`.
    pub next_address: String,
    /// Key that only the ranks of this generation have.
    pub key: [u8; 32],
    /// How long to look for the neighbours.
    pub patience: Duration,
}

impl RingPlan {
    /// The rank that this one sends to.
    pub fn next(&self) -> u32 {
        (self.rank + 1) % self.world
    }

    /// The rank that this one receives from.
    pub fn previous(&self) -> u32 {
        (self.rank + self.world - 1) % self.world
    }

    /// The plan of a second ring of the same ranks, in the order of [`apart`]. `addresses` is where each rank is reached, by
    /// rank.
    pub(crate) fn apart(&self, addresses: &[String]) -> RingPlan {
        let order = apart(addresses);
        let place = order.iter().position(|rank| *rank == self.rank);
        let place = place.expect("invariant: every rank has a place");
        let next = order[(place + 1) % order.len()];
        RingPlan {
            rank: place as u32,
            next_address: addresses[next as usize].clone(),
            // Nobody takes a connection of one ring for one of the other.
            key: blake3::derive_key("supra second ring", &self.key),
            ..self.clone()
        }
    }

    fn edge(&self, from: u32, to: u32) -> Edge {
        Edge {
            generation: self.generation,
            world: self.world,
            from,
            to,
        }
    }
}

/// Both connections of a rank.
pub(super) struct Neighbours {
    pub next: Arc<TcpStream>,
    pub previous: Arc<TcpStream>,
    pub previous_address: String,
}

/// Connects to both neighbours.
pub(super) fn neighbours(
    listener: &TcpListener,
    plan: &RingPlan,
    abort: &AbortHandle,
) -> Result<Neighbours, CollectiveError> {
    let search = Search {
        plan,
        abort,
        start: Instant::now(),
    };
    let (next, previous) = std::thread::scope(|scope| {
        let answering = scope.spawn(|| search.answer_previous(listener));
        (search.call_next(), answering.join())
    });
    let previous = previous.unwrap_or_else(|payload| std::panic::resume_unwind(payload));
    // When both are missing, the one with an address says more.
    let next = next?;
    let (previous, address) = previous?;
    Ok(Neighbours {
        next,
        previous,
        previous_address: address.to_string(),
    })
}

/// The search for both neighbours, shared by its two threads. Both end at the same time: when the
/// patience is over, or by an abort.
struct Search<'a> {
    plan: &'a RingPlan,
    abort: &'a AbortHandle,
    start: Instant,
}

impl Search<'_> {
    /// What is left of the patience; none when it is over.
    fn left(&self) -> Option<Duration> {
        self.plan
            .patience
            .checked_sub(self.start.elapsed())
            .filter(|left| !left.is_zero())
    }

    fn call_next(&self) -> Result<Arc<TcpStream>, CollectiveError> {
        let mut pause = SLICE;
        loop {
            self.abort.check()?;
            let error = match self.call_once() {
                Ok(stream) => return Ok(stream),
                Err(error) => error,
            };
            self.abort.check()?;
            if self.left().is_none() {
                return Err(self.next_missing(&error));
            }
            self.abort.sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    fn call_once(&self) -> io::Result<Arc<TcpStream>> {
        let edge = self.plan.edge(self.plan.rank, self.plan.next());
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
        for address in self.plan.next_address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    // The listener answers when its own generation forms, which may take a while.
                    let limit = self.left().unwrap_or(SLICE);
                    return self.shake(stream, limit, |stream| {
                        handshake::call(stream, &self.plan.key, edge)
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn answer_previous(
        &self,
        listener: &TcpListener,
    ) -> Result<(Arc<TcpStream>, SocketAddr), CollectiveError> {
        let mut last = None;
        loop {
            self.abort.check()?;
            if self.left().is_none() {
                return Err(self.previous_missing(listener, last.as_ref()));
            }
            match self.answer_once(listener) {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!("refused a data connection: {error}");
                    last = Some(error);
                }
            }
        }
    }

    /// None when nobody came within [`SLICE`].
    fn answer_once(
        &self,
        listener: &TcpListener,
    ) -> io::Result<Option<(Arc<TcpStream>, SocketAddr)>> {
        let edge = self.plan.edge(self.plan.previous(), self.plan.rank);
        listener.set_nonblocking(true)?;
        let mut waiting = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        poll(&mut waiting, PollTimeout::from(SLICE.as_millis() as u8))?;
        let (stream, address) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => {
                // Out of descriptors, most likely: the connection stays in the queue.
                self.abort.sleep(SLICE);
                return Err(error);
            }
        };
        stream.set_nonblocking(false)?;
        let stream = self.shake(stream, HANDSHAKE, |stream| {
            handshake::answer(stream, &self.plan.key, edge)
        })?;
        Ok(Some((stream, address)))
    }

    /// Runs a handshake under a time limit and where an abort reaches it.
    fn shake(
        &self,
        stream: TcpStream,
        limit: Duration,
        handshake: impl FnOnce(&mut &TcpStream) -> io::Result<()>,
    ) -> io::Result<Arc<TcpStream>> {
        let stream = Arc::new(stream);
        self.abort.register(&stream);
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        handshake(&mut &*stream)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(stream)
    }

    fn next_missing(&self, error: &io::Error) -> CollectiveError {
        let (rank, address) = (self.plan.next(), self.plan.next_address.clone());
        match error.kind() {
            io::ErrorKind::PermissionDenied => CollectiveError::Handshake {
                rank,
                address,
                cause: error.to_string(),
            },
            _ => CollectiveError::Timeout {
                rank,
                address,
                seconds: self.plan.patience.as_secs_f64(),
                cause: format!(
                    "{error}. That worker advertised this address: start it with --advertise and one that reaches it from here"
                ),
            },
        }
    }

    fn previous_missing(
        &self,
        listener: &TcpListener,
        last: Option<&io::Error>,
    ) -> CollectiveError {
        let here = listener
            .local_addr()
            .map_or_else(|_| "here".to_owned(), |address| address.to_string());
        let refused = last
            .map(|error| format!(" (last refused connection: {error})"))
            .unwrap_or_default();
        CollectiveError::Timeout {
            rank: self.plan.previous(),
            address: "an address of its own choice".to_owned(),
            seconds: self.plan.patience.as_secs_f64(),
            cause: format!(
                "it did not connect to this worker, which listens on {here}{refused}. Start this worker with --advertise and an address that reaches it from there"
            ),
        }
    }
}
