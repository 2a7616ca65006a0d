//! Windows of the packed stream, from parquet and from the packed store.

use std::fs;
use std::path::Path;

use parquet::file::properties::WriterProperties;
use proptest::prelude::*;
use supra_data::{Auto3, PackOptions, Reader, pack};

use crate::support::{EOT, Parquet, Place, assert_error, assert_windows, documents, flip, packed};

fn pack_into(place: &Place, name: &str) -> std::path::PathBuf {
    let output = place.path(name);
    pack(
        &PackOptions {
            dataset: place.data(),
            output: output.clone(),
        },
        &(),
    )
    .unwrap();
    output
}

/// Documents, the rows per row group, the files' first documents, the sequence length, whether EOT is added, the cache.
fn datasets() -> impl Strategy<Value = (Vec<Vec<u32>>, usize, usize, u64, bool, u64)> {
    let document = prop_oneof![
        8 => prop::collection::vec(1u32..500, 0..20),
        1 => Just(vec![EOT]),
        1 => Just(Vec::new()),
    ];
    (
        prop::collection::vec(document, 1..60),
        1usize..30,
        1usize..60,
        1u64..40,
        any::<bool>(),
        0u64..500,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_layout_gives_the_plain_packed_stream((documents, rows, split, length, append, cache) in datasets()) {
        let place = Place::new();
        let append_eot = if append { Auto3::Always } else { Auto3::Never };
        let stream = packed(&documents, append.then_some(EOT));
        prop_assume!(stream.0.len() as u64 > length);
        let split = split.min(documents.len());
        for (name, part) in [("a.parquet", &documents[..split]), ("b.parquet", &documents[split..])] {
            if !part.is_empty() {
                Parquet::default().write(&place.data().join(name), &part.chunks(rows).collect::<Vec<_>>());
            }
        }
        let result = place.index_with(|options| options.append_eot = append_eot);
        // Rows of one length with EOT inside are another kind of dataset, tested elsewhere.
        prop_assume!(result.as_ref().is_ok_and(|manifest| manifest.document_kind() == supra_data::Documents::Row));
        let mut reader = Reader::open(&place.data(), length).unwrap().with_cache(cache);
        let windows = reader.windows();
        assert_windows(&mut reader, &stream, 0..windows);
        reader.hold(&[windows / 2..windows, 0..windows / 2]).unwrap();
        assert_windows(&mut reader, &stream, (0..windows).rev());
        let store = pack_into(&place, "packed");
        assert_windows(&mut Reader::open(&store, length).unwrap(), &stream, (0..windows).rev());
    }
}

#[test]
fn long_streams_agree_over_the_borders_of_groups_stretches_and_chunks() {
    let place = Place::new();
    let all = documents(11, 3000, 2000);
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .build();
    Parquet {
        properties,
        ..Parquet::default()
    }
    .write(
        &place.data().join("a.parquet"),
        &[&all[..100], &all[100..2000], &all[2000..]],
    );
    place.index().unwrap();
    let stream = packed(&all, Some(EOT));
    assert!(stream.0.len() > 5 << 19, "{} tokens", stream.0.len());
    for mut reader in [
        Reader::open(&place.data(), 1000).unwrap(),
        Reader::open(&place.data(), 1000)
            .unwrap()
            .with_cache(1 << 20),
        Reader::open(&pack_into(&place, "packed"), 1000).unwrap(),
    ] {
        let windows = reader.windows();
        assert_windows(&mut reader, &stream, (0..windows).step_by(97));
        assert_windows(&mut reader, &stream, 1040..1060);
        reader
            .hold(&[1000..1064, 0..64, windows - 64..windows])
            .unwrap();
        assert_windows(
            &mut reader,
            &stream,
            (1000..1064).chain(0..64).chain(windows - 64..windows).rev(),
        );
    }
}

#[test]
fn a_dataset_shorter_than_a_window_is_refused() {
    let place = Place::new();
    place.write("a.parquet", &[vec![1, 2, 3]]);
    place.index().unwrap();
    assert_eq!(Reader::open(&place.data(), 3).unwrap().windows(), 1);
    assert_error(
        Reader::open(&place.data(), 4),
        &[
            "holds 4 tokens, one window takes 5",
            "smaller sequence length",
        ],
    );
    assert_error(Reader::open(&place.data(), 0), &["sequence length is 0"]);
    assert_error(
        Reader::open(&place.data(), 3).unwrap().window(1),
        &["there is no window 1, it has 1"],
    );
}

#[test]
fn files_that_came_went_or_changed_size_are_found_on_opening() {
    let place = Place::new();
    place.write("a.parquet", &documents(12, 20, 9));
    place.write("b.parquet", &documents(13, 20, 9));
    place.index().unwrap();
    let open = || Reader::open(&place.data(), 4);
    open().unwrap();
    place.write("c.parquet", &[vec![1]]);
    assert_error(open(), &["c.parquet: is not in", "supra data index"]);
    fs::remove_file(place.data().join("c.parquet")).unwrap();
    place.write("b.parquet", &documents(13, 21, 9));
    assert_error(open(), &["b.parquet: has", "bytes, the manifest says"]);
    fs::remove_file(place.data().join("b.parquet")).unwrap();
    assert_error(open(), &["b.parquet: is missing", "restore it"]);
}

#[test]
fn a_file_of_the_same_size_with_other_tokens_is_found_on_reading() {
    let place = Place::new();
    let plain = Parquet {
        properties: WriterProperties::builder()
            .set_dictionary_enabled(false)
            .build(),
        ..Parquet::default()
    };
    let path = place.data().join("a.parquet");
    plain.write(&path, &[vec![vec![1, 2, 3, 4, 5], vec![6, 7]]]);
    place.index().unwrap();
    plain.write(&path, &[vec![vec![1, 2, 3, 4, 5], vec![6, 8]]]);
    let mut reader = Reader::open(&place.data(), 4).unwrap();
    assert_error(
        reader.window(0),
        &[
            "a.parquet: row group 0 does not have the checksum",
            "supra data index",
        ],
    );
    // The same tokens in other documents are other data too.
    plain.write(&path, &[vec![vec![1, 2, 3, 4], vec![5, 6, 7]]]);
    assert!(reader.window(0).is_err());
}

#[test]
fn the_packed_store_takes_two_bytes_per_token_and_checks_them() {
    let place = Place::new();
    let all = documents(14, 200, 30);
    place.write("a.parquet", &all);
    let source = place.index().unwrap();
    let store = pack_into(&place, "packed");
    let size = |name: &str| fs::metadata(store.join(name)).unwrap().len();
    assert_eq!(
        (size("tokens.bin"), size("starts.bin")),
        (2 * source.tokens(), 8 * source.documents())
    );
    let damaged = |name: &str| {
        flip(&store.join(name), 100);
        assert_error(
            Reader::open(&store, 16).unwrap().window(0),
            &["do not have the checksum"],
        );
        flip(&store.join(name), 100);
    };
    damaged("tokens.bin");
    damaged("starts.bin");
    Reader::open(&store, 16).unwrap().window(0).unwrap();
    truncate(&store.join("tokens.bin"));
    assert_error(Reader::open(&store, 16), &["tokens.bin: has"]);
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 2]).unwrap();
}

#[test]
fn a_store_is_packed_once_and_beside_nothing_else() {
    let place = Place::new();
    place.write("a.parquet", &documents(15, 20, 9));
    place.index().unwrap();
    let result = pack(
        &PackOptions {
            dataset: place.data(),
            output: place.data(),
        },
        &(),
    );
    assert_error(result, &["a directory of its own"]);
    let store = pack_into(&place, "packed");
    let result = pack(
        &PackOptions {
            dataset: store,
            output: place.path("again"),
        },
        &(),
    );
    assert_error(result, &["is packed already"]);
}
