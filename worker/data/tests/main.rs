//! What the data crate promises, shown on parquet written here.

mod index;
mod inspect;
mod loader;
mod reader;
mod support;
mod tokenize;
mod tokenizer;
