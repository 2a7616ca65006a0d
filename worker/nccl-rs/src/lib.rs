//! Safe bindings to NCCL, NVIDIA's library for collective communication between GPUs.
//!
//! `libnccl.so.2` is loaded at run time ([`Library::load`]). Building needs no CUDA, no header and no
//! clang; a machine without NCCL gets a typed error instead of a program that does not start. In a
//! process that has NCCL already, as every one with libtorch's CUDA half does, that very copy is
//! taken: a second one breaks both.
//!
//! Communicators are non-blocking throughout. What NCCL does in the background is waited for with
//! a limit, so that a dead peer is an error and not a hang, and any thread may end everything with
//! an [`AbortHandle`].
//!
//! ```no_run
//! use std::time::Duration;
//! use nccl::{Comm, DataType, DeviceSliceMut, Library, Op, Stream};
//!
//! # fn share(id: [u8; 128]) -> [u8; 128] { id }
//! # fn sum(rank: u32, gradient: *mut std::ffi::c_void, elements: usize) -> Result<(), nccl::Error> {
//! let library = Library::load(None)?;
//! // Rank 0 makes the id; how its 128 bytes get to the other ranks is the program's own business.
//! let id = share(library.unique_id()?.to_bytes());
//! // The calling thread's current CUDA device becomes that of the communicator.
//! let starting = Comm::start(&library, &id.into(), rank, 2)?;
//! let abort = starting.abort_handle();
//! let mut comm = starting.wait(Duration::from_secs(30))?;
//!
//! // SAFETY: `gradient` points to `elements` floats on this rank's device, which live and are used
//! // by nothing else until the stream has done the work.
//! let mut gradient = unsafe { DeviceSliceMut::new(gradient, elements, DataType::F32) };
//! comm.all_reduce_in_place(&mut gradient, Op::Sum, Stream::DEFAULT)?;
//! // From any thread, when a peer is lost: `abort.abort()`. At the end:
//! comm.finalize()
//! # }
//! ```
//!
//! Operations return when they are enqueued on their [`Stream`]; the values are there when the
//! stream has got so far. One communicator per process and GPU is what this crate is made for: groups
//! over several communicators of one process are not offered.
//!
//! Source of all facts: `nccl.h` of NCCL 2.28 and the NCCL user guide. Everything used exists since
//! [`Version::OLDEST`].

mod comm;
mod error;
mod group;
mod library;
mod memory;
mod operation;
mod symbols;
mod unique_id;

pub use comm::{AbortHandle, Comm, Starting};
pub use error::{Error, LoadError, Status};
pub use group::Group;
pub use library::{Library, Version};
pub use memory::{DataType, DeviceSlice, DeviceSliceMut, Stream};
pub use operation::Op;
pub use unique_id::UniqueId;
