//! The two lines that lead to a worker: its own to the coordinator, and that of the rank before it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::schedule::Break;
use crate::cluster::free_port;
use crate::failure::Result;
use crate::proxy::{Mode, Proxy};

/// By how much a slow line delays each chunk.
const SLOW: Duration = Duration::from_millis(300);

/// Proxies before the coordinator and before a worker's data plane.
pub(super) struct Lines {
    pub control: Proxy,
    pub data: Proxy,
    /// Where the worker listens for the other ranks, behind the proxy.
    listens: SocketAddr,
}

impl Lines {
    /// The lines of a worker that is not there yet, to a coordinator at `http://HOST:PORT`.
    pub fn start(coordinator: &str) -> Result<Self> {
        let listens = (Ipv4Addr::LOCALHOST, free_port()?).into();
        Ok(Self {
            control: Proxy::start(coordinator.trim_start_matches("http://").parse()?)?,
            data: Proxy::start(listens)?,
            listens,
        })
    }

    /// Where the worker finds the coordinator.
    pub fn coordinator(&self) -> String {
        format!("http://{}", self.control.address())
    }

    /// What the worker is told of its data plane.
    pub fn arguments(&self) -> [String; 4] {
        let (listens, advertised) = (self.listens, self.data.address());
        [
            "--listen".to_owned(),
            listens.to_string(),
            "--advertise".to_owned(),
            advertised.to_string(),
        ]
    }
}

impl From<Break> for Mode {
    fn from(how: Break) -> Self {
        match how {
            Break::Cut => Mode::Cut,
            Break::Reset => Mode::Reset,
            Break::Silent => Mode::Silent,
            Break::HalfOpen => Mode::HalfOpen,
            Break::Slow => Mode::Delay(SLOW),
        }
    }
}
