//! How a server is set up.

use std::{net::SocketAddr, time::Duration};

use supra_proto::Token;

use super::request::Limits;

/// How a server is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Name of the model; its directory's, if none.
    pub name: Option<String>,
    /// What clients have to know.
    pub key: Option<Token>,
    /// Sequences that are computed at once.
    pub slots: usize,
    /// Whether what one prompt has read another one that begins alike need not read again.
    pub share_prefixes: bool,
    /// Requests that wait beside as many as there are slots.
    pub queue: usize,
    /// What a request may ask for.
    pub limits: Limits,
    /// Bytes of a request.
    pub max_body: usize,
    /// Open connections.
    pub connections: usize,
    /// From the arrival of a request to the end of its answer.
    pub request_timeout: Duration,
    /// How long a client may neither send nor read.
    pub stall_timeout: Duration,
    /// How long answers under way have when the server is told to stop.
    pub grace: Duration,
    /// Whether newer checkpoints take the place of the one that is served.
    pub follow: bool,
}
