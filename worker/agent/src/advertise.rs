//! What a user says about how the other ranks reach a worker.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// Host and port that a worker advertises: `HOST`, `HOST:PORT`, `[IPV6]:PORT` or `IPV6`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertise {
    /// A name or an address, without brackets. The other ranks look a name up.
    pub host: String,
    /// The port at which they connect; that at which the worker listens when none is given.
    pub port: Option<u16>,
}

/// A text that names no host and port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAdvertise {
    /// Nothing stands where the host should.
    #[error("it names no host; write HOST or HOST:PORT, for example 10.0.0.7 or 10.0.0.7:7100")]
    NoHost,
    /// What stands behind the colon.
    #[error("{0:?} is no port; write a number from 1 to 65535 behind the colon, or HOST alone")]
    NoPort(String),
    /// A scheme, a path, a space.
    #[error("{0:?} is no host; write a name or an address, without http:// and without a path")]
    NoName(String),
}

impl Advertise {
    /// The address as peers are told it.
    pub fn with_port(&self, port: u16) -> String {
        join(&self.host, self.port.unwrap_or(port))
    }
}

impl From<IpAddr> for Advertise {
    fn from(ip: IpAddr) -> Self {
        Advertise {
            host: ip.to_string(),
            port: None,
        }
    }
}

impl FromStr for Advertise {
    type Err = BadAdvertise;

    fn from_str(text: &str) -> Result<Self, BadAdvertise> {
        // An IPv6 address without brackets has no port, or nobody could tell which colon is which.
        if text.parse::<Ipv6Addr>().is_ok() {
            return Ok(Advertise {
                host: text.to_owned(),
                port: None,
            });
        }
        if text.contains('/') || text.contains(char::is_whitespace) {
            return Err(BadAdvertise::NoName(text.to_owned()));
        }
        let (host, port) = match text.rsplit_once(':') {
            // The colon of `[::1]` stands inside the brackets.
            Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
            _ => (text, None),
        };
        let bare = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = match bare {
            Some(address) if address.parse::<Ipv6Addr>().is_ok() => address,
            None if host.is_empty() => return Err(BadAdvertise::NoHost),
            None if !host.contains([':', '[', ']']) => host,
            _ => return Err(BadAdvertise::NoName(host.to_owned())),
        };
        let port = port.map(|port| match port.parse() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(BadAdvertise::NoPort(port.to_owned())),
        });
        Ok(Advertise {
            host: host.to_owned(),
            port: port.transpose()?,
        })
    }
}

impl fmt::Display for Advertise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => f.write_str(&join(&self.host, port)),
            None => f.write_str(&self.host),
        }
    }
}

fn join(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_come_with_and_without_a_port() {
        for (text, host, port) in [
            ("10.0.0.7", "10.0.0.7", None),
            ("10.0.0.7:7100", "10.0.0.7", Some(7100)),
            ("node7", "node7", None),
            ("node7.cluster:7100", "node7.cluster", Some(7100)),
            ("fe80::7", "fe80::7", None),
            ("[fe80::7]", "fe80::7", None),
            ("[fe80::7]:7100", "fe80::7", Some(7100)),
        ] {
            let host = host.to_owned();
            assert_eq!(text.parse(), Ok(Advertise { host, port }), "{text}");
        }
    }

    #[test]
    fn peers_are_told_the_own_port_unless_another_is_advertised() {
        let told = |text: &str| text.parse::<Advertise>().unwrap().with_port(4000);
        assert_eq!(told("node7"), "node7:4000");
        assert_eq!(told("node7:7100"), "node7:7100");
        assert_eq!(told("fe80::7"), "[fe80::7]:4000");
    }

    #[test]
    fn what_names_no_host_or_no_port_is_refused_with_the_way_to_write_it() {
        for (text, part) in [
            ("", "names no host"),
            (":7100", "names no host"),
            ("node7:", "is no port"),
            ("node7:http", "is no port"),
            ("node7:0", "is no port"),
            ("node7:70000", "is no port"),
            ("http://node7:7100", "without http://"),
            ("node 7", "is no host"),
            ("a:b:7100", "is no host"),
            ("[node7]:7100", "is no host"),
        ] {
            let error = text.parse::<Advertise>().unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
    }
}
