//! From text to batches: tokenize parquet, index it, read windows of the packed token stream, feed a rank.
//!
//! The way of a token: text parquet -> [`tokenize`](fn@tokenize) -> token parquet -> [`index`](fn@index) -> [`Manifest`]
//! -> [`Reader`] (windows of the packed stream) -> [`Loader`] (samples in the plan's order) -> [`Prefetch`] (batches of
//! one rank). [`pack`](fn@pack) writes the stream flat, for top speed; [`inspect`](fn@inspect) shows it as text.
//!
//! The *packed stream* is all selected documents, one after the other, in the manifest's order of files, row groups and
//! rows, each with the BOS and EOT that the manifest says are added. Window `w` of length `L` is the `L + 1` tokens from
//! `w * L` on, so that neighbours share one token and every token but the first is a target exactly once.
// Denied rather than forbidden: one file, the memory map of packed stores, allows it.
#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!(
    "token files and checksums are little-endian, and are read and taken as they lie in memory"
);

mod compact;
mod directories;
mod error;
mod files;
mod groups;
mod guard;
mod headers;
mod index;
mod inspect;
mod loader;
mod manifest;
mod mapping;
mod pack;
mod packed;
mod pages;
mod parallel;
mod progress;
mod reader;
mod rows;
mod scan;
mod select;
mod stream;
mod survey;
mod tokenize;
mod tokenizer;
mod writer;

pub use error::DataError;
pub use index::{Auto3, IndexOptions, index};
pub use inspect::{At, InspectOptions, Inspected, Passage, inspect, passages};
pub use loader::{Batch, Loader, Prefetch, Sample, batch};
pub use manifest::{Documents, Manifest, Source};
pub use pack::{PackOptions, pack};
pub use progress::Progress;
pub use reader::Reader;
pub use tokenize::{TokenizeOptions, Tokenized, tokenize};
pub use tokenizer::TextTokenizer;
