//! Indexing token parquet made by others.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use arrow::array::{Int32Array, StringArray};
use arrow::datatypes::DataType;
use parquet::basic::{Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use supra_data::{Auto3, Documents, Manifest, Reader};

use crate::support::{
    EOT, Lists, Parquet, Place, assert_error, assert_windows, documents, flip, nullable_lists,
    packed, write_column,
};

fn whole(manifest: &Manifest) -> Reader {
    Reader::open(manifest.path(), 7).unwrap()
}

#[test]
fn every_list_of_every_integer_reads_alike() {
    let documents: Vec<_> = documents(1, 40, 1)
        .into_iter()
        .map(|one| one.repeat(9))
        .collect();
    let stream = packed(&documents, Some(EOT));
    for lists in [Lists::List, Lists::Large, Lists::Fixed] {
        for item in [
            DataType::Int16,
            DataType::Int32,
            DataType::Int64,
            DataType::UInt16,
            DataType::UInt32,
            DataType::UInt64,
        ] {
            let place = Place::new();
            let parquet = Parquet {
                lists,
                item: item.clone(),
                ..Parquet::default()
            };
            parquet.write(
                &place.data().join("a.parquet"),
                &[&documents[..13], &documents[13..]],
            );
            let mut reader = whole(&place.index().unwrap());
            let windows = reader.windows();
            assert_windows(&mut reader, &stream, 0..windows);
        }
    }
}

#[test]
fn every_page_layout_and_codec_reads_alike() {
    let documents = documents(2, 300, 60);
    let stream = packed(&documents, Some(EOT));
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        for (version, dictionary) in [
            (WriterVersion::PARQUET_1_0, true),
            (WriterVersion::PARQUET_2_0, true),
            (WriterVersion::PARQUET_2_0, false),
        ] {
            let properties = WriterProperties::builder()
                .set_compression(compression)
                .set_writer_version(version)
                .set_dictionary_enabled(dictionary)
                .set_data_page_row_count_limit(17)
                .set_write_batch_size(16)
                .build();
            let place = Place::new();
            let parquet = Parquet {
                properties,
                ..Parquet::default()
            };
            parquet.write(
                &place.data().join("a.parquet"),
                &documents.chunks(71).collect::<Vec<_>>(),
            );
            let mut reader = whole(&place.index().unwrap());
            let windows = reader.windows();
            assert_windows(&mut reader, &stream, 0..windows);
        }
    }
}

#[test]
fn files_are_taken_in_the_order_of_their_names() {
    let place = Place::new();
    place.write("b.parquet", &[vec![3, 4]]);
    place.write("a.parquet", &[vec![1, 2]]);
    place.write("c.parquet", &[vec![5, 6, 7, 8]]);
    let manifest = place.index().unwrap();
    assert_eq!(
        manifest.files().collect::<Vec<_>>(),
        ["a.parquet", "b.parquet", "c.parquet"]
    );
    assert_eq!(
        whole(&manifest).window(0).unwrap().0,
        [1, 2, EOT, 3, 4, EOT, 5, 6]
    );
    assert_eq!(Manifest::load(&place.data()).unwrap(), manifest);
}

#[test]
fn the_same_files_give_the_same_manifest() {
    let (one, two) = (Place::new(), Place::new());
    for place in [&one, &two] {
        place.write("a.parquet", &documents(3, 50, 9));
    }
    assert_eq!(one.index().unwrap().hash(), two.index().unwrap().hash());
    one.write("a.parquet", &documents(4, 50, 9));
    assert_ne!(one.index().unwrap().hash(), two.index().unwrap().hash());
}

#[test]
fn eot_is_added_where_no_document_has_it() {
    let place = Place::new();
    place.write("a.parquet", &[vec![1, 2], vec![], vec![EOT], vec![3, 4, 5]]);
    let manifest = place.index().unwrap();
    assert_eq!(
        (manifest.tokens(), manifest.documents()),
        (10, 4),
        "{:?}",
        manifest.findings()
    );
    assert!(
        manifest
            .findings()
            .iter()
            .any(|finding| finding.contains("0 of 2 sampled documents end with EOT"))
    );
    let manifest = place
        .index_with(|options| options.append_eot = Auto3::Never)
        .unwrap();
    assert_eq!(
        (manifest.tokens(), manifest.documents()),
        (6, 3),
        "the empty document adds nothing"
    );
}

