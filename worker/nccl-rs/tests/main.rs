//! The crate with a real NCCL: what needs no GPU, and, where one is, real communicators.
//!
//! Ranks are processes: this executable runs itself again. Where all share one GPU, each calls itself
//! a host of its own (`NCCL_HOSTID`), or NCCL would refuse. Tests that find no NCCL or no GPU say
//! "skipped" and pass.

#![allow(clippy::unwrap_used)] // also in helpers, which clippy does not take for tests

#[path = "../examples/all_reduce/cuda.rs"]
mod cuda;
mod gpu;
mod ranks;

use nccl::{Comm, Error, Library, UniqueId, Version};

/// NCCL, or none with a word about it.
fn library() -> Option<Library> {
    Library::load(None)
        .inspect_err(|error| println!("skipped: {error}"))
        .ok()
}

#[test]
fn an_id_survives_its_way_to_another_rank() {
    let Some(library) = library() else { return };
    let id = library.unique_id().unwrap();
    assert_eq!(UniqueId::from(id.to_bytes()), id);
    assert_ne!(library.unique_id().unwrap(), id);
    assert!(library.version() >= Version::OLDEST);
}

#[test]
fn a_rank_outside_the_world_is_refused() {
    let Some(library) = library() else { return };
    let id = library.unique_id().unwrap();
    for (rank, world) in [(2, 2), (0, 0), (u32::MAX, 2), (1, u32::MAX)] {
        let error = Comm::start(&library, &id, rank, world).unwrap_err();
        assert!(matches!(error, Error::NoSuchRank { .. }), "{error}");
    }
}

#[test]
fn without_a_gpu_the_start_fails_in_nccls_words() {
    let Some(library) = library() else { return };
    if cuda::Cuda::open(0).is_ok() {
        println!("skipped: there is a GPU");
        return;
    }
    let id = library.unique_id().unwrap();
    let limit = std::time::Duration::from_secs(30);
    let error = Comm::start(&library, &id, 0, 1)
        .and_then(|starting| starting.wait(limit))
        .unwrap_err();
    let Error::Nccl { message, .. } = &error else {
        panic!("{error}");
    };
    assert!(!message.is_empty());
    assert!(
        error.to_string().starts_with("ncclCommInitRankConfig: "),
        "{error}"
    );
}
