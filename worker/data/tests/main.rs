//! What the data crate promises, shown on parquet written here.
#![allow(clippy::unwrap_used)]

mod index;
mod inspect;
mod loader;
mod reader;
mod support;
mod tokenize;
mod tokenizer;
mod writers;
