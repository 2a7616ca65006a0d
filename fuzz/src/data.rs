//! Datasets: files of tokens as anybody may write them, and the manifests beside them.

use std::fs;
use std::path::Path;

use supra_data::{Auto3, IndexOptions, Progress, Reader, index};

use crate::scratch::scratch;

/// Has the tokenizer of the corpora: 32 words.
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures");
/// A file of tokens, for manifests to speak of.
const TOKENS: &[u8] = include_bytes!("../fixtures/tokens.parquet");
const SEQUENCE_LENGTH: u64 = 8;
/// Windows that are read: the first ones and the last.
const WINDOWS: u64 = 4;

struct Silent;

impl Progress for Silent {}

/// A parquet file. What `supra data index` takes can be read.
pub fn parquet(data: &[u8]) {
    scratch(|directory| {
        fs::write(directory.join("tokens.parquet"), data).expect("our directory");
        let options = IndexOptions {
            dir: directory.to_owned(),
            column: "input_ids".to_owned(),
            tokenizer: FIXTURES.into(),
            append_eot: Auto3::Always,
            prepend_bos: Auto3::Never,
            heldout: 0,
        };
        let Ok(manifest) = index(&options, &Silent) else {
            return;
        };
        if manifest.windows(SEQUENCE_LENGTH) > 0 {
            let mut reader = Reader::open(directory, SEQUENCE_LENGTH).expect("indexed just now");
            for window in some(reader.windows()) {
                let (tokens, starts) = reader.window(window).expect("indexed just now");
                assert_eq!(tokens.len() as u64, SEQUENCE_LENGTH + 1);
                assert!(tokens.iter().all(|token| *token < manifest.vocabulary()));
                assert!(
                    starts
                        .iter()
                        .all(|start| u64::from(*start) <= SEQUENCE_LENGTH)
                );
            }
        }
    });
}

/// The manifest of a dataset, beside a file of tokens.
pub fn dataset(data: &[u8]) {
    scratch(|directory| {
        fs::write(directory.join("dataset.json"), data).expect("our directory");
        fs::write(directory.join("tokens.parquet"), TOKENS).expect("our directory");
        read_some(directory);
    });
}

fn read_some(directory: &Path) {
    let Ok(mut reader) = Reader::open(directory, SEQUENCE_LENGTH) else {
        return;
    };
    for window in some(reader.windows()) {
        if let Ok((tokens, _)) = reader.window(window) {
            assert_eq!(tokens.len() as u64, SEQUENCE_LENGTH + 1);
        }
    }
    let _ = reader.manifest().sources(0..reader.manifest().tokens());
}

/// The first and last windows of so many.
fn some(windows: u64) -> impl Iterator<Item = u64> {
    let last = windows.saturating_sub(WINDOWS).max(WINDOWS)..windows;
    (0..windows.min(WINDOWS)).chain(last)
}
