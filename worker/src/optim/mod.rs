//! The optimizer: flat buffers, what ranks exchange of them, AdamW and clipping.
//!
//! All parameters lie in one flat buffer of buckets, so that the optimizer is a handful of vector operations per bucket,
//! gradients are reduced bucket by bucket while others are still being computed, and a rank's share is a part of each.

pub mod adamw;
pub mod clip;
pub mod exchange;
mod handover;
mod host_part;

pub mod layout;
mod numbers;
pub mod replica;
mod staging;

pub use adamw::AdamW;
pub use exchange::Exchange;
pub use host_part::{HostPart, HostRoom};
pub use layout::{Bucket, Layout, Part, Piece, Slot};
pub use numbers::{Numbers, Run};
pub use replica::{Kinds, Prints, Replica, Section};
pub use staging::{Staged, Staging};

/// Elements that one of libtorch's vector operations on flat buffers touches: small enough for its temporaries to stay in
/// cache on the processor and small beside the model on a GPU. Elementwise work does not depend on it.
pub(crate) const CHUNK: i64 = 1 << 20;

/// The ranges of at most [`CHUNK`] elements that cover `0..elements`, as (start, length).
pub(crate) fn chunks(elements: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..elements)
        .step_by(CHUNK as usize)
        .map(move |start| (start, CHUNK.min(elements - start)))
}
