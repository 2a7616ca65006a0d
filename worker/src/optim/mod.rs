//! The optimizer: flat buffers, AdamW and clipping.
//!
//! All parameters lie in one flat buffer, those with weight decay first, so that the optimizer is a
//! handful of vector operations, the gradient is one all-reduce, and a shard is a range.

pub mod adamw;
pub mod clip;
pub mod layout;
pub mod replica;

pub use adamw::AdamW;
pub use layout::{Layout, Slot};
pub use replica::{Kinds, Replica};

/// Elements that one of libtorch's vector operations on flat buffers touches: small enough for its temporaries to stay in
/// cache on the processor and small beside the model on a GPU. Elementwise work does not depend on it.
pub(crate) const CHUNK: i64 = 1 << 20;

/// The ranges of at most [`CHUNK`] elements that cover `0..elements`, as (start, length).
pub(crate) fn chunks(elements: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..elements)
        .step_by(CHUNK as usize)
        .map(move |start| (start, CHUNK.min(elements - start)))
}
