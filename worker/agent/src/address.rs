//! Where the other ranks reach this worker.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::sync::Arc;

use supra_proto::ClientError;

use crate::error::AgentError;

/// The listening socket of the data plane, bound once per process, and the address that goes into
/// Hello.
pub(crate) struct DataAddress {
    listener: Arc<TcpListener>,
    advertised: SocketAddr,
}

impl DataAddress {
    /// Listens on `advertise`, or on the local address of the route to the coordinator, on any port.
    pub fn bind(coordinator: &str, advertise: Option<IpAddr>) -> Result<DataAddress, AgentError> {
        let ip = match advertise {
            Some(ip) => ip,
            None => route_to(coordinator)?,
        };
        let listener = listen(ip)?;
        let port = listener
            .local_addr()
            .map_err(|cause| failed(ip, cause))?
            .port();
        Ok(DataAddress {
            listener: Arc::new(listener),
            advertised: SocketAddr::new(ip, port),
        })
    }

    /// The socket.
    pub fn listener(&self) -> Arc<TcpListener> {
        Arc::clone(&self.listener)
    }

    /// Address for the other ranks.
    pub fn advertised(&self) -> SocketAddr {
        self.advertised
    }
}

/// Listens on `ip` only. Where it is not an address of this machine (it stands behind a translating
/// router), listens on all.
fn listen(ip: IpAddr) -> Result<TcpListener, AgentError> {
    let error = match TcpListener::bind((ip, 0)) {
        Ok(listener) => return Ok(listener),
        Err(error) => error,
    };
    if error.kind() != std::io::ErrorKind::AddrNotAvailable {
        return Err(failed(ip, error));
    }
    tracing::warn!(
        "the advertised address {ip} is not one of this machine: listening on all of its addresses"
    );
    let any = match ip {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    TcpListener::bind((any, 0)).map_err(|cause| failed(any, cause))
}

fn failed(ip: IpAddr, cause: std::io::Error) -> AgentError {
    AgentError::Data {
        address: ip.to_string(),
        cause,
        remedy: "give an address of this machine that the other workers reach: --advertise ADDRESS",
    }
}

/// The local address that the system would use to talk to the coordinator. Sends nothing.
fn route_to(coordinator: &str) -> Result<IpAddr, AgentError> {
    let unresolved = |cause: String| {
        AgentError::Client(ClientError::Unreachable {
            url: coordinator.to_owned(),
            cause,
            remedy: "check the host name; without a route to it, give --advertise ADDRESS",
        })
    };
    let (host, port) = host_and_port(coordinator).ok_or_else(|| {
        AgentError::Client(ClientError::BadUrl {
            url: coordinator.to_owned(),
            cause: "it is not http://HOST:PORT".to_owned(),
            remedy: "write http://HOST:PORT, for example http://127.0.0.1:7070",
        })
    })?;
    let targets = (host, port)
        .to_socket_addrs()
        .map_err(|error| unresolved(error.to_string()))?;
    let mut last = "the name has no address".to_owned();
    for target in targets {
        match local_address(target) {
            Ok(ip) => return Ok(ip),
            Err(error) => last = error.to_string(),
        }
    }
    Err(unresolved(last))
}

fn local_address(target: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    // Connecting a datagram socket only looks up the route.
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

/// Host and port of `http://host:port/…`; brackets of an IPv6 address are taken off.
fn host_and_port(url: &str) -> Option<(&str, u16)> {
    let (_scheme, rest) = url.split_once("://")?;
    let authority = rest.split('/').next()?;
    let (host, port) = authority.rsplit_once(':')?;
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    if host.is_empty() {
        None
    } else {
        Some((host, port.parse().ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_to_loopback_is_loopback() {
        let data = DataAddress::bind("http://127.0.0.1:7070", None).unwrap();
        assert!(data.advertised().ip().is_loopback());
        assert_eq!(data.advertised(), data.listener().local_addr().unwrap());
    }

    #[test]
    fn a_foreign_address_is_advertised_all_the_same() {
        // TEST-NET-1 belongs to no machine.
        let foreign: IpAddr = "192.0.2.1".parse().unwrap();
        let data = DataAddress::bind("http://127.0.0.1:7070", Some(foreign)).unwrap();
        assert_eq!(data.advertised().ip(), foreign);
        assert!(data.listener().local_addr().unwrap().ip().is_unspecified());
    }

    #[test]
    fn addresses_without_a_port_are_bad_input() {
        for url in ["head", "http://head", "http://:1", "http://head:port"] {
            let error = DataAddress::bind(url, None).err().unwrap();
            assert_eq!(error.exit_code(), 2, "{url}: {error}");
        }
    }

    #[test]
    fn brackets_are_not_part_of_a_host() {
        assert_eq!(host_and_port("http://[::1]:7070/x"), Some(("::1", 7070)));
    }
}
