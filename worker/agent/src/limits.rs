//! Limits of the process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Fewer open files than this are too few for shards, sockets and libraries together.
const ENOUGH: u64 = 256;

/// Raises the soft limit of open files to the hard one, and warns when that is too low.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok(hard)
    });
    match limit {
        Ok(limit) if limit >= ENOUGH => {}
        Ok(limit) => tracing::warn!(
            "only {limit} files may be open at once and a worker needs about {ENOUGH}: raise it with `ulimit -Hn` or LimitNOFILE="
        ),
        Err(error) => tracing::warn!("cannot raise the limit of open files: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_ends_at_the_hard_one() {
        raise_open_files();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard);
    }
}
