//! Waiting for a coordinator that we started: its address file, then its answer.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use supra_proto::Client;
use tokio::time::{sleep, timeout};

use crate::address;
use crate::cli::failure::Failure;

/// How long the coordinator may take to listen: it may have a long journal to read.
const LIMIT: Duration = Duration::from_secs(60);
/// Pause between two looks at the address file.
const POLL: Duration = Duration::from_millis(20);

/// Which address file is there: a coordinator puts a new file in place of an old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    inode: u64,
    modified: (i64, i64),
}

impl Announcement {
    /// That of a state directory, if there is one: before the start that of a coordinator which
    /// was killed.
    pub fn of(state: &Path) -> Option<Announcement> {
        let meta = fs::metadata(address::path(state)).ok()?;
        Some(Announcement {
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
        })
    }
}

/// Connects to the coordinator that announces itself in `state` after `before`.
///
/// # Errors
/// When none does in time, or when it does not answer.
pub async fn answering(state: &Path, before: Option<Announcement>) -> Result<Client, Failure> {
    let announced = async {
        loop {
            let now = Announcement::of(state);
            if now.is_some()
                && now != before
                && let Ok(url) = address::read(state)
            {
                return url;
            }
            sleep(POLL).await;
        }
    };
    let url = timeout(LIMIT, announced).await.map_err(|_| {
        Failure::failed(format!(
            "the coordinator has not begun to listen within {} s; {} says what it is doing.",
            LIMIT.as_secs(),
            state.join("logs/coordinator.log").display()
        ))
    })?;
    Ok(Client::connect(&url, None).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_address_of_a_dead_coordinator_is_not_taken() {
        let state = tempfile::tempdir().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        address::write(state.path(), "127.0.0.1:1".parse().unwrap()).unwrap();
        let before = Announcement::of(state.path());
        let waiting = answering(state.path(), before);
        tokio::pin!(waiting);
        assert!(
            timeout(Duration::from_millis(100), &mut waiting)
                .await
                .is_err(),
            "took the old one"
        );
        address::write(state.path(), listener.local_addr().unwrap()).unwrap();
        let client = waiting.await.unwrap();
        assert_eq!(
            client.url(),
            format!("http://{}", listener.local_addr().unwrap())
        );
    }
}
