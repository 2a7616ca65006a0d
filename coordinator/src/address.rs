//! The address file: where the coordinator of a state directory listens.
//!
//! `STATE/address` holds one URL, `http://HOST:PORT`. It is written after the port is bound and
//! removed on a clean exit, so that `supra` and scripts find a coordinator that chose its own port.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// The address file of a state directory.
pub fn path(state: &Path) -> PathBuf {
    state.join("address")
}

/// URL under which this machine reaches a coordinator bound to `bound`.
pub fn url(bound: SocketAddr) -> String {
    let host = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(host, bound.port()))
}

/// Writes the address file in one atomic rename.
///
/// # Errors
/// Whatever the file system says.
pub fn write(state: &Path, bound: SocketAddr) -> io::Result<()> {
    let partial = state.join(".address.partial");
    fs::write(&partial, format!("{}\n", url(bound)))?;
    fs::rename(partial, path(state))
}

/// URL of the coordinator that last announced itself in this state directory.
///
/// # Errors
/// When there is no such file: no coordinator runs here, or it has not bound its port yet.
pub fn read(state: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path(state))?.trim().to_owned())
}

/// Removes the address file; a missing one is fine.
///
/// # Errors
/// Whatever the file system says.
pub fn remove(state: &Path) -> io::Result<()> {
    match fs::remove_file(path(state)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_removed_twice() {
        let state = tempfile::tempdir().unwrap();
        write(state.path(), "0.0.0.0:7070".parse().unwrap()).unwrap();
        assert_eq!(read(state.path()).unwrap(), "http://127.0.0.1:7070");
        remove(state.path()).unwrap();
        remove(state.path()).unwrap();
        assert!(read(state.path()).is_err());
    }
}
