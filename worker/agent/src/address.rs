//! Where the other ranks reach this worker.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs, UdpSocket};
use std::sync::Arc;

use supra_proto::ClientError;

use crate::advertise::Advertise;
use crate::error::AgentError;

/// The listening socket of the data plane, bound once per process, and the address that goes into
/// Hello.
pub(crate) struct DataAddress {
    listener: Arc<TcpListener>,
    advertised: String,
}

impl DataAddress {
    /// Listens on `listen`; else on what `advertise` names, or on the local address of the route to the coordinator,
    /// at the advertised port or at any.
    pub fn bind(
        coordinator: &str,
        listen: Option<SocketAddr>,
        advertise: Option<&Advertise>,
    ) -> Result<DataAddress, AgentError> {
        let advertise = match (advertise, listen) {
            (Some(advertise), _) => advertise.clone(),
            (None, Some(listen)) if !listen.ip().is_unspecified() => listen.ip().into(),
            (None, _) => route_to(coordinator)?.into(),
        };
        let listener = match listen {
            Some(listen) => TcpListener::bind(listen).map_err(|cause| AgentError::Data {
                address: listen.to_string(),
                cause,
                remedy: "give an address of this machine, and a port of it that is free: --listen IP:PORT",
            })?,
            None => listen_as(&advertise)?,
        };
        let port = listener
            .local_addr()
            .map_err(|cause| failed(&advertise, cause))?
            .port();
        Ok(DataAddress {
            listener: Arc::new(listener),
            advertised: advertise.with_port(port),
        })
    }

    /// The socket.
    pub fn listener(&self) -> Arc<TcpListener> {
        Arc::clone(&self.listener)
    }

    /// Address for the other ranks, `host:port`.
    pub fn advertised(&self) -> &str {
        &self.advertised
    }
}

/// Listens on the advertised address only. Where it is not one of this machine (it stands behind a translating router),
/// listens on all, at the same port; so it does for a name: to the others it may mean another address than here.
fn listen_as(advertise: &Advertise) -> Result<TcpListener, AgentError> {
    let port = advertise.port.unwrap_or(0);
    if let Ok(ip) = advertise.host.parse::<IpAddr>() {
        match TcpListener::bind((ip, port)) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() != ErrorKind::AddrNotAvailable => {
                return Err(failed(advertise, error));
            }
            Err(_) => tracing::warn!(
                "the advertised address {advertise} is not one of this machine: listening on all of its addresses"
            ),
        }
    }
    let all: [SocketAddr; 2] = [
        (Ipv6Addr::UNSPECIFIED, port).into(),
        (Ipv4Addr::UNSPECIFIED, port).into(),
    ];
    // The first takes IPv4, too, where there is IPv6 at all.
    TcpListener::bind(&all[..]).map_err(|cause| failed(advertise, cause))
}

fn failed(advertise: &Advertise, cause: std::io::Error) -> AgentError {
    AgentError::Data {
        address: advertise.to_string(),
        cause,
        remedy: "give an address of this machine that the other workers reach: --advertise HOST; \
                 where they reach it at another port than its own, --listen IP:PORT, too",
    }
}

/// The local address that the system would use to talk to the coordinator. Sends nothing.
fn route_to(coordinator: &str) -> Result<IpAddr, AgentError> {
    let unresolved = |cause: String| {
        AgentError::Client(ClientError::Unreachable {
            url: coordinator.to_owned(),
            cause,
            remedy: "check the host name; without a route to it, give --advertise HOST",
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

    const HEAD: &str = "http://127.0.0.1:7070";

    #[test]
    fn the_route_to_loopback_is_loopback() {
        let data = DataAddress::bind(HEAD, None, None).unwrap();
        let listens = data.listener().local_addr().unwrap();
        assert!(listens.ip().is_loopback());
        assert_eq!(data.advertised(), listens.to_string());
    }

    #[test]
    fn a_foreign_address_is_advertised_all_the_same() {
        // TEST-NET-1 belongs to no machine, and .invalid is no name.
        for foreign in ["192.0.2.1", "worker.invalid"] {
            let advertise = foreign.parse().unwrap();
            let data = DataAddress::bind(HEAD, None, Some(&advertise)).unwrap();
            let listens = data.listener().local_addr().unwrap();
            assert!(listens.ip().is_unspecified());
            assert_eq!(data.advertised(), format!("{foreign}:{}", listens.port()));
        }
    }

    #[test]
    fn a_mapped_port_is_advertised_while_the_worker_listens_on_its_own() {
        let free = DataAddress::bind(HEAD, None, None).unwrap();
        let listen = free.listener().local_addr().unwrap();
        drop(free);
        let advertise = "192.0.2.1:7100".parse().unwrap();
        let data = DataAddress::bind(HEAD, Some(listen), Some(&advertise)).unwrap();
        assert_eq!(data.advertised(), "192.0.2.1:7100");
        assert_eq!(data.listener().local_addr().unwrap(), listen);

        let taken = DataAddress::bind(HEAD, Some(listen), None).err().unwrap();
        assert_eq!(taken.exit_code(), 2);
        for part in [listen.to_string(), "--listen".to_owned()] {
            assert!(taken.to_string().contains(&part), "{taken}");
        }
    }

    #[test]
    fn a_port_that_is_advertised_alone_is_the_one_to_listen_on() {
        let free = DataAddress::bind(HEAD, None, None).unwrap();
        let listen = free.listener().local_addr().unwrap();
        drop(free);
        let advertise = listen.to_string().parse().unwrap();
        let data = DataAddress::bind(HEAD, None, Some(&advertise)).unwrap();
        assert_eq!(data.listener().local_addr().unwrap(), listen);
    }

    #[test]
    fn who_listens_on_all_addresses_advertises_that_of_the_route() {
        let listen = "0.0.0.0:0".parse().unwrap();
        let data = DataAddress::bind(HEAD, Some(listen), None).unwrap();
        let port = data.listener().local_addr().unwrap().port();
        assert_eq!(data.advertised(), format!("127.0.0.1:{port}"));
    }

    #[test]
    fn addresses_without_a_port_are_bad_input() {
        for url in ["head", "http://head", "http://:1", "http://head:port"] {
            let error = DataAddress::bind(url, None, None).err().unwrap();
            assert_eq!(error.exit_code(), 2, "{url}: {error}");
        }
    }

    #[test]
    fn brackets_are_not_part_of_a_host() {
        assert_eq!(host_and_port("http://[::1]:7070/x"), Some(("::1", 7070)));
    }
}
