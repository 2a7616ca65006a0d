//! Text parquet to token parquet.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{BinaryArray, Int32Array};
use serde_json::json;
use supra_data::{Auto3, DataError, Progress, Reader, TokenizeOptions, Tokenized, tokenize};

use crate::support::{
    BOS, EOT, Place, assert_error, assert_windows, documents, packed, tokenizer_json, write_column,
    write_json, write_texts,
};

fn options(place: &Place) -> TokenizeOptions {
    TokenizeOptions {
        input: vec![place.data()],
        output: place.path("tokens"),
        tokenizer: place.tokenizer(),
        column: "content".to_owned(),
        append_eot: Auto3::Auto,
        prepend_bos: Auto3::Auto,
        heldout: 0,
        threads: 3,
    }
}

fn run(place: &Place) -> Result<Tokenized, DataError> {
    tokenize(&options(place), &())
}

fn text(document: &[u32]) -> String {
    document
        .iter()
        .map(|word| format!("w{word}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Writes `data/NAME` with the documents as text.
fn write(place: &Place, name: &str, documents: &[Vec<u32>], rows: usize) {
    let texts: Vec<_> = documents.iter().map(|document| text(document)).collect();
    let texts: Vec<_> = texts.iter().map(|text| Some(text.as_str())).collect();
    write_texts(&place.data().join(name), &texts, rows);
}

#[derive(Default)]
struct Counter {
    announced: AtomicU64,
    rows: AtomicU64,
    tokens: AtomicU64,
}

impl Progress for Counter {
    fn begin(&self, _files: usize, rows: u64) {
        self.announced.store(rows, Ordering::Relaxed);
    }

    fn advance(&self, rows: u64, tokens: u64) {
        self.rows.fetch_add(rows, Ordering::Relaxed);
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
    }
}

#[test]
fn text_becomes_the_packed_stream_in_order_on_any_number_of_threads() {
    let mut all = documents(21, 700, 40);
    all[3] = Vec::new();
    let stream = packed(&all, Some(EOT));
    let mut hashes = Vec::new();
    for threads in [1, 4] {
        let place = Place::new();
        write(&place, "b.parquet", &all[300..], 90);
        write(&place, "a.parquet", &all[..300], 128);
        let counter = Counter::default();
        let done = tokenize(
            &TokenizeOptions {
                threads,
                ..options(&place)
            },
            &counter,
        )
        .unwrap();
        assert_eq!((done.written, done.skipped), (2, 0));
        let counted = (
            counter.announced.into_inner(),
            counter.rows.into_inner(),
            counter.tokens.into_inner(),
        );
        assert_eq!(counted, (700, 700, stream.0.len() as u64));
        let mut reader = Reader::open(&place.path("tokens"), 50).unwrap();
        let windows = reader.windows();
        assert_windows(&mut reader, &stream, 0..windows);
        hashes.push(done.manifest.hash());
    }
    assert_eq!(
        hashes[0], hashes[1],
        "the same text gives the same dataset everywhere"
    );
}

#[test]
fn bos_and_eot_follow_the_tokenizer_and_the_options() {
    let place = Place::new();
    place.configure(json!({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": true}));
    write(&place, "a.parquet", &[vec![1, 2], vec![], vec![3]], 10);
    let first = |options: &TokenizeOptions| {
        let manifest = tokenize(options, &()).unwrap().manifest;
        Reader::open(manifest.path(), manifest.tokens() - 1)
            .unwrap()
            .window(0)
            .unwrap()
    };
    assert_eq!(
        first(&options(&place)),
        (vec![BOS, 1, 2, EOT, BOS, EOT, BOS, 3, EOT], vec![0, 4, 6])
    );
    let without = TokenizeOptions {
        append_eot: Auto3::Never,
        prepend_bos: Auto3::Never,
        ..options(&place)
    };
    assert_eq!(first(&without), (vec![1, 2, 3], vec![0, 2]));
}

#[test]
fn special_tokens_spelled_out_are_text_and_documents_are_neither_cut_nor_padded() {
    let place = Place::new();
    let mut tokenizer = tokenizer_json();
    tokenizer["truncation"] =
        json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    write_json(&place.tokenizer().join("tokenizer.json"), &tokenizer);
    write_texts(
        &place.data().join("a.parquet"),
        &[Some("w1 </s> w2 <s> w3 w4 w5 w6 w7 w8")],
        1,
    );
    let manifest = run(&place).unwrap().manifest;
    assert_eq!((manifest.tokens(), manifest.documents()), (11, 1));
    let tokens = Reader::open(manifest.path(), 10)
        .unwrap()
        .window(0)
        .unwrap()
        .0;
    assert_eq!(tokens, [1, 0, 2, 0, 3, 4, 5, 6, 7, 8, EOT]);
}

#[test]
fn a_second_call_does_only_what_is_left() {
    let place = Place::new();
    for name in ["a.parquet", "b.parquet", "c.parquet"] {
        write(&place, name, &documents(22, 40, 9), 10);
    }
    let output = place.path("tokens");
    let first = run(&place).unwrap();
    let counts = |done: &Tokenized| (done.written, done.skipped);
    let again = run(&place).unwrap();
    assert_eq!(
        (counts(&again), again.manifest.hash()),
        ((0, 3), first.manifest.hash())
    );

    // Interrupted: one file finished, one half written under its temporary name, no manifest.
    fs::remove_file(output.join("b.parquet")).unwrap();
    fs::remove_file(output.join("c.parquet")).unwrap();
    fs::remove_file(output.join("dataset.json")).unwrap();
    fs::write(output.join(".b.parquet.partial"), b"PAR1 half").unwrap();
    let resumed = run(&place).unwrap();
    assert_eq!(
        (counts(&resumed), resumed.manifest.hash()),
        ((2, 1), first.manifest.hash())
    );
    assert!(!output.join(".b.parquet.partial").exists());

    // Damaged output and changed input are made again; so is everything with another tokenizer.
    fs::write(output.join("a.parquet"), b"PAR1").unwrap();
    write(&place, "c.parquet", &documents(23, 41, 9), 10);
    assert_eq!(counts(&run(&place).unwrap()), (2, 1));
    let mut tokenizer = tokenizer_json();
    tokenizer["added_tokens"][0]["lstrip"] = json!(true);
    write_json(&place.tokenizer().join("tokenizer.json"), &tokenizer);
    assert_eq!(counts(&run(&place).unwrap()), (3, 0));
}

#[test]
fn documents_can_be_held_out_while_tokenizing() {
    let place = Place::new();
    write(&place, "a.parquet", &documents(24, 100, 20), 30);
    let done = tokenize(
        &TokenizeOptions {
            heldout: 10,
            ..options(&place)
        },
        &(),
    )
    .unwrap();
    let heldout = supra_data::Manifest::load(&place.path("tokens").join("heldout.json")).unwrap();
    assert_eq!((done.manifest.documents(), heldout.documents()), (90, 10));
}

#[test]
fn bad_text_is_refused_by_name_and_leaves_nothing_half_done() {
    let place = Place::new();
    let path = place.data().join("a.parquet");
    write_texts(&path, &[Some("w1"), Some("w2"), None], 2);
    assert_error(
        run(&place),
        &["a.parquet: row group 1, row 0: the text is null"],
    );
    assert!(!place.path("tokens").join("a.parquet").exists());
    write_column(&path, "text", Arc::new(Int32Array::from(vec![1])));
    assert_error(
        run(&place),
        &["a.parquet: has no column \"content\"; its columns are: text"],
    );
    write_column(
        &path,
        "content",
        Arc::new(BinaryArray::from(vec![&b"bytes"[..]])),
    );
    assert_error(
        run(&place),
        &["a.parquet: column \"content\" is Binary, not text"],
    );
    write(&place, "a.parquet", &documents(25, 300, 9), 300);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
    assert_error(run(&place), &["a.parquet: cannot be read as parquet"]);
    fs::write(&path, b"").unwrap();
    assert_error(run(&place), &["a.parquet: is empty"]);
    fs::remove_file(&path).unwrap();
    assert_error(run(&place), &["data: holds no *.parquet file"]);
    let missing = TokenizeOptions {
        input: vec![PathBuf::from("missing.parquet")],
        ..options(&place)
    };
    assert_error(
        tokenize(&missing, &()),
        &["missing.parquet", "No such file"],
    );
    assert_error(
        tokenize(
            &TokenizeOptions {
                input: Vec::new(),
                ..options(&place)
            },
            &(),
        ),
        &["no input"],
    );
}

#[test]
fn directories_that_would_mix_files_are_refused() {
    let place = Place::new();
    write(&place, "a.parquet", &documents(26, 5, 9), 5);
    let into_itself = TokenizeOptions {
        output: place.data(),
        ..options(&place)
    };
    assert_error(
        tokenize(&into_itself, &()),
        &["the output directory is the input's"],
    );
    fs::create_dir(place.path("more")).unwrap();
    fs::copy(
        place.data().join("a.parquet"),
        place.path("more").join("a.parquet"),
    )
    .unwrap();
    let twice = TokenizeOptions {
        input: vec![place.data(), place.path("more")],
        ..options(&place)
    };
    assert_error(
        tokenize(&twice, &()),
        &["has the same name as", "rename one"],
    );
    run(&place).unwrap();
    fs::copy(
        place.path("tokens").join("a.parquet"),
        place.path("tokens").join("z.parquet"),
    )
    .unwrap();
    assert_error(
        run(&place),
        &["z.parquet: is not made from any of the inputs"],
    );
}

#[test]
fn two_calls_never_write_into_one_directory() {
    let place = Place::new();
    write(&place, "a.parquet", &documents(27, 5, 9), 5);
    fs::create_dir(place.path("tokens")).unwrap();
    let lock = fs::File::open(place.path("tokens")).unwrap();
    lock.try_lock().unwrap();
    assert_error(
        run(&place),
        &["another `supra data tokenize` is writing here"],
    );
    drop(lock);
    run(&place).unwrap();
}