#[test]
fn eot_is_not_added_where_every_document_has_it() {
    let place = Place::new();
    place.write(
        "a.parquet",
        &[vec![1, 2, EOT], vec![EOT], vec![3, 4, 5, EOT], vec![]],
    );
    assert_eq!(place.index().unwrap().tokens(), 8);
    assert_eq!(
        place
            .index_with(|options| options.append_eot = Auto3::Always)
            .unwrap()
            .tokens(),
        12
    );
}

#[test]
fn documents_of_eot_only_are_documents() {
    let place = Place::new();
    place.write("a.parquet", &vec![vec![EOT]; 9]);
    let manifest = place.index().unwrap();
    assert_eq!((manifest.tokens(), manifest.documents()), (9, 9));
    assert_eq!(
        whole(&manifest).window(0).unwrap(),
        (vec![EOT; 8], (0..8).collect())
    );
}

#[test]
fn auto_asks_when_the_data_leave_it_open() {
    let place = Place::new();
    place.write("a.parquet", &[vec![1, 2, EOT], vec![3, 4]]);
    assert_error(
        place.index(),
        &[
            "1 of 2 sampled documents end with EOT",
            "--append-eot never",
        ],
    );
    place.write("a.parquet", &[vec![500, 2], vec![3, 4, 5]]);
    let result = place.index_with(|options| options.prepend_bos = Auto3::Auto);
    assert_error(
        result,
        &[
            "1 of 2 sampled documents begin with BOS (500)",
            "--prepend-bos never",
        ],
    );
}

