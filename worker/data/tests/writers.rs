//! Parquet written by others: pyarrow, Hugging Face datasets, DuckDB and Polars (tests/parity/parquet_writers.py).

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::Deserialize;
use supra_data::{Auto3, DataError, Manifest, Reader, TokenizeOptions, tokenize};

use crate::support::{EOT, Place, assert_windows, packed, shown};

/// `expected.json`: what is in the files.
#[derive(Deserialize)]
struct Expected {
    contents: BTreeMap<String, Vec<Vec<u32>>>,
    files: BTreeMap<String, Written>,
}

/// A file.
#[derive(Deserialize)]
struct Written {
    kind: Kind,
    column: String,
    /// Name of its documents.
    documents: Option<String>,
    /// Words of the error that reading it has to end with.
    refused: Option<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Tokens,
    Text,
}

fn golden() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../tests/golden/parquet"]
        .iter()
        .collect()
}

fn expected() -> Expected {
    let text = fs::read(golden().join("expected.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Makes a dataset of the file: indexed as it is, or of the tokens of its texts.
fn dataset(place: &Place, name: &str, written: &Written) -> Result<Manifest, DataError> {
    fs::copy(golden().join(name), place.data().join(name)).unwrap();
    match written.kind {
        Kind::Tokens => place.index_with(|options| options.column.clone_from(&written.column)),
        Kind::Text => {
            let options = TokenizeOptions {
                input: vec![place.data()],
                output: place.path("tokens"),
                tokenizer: place.tokenizer(),
                column: written.column.clone(),
                append_eot: Auto3::Auto,
                prepend_bos: Auto3::Never,
                heldout: 0,
                threads: 1,
            };
            tokenize(&options, &()).map(|made| made.manifest)
        }
    }
}

#[test]
fn what_others_wrote_is_read_to_the_last_token() {
    let expected = expected();
    let mut read = 0;
    for (name, written) in &expected.files {
        let Some(documents) = &written.documents else {
            continue;
        };
        let stream = packed(&expected.contents[documents], Some(EOT));
        if stream.0.is_empty() {
            continue;
        }
        let place = Place::new();
        let manifest = dataset(&place, name, written)
            .unwrap_or_else(|error| panic!("{name}: {}", shown(&error)));
        let mut reader = Reader::open(manifest.path(), 7).unwrap();
        // The second time only pages with wanted windows are decoded.
        let windows = reader.windows();
        assert_windows(&mut reader, &stream, (0..windows).chain((0..windows).rev()));
        read += 1;
    }
    assert!(read > 40, "{read}");
}

#[test]
fn a_file_of_others_without_rows_adds_nothing() {
    let expected = expected();
    for kind in [Kind::Tokens, Kind::Text] {
        let empty = |written: &&Written| {
            written.kind == kind && written.documents.as_deref() == Some("none")
        };
        for (name, written) in &expected.files {
            if !empty(&written) {
                continue;
            }
            let place = Place::new();
            let full = expected.files.iter().find(|(_, other)| {
                (other.kind, &other.column) == (kind, &written.column)
                    && other.documents.as_deref() == Some("documents")
            });
            let (full, _) = full.unwrap();
            fs::copy(golden().join(full), place.data().join(full)).unwrap();
            let manifest = dataset(&place, name, written)
                .unwrap_or_else(|error| panic!("{name}: {}", shown(&error)));
            let stream = packed(&expected.contents["documents"], Some(EOT));
            assert_eq!(manifest.tokens(), stream.0.len() as u64, "{name}");
        }
    }
}

#[test]
fn what_cannot_be_read_is_named_with_file_place_and_remedy() {
    let expected = expected();
    let mut refused = 0;
    for (name, written) in &expected.files {
        let Some(words) = &written.refused else {
            continue;
        };
        let place = Place::new();
        let text = match dataset(&place, name, written) {
            Ok(_) => panic!("{name} is read"),
            Err(error) => shown(&error),
        };
        for word in words.iter().chain([name]) {
            assert!(text.contains(word), "{name}: {word:?} is not in: {text}");
        }
        // A file of a kind that is not read is not damaged.
        assert!(!text.contains("damaged"), "{name}: {text}");
        refused += 1;
    }
    assert!(refused > 10, "{refused}");
}