#[test]
fn bos_is_added_as_the_tokenizer_is_configured() {
    let place = Place::new();
    place.write("a.parquet", &[vec![1, 2], vec![3]]);
    let auto = |options: &mut supra_data::IndexOptions| options.prepend_bos = Auto3::Auto;
    assert_eq!(place.index_with(auto).unwrap().tokens(), 5);
    place.configure(
        serde_json::json!({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": true}),
    );
    let manifest = place.index_with(auto).unwrap();
    let mut reader = Reader::open(manifest.path(), 6).unwrap();
    assert_eq!(
        reader.window(0).unwrap(),
        (vec![500, 1, 2, EOT, 500, 3, EOT], vec![0, 4])
    );
    place.configure(serde_json::json!({"eos_token": "</s>"}));
    let result = place.index_with(|options| options.prepend_bos = Auto3::Always);
    assert_error(
        result,
        &["tokenizer.json", "begins a document", "--prepend-bos never"],
    );
}

#[test]
fn in_rows_of_one_length_a_document_ends_at_eot() {
    let place = Place::new();
    let rows: Vec<Vec<u32>> = vec![
        vec![1, 2, EOT, 3],
        vec![4, EOT, EOT, 5],
        vec![6, 7, 8, 9],
        vec![10, EOT, 11, EOT],
    ];
    Parquet::default().write(
        &place.data().join("a.parquet"),
        &[&rows[..1], &rows[1..3], &rows[3..]],
    );
    // The next file ends with a shorter row.
    place.write("b.parquet", &[vec![12, 13, EOT, 14], vec![15]]);
    let manifest = place.index().unwrap();
    assert_eq!(manifest.document_kind(), Documents::EndOfText);
    assert!(
        manifest.findings()[0].contains("so a document ends at EOT"),
        "{:?}",
        manifest.findings()
    );
    let stream = (
        [rows.concat(), vec![12, 13, EOT, 14, 15]].concat(),
        vec![0, 3, 6, 7, 14, 16, 19],
    );
    let mut reader = Reader::open(manifest.path(), 5).unwrap();
    assert_windows(&mut reader, &stream, 0..4);
    let result = place.index_with(|options| options.append_eot = Auto3::Always);
    assert_error(result, &["already has its EOT"]);
}

#[test]
fn all_rows_decide_what_a_document_is_even_if_a_sample_misleads() {
    let place = Place::new();
    let fixed = || vec![vec![1, EOT, 3, 4]; 5];
    let groups = [fixed(), vec![vec![9; 6]], fixed()];
    Parquet::default().write(&place.data().join("a.parquet"), &groups);
    let manifest = place.index().unwrap();
    assert_eq!(manifest.document_kind(), Documents::Row);
    assert_eq!((manifest.documents(), manifest.tokens()), (11, 46 + 11));
}

#[test]
fn exactly_the_asked_number_of_documents_is_held_out() {
    let all = documents(5, 400, 30);
    let mut chosen = Vec::new();
    for rows in [400, 90, 7] {
        let place = Place::new();
        Parquet::default().write(
            &place.data().join("a.parquet"),
            &all[..150].chunks(rows).collect::<Vec<_>>(),
        );
        Parquet::default().write(
            &place.data().join("b.parquet"),
            &all[150..].chunks(rows).collect::<Vec<_>>(),
        );
        let manifest = place.index_with(|options| options.heldout = 25).unwrap();
        let heldout = Manifest::load(&place.data().join("heldout.json")).unwrap();
        assert_eq!((manifest.documents(), heldout.documents()), (375, 25));
        let (train, held) = (read_documents(&manifest), read_documents(&heldout));
        let both: BTreeSet<_> = train.iter().chain(&held).cloned().collect();
        let expected = all
            .iter()
            .map(|document| [&document[..], &[EOT]].concat())
            .collect();
        assert_eq!(both, expected);
        chosen.push(held);
    }
    assert!(
        chosen.windows(2).all(|pair| pair[0] == pair[1]),
        "the choice does not depend on row groups"
    );
}

#[test]
fn documents_over_several_row_groups_are_held_out_whole() {
    let place = Place::new();
    let stream: Vec<u32> = documents(6, 60, 40)
        .iter()
        .flat_map(|one| [one, &[EOT][..]].concat())
        .collect();
    let rows: Vec<Vec<u32>> = stream.chunks_exact(16).map(<[u32]>::to_vec).collect();
    Parquet::default().write(
        &place.data().join("a.parquet"),
        &rows.chunks(1).collect::<Vec<_>>(),
    );
    let before = read_documents(&place.index().unwrap());
    let manifest = place.index_with(|options| options.heldout = 20).unwrap();
    assert_eq!(manifest.document_kind(), Documents::EndOfText);
    let heldout = Manifest::load(&place.data().join("heldout.json")).unwrap();
    let (train, held) = (read_documents(&manifest), read_documents(&heldout));
    assert_eq!(held.len(), 20);
    let expected: Vec<_> = before
        .into_iter()
        .filter(|document| !held.contains(document))
        .collect();
    assert_eq!(train, expected);
}

#[test]
fn something_must_be_left_to_train_on() {
    let place = Place::new();
    place.write("a.parquet", &[vec![1, 2], vec![EOT], vec![], vec![3, 4, 5]]);
    place
        .index_with(|options| (options.heldout, options.append_eot) = (1, Auto3::Always))
        .unwrap();
    let result =
        place.index_with(|options| (options.heldout, options.append_eot) = (2, Auto3::Always));
    assert_error(
        result,
        &["holds 2 documents with text, of which 2 were to be held out"],
    );
    place.index().unwrap();
    assert!(
        !place.data().join("heldout.json").exists(),
        "a stale held-out manifest does not stay"
    );
}

/// The documents of a dataset, each a vector of its tokens.
fn read_documents(manifest: &Manifest) -> Vec<Vec<u32>> {
    let mut reader = Reader::open(manifest.path(), manifest.tokens() - 1).unwrap();
    let (tokens, starts) = reader.window(0).unwrap();
    let ends = starts[1..]
        .iter()
        .map(|end| *end as usize)
        .chain([tokens.len()]);
    starts
        .iter()
        .zip(ends)
        .map(|(start, end)| tokens[*start as usize..end].to_vec())
        .collect()
}

#[test]
fn a_token_outside_the_vocabulary_is_named_with_its_place() {
    for (bad, item) in [
        (502, DataType::Int32),
        (-1, DataType::Int16),
        (70_000, DataType::Int64),
    ] {
        let place = Place::new();
        let path = place.data().join("bad.parquet");
        let values = arrow::compute::cast(
            &nullable_lists(
                vec![Some(1), Some(2), Some(3), Some(bad)],
                vec![0, 2, 2, 4],
                None,
            ),
            &DataType::List(Arc::new(arrow::datatypes::Field::new("item", item, true))),
        );
        write_column(&path, "input_ids", values.unwrap());
        assert_error(
            place.index(),
            &[
                "bad.parquet",
                "row group 0, row 2",
                &format!("token id {bad}"),
                "(0 to 501)",
            ],
        );
    }
}

#[test]
fn nulls_are_named_with_their_place() {
    let place = Place::new();
    let path = place.data().join("bad.parquet");
    write_column(
        &path,
        "input_ids",
        nullable_lists(vec![Some(1), Some(2), None], vec![0, 1, 1, 3], None),
    );
    assert_error(
        place.index(),
        &["bad.parquet: row group 0, row 2: holds a null token"],
    );
    let rows = Some(vec![true, false, true]);
    write_column(
        &path,
        "input_ids",
        nullable_lists(vec![Some(1), Some(2)], vec![0, 1, 1, 2], rows),
    );
    assert_error(place.index(), &["bad.parquet: row group 0, row 1: is null"]);
}

#[test]
fn files_that_are_no_token_parquet_are_refused_by_name() {
    let place = Place::new();
    assert_error(place.index(), &["holds no *.parquet file"]);
    let absent = place.path("nowhere");
    assert_error(
        place.index_with(|options| options.dir = absent),
        &["nowhere", "No such file"],
    );

    let path = place.data().join("a.parquet");
    fs::write(&path, b"").unwrap();
    assert_error(place.index(), &["a.parquet: is empty (0 bytes)"]);
    fs::write(&path, b"{\"not\": \"parquet\"}").unwrap();
    assert_error(
        place.index(),
        &["a.parquet: cannot be read as parquet", "copy it again"],
    );
    place.write("a.parquet", &documents(7, 200, 20));
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert_error(
        place.index(),
        &[
            "a.parquet: cannot be read as parquet",
            "damaged or incomplete",
        ],
    );

    write_column(&path, "content", Arc::new(StringArray::from(vec!["text"])));
    assert_error(
        place.index(),
        &[
            "no column \"input_ids\"; its columns are: content",
            "--column",
        ],
    );
    let column = |name: &str| {
        let name = name.to_owned();
        move |options: &mut supra_data::IndexOptions| options.column = name
    };
    assert_error(
        place.index_with(column("content")),
        &["\"content\" is Utf8, not a list of integers"],
    );
    write_column(&path, "input_ids", Arc::new(Int32Array::from(vec![1, 2])));
    assert_error(
        place.index(),
        &["\"input_ids\" is Int32, not a list of integers"],
    );
}

#[test]
fn a_dataset_without_tokens_is_refused() {
    let place = Place::new();
    place.write("a.parquet", &[vec![], vec![]]);
    assert_error(
        place.index_with(|options| options.append_eot = Auto3::Never),
        &["holds no tokens"],
    );
}

#[test]
fn a_damaged_byte_is_an_error_or_harmless_but_never_a_panic() {
    let place = Place::new();
    let documents = documents(8, 60, 30);
    let path = place.data().join("a.parquet");
    Parquet::default().write(&path, &documents.chunks(25).collect::<Vec<_>>());
    let manifest = place.index().unwrap();
    let size = fs::metadata(&path).unwrap().len() as usize;
    let expected: Vec<_> = (0..whole(&manifest).windows())
        .map(|w| whole(&manifest).window(w).unwrap())
        .collect();
    for position in (0..size).step_by(size / 250) {
        flip(&path, position);
        if let Ok(mut reader) = Reader::open(manifest.path(), 7) {
            for (window, expected) in expected.iter().enumerate() {
                let Ok(found) = reader.window(window as u64) else {
                    break;
                };
                assert_eq!(found, *expected, "byte {position} changed what is read");
            }
        }
        flip(&path, position);
    }
}

#[test]
fn a_broken_manifest_is_refused() {
    let place = Place::new();
    assert_error(
        Manifest::load(&place.data()),
        &["dataset.json", "supra data index"],
    );
    let path = place.data().join("dataset.json");
    fs::write(&path, "{").unwrap();
    assert_error(
        Manifest::load(&path),
        &["is not a dataset manifest", "line 1"],
    );
    place.write("a.parquet", &[vec![1, 2, 3]]);
    place.index().unwrap();
    let good = fs::read_to_string(&path).unwrap();
    for (from, to, says) in [
        ("\"format\": 1", "\"format\": 99", "format 99"),
        ("\"a.parquet\"", "\"../a.parquet\"", "not a plain file name"),
        ("\"tokens\": 4", "\"tokens\": 5", "totals"),
        ("\"first_token\": 0", "\"first_token\": 1", "without gaps"),
    ] {
        fs::write(&path, good.replacen(from, to, 1)).unwrap();
        assert_error(Manifest::load(&path), &["dataset.json", says]);
    }
}
