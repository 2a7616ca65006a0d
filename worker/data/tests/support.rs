//! Parquet of every kind, a small tokenizer, and the plain packed stream to compare with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, FixedSizeListArray, Int64Array, LargeListArray, ListArray, RecordBatch, StringArray,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use serde_json::{Value, json};
use supra_data::{Auto3, DataError, IndexOptions, Manifest, Reader, index};
use tempfile::TempDir;

/// Words of the test tokenizer: `w1` is 1, and so on; `<unk>` is 0.
pub const WORDS: u32 = 500;
pub const BOS: u32 = 500;
pub const EOT: u32 = 501;
pub const VOCABULARY: u32 = 502;

/// A directory with a tokenizer in `tokenizer/` and room for data in `data/`.
pub struct Place {
    directory: TempDir,
}

impl Place {
    pub fn new() -> Place {
        let directory = TempDir::new().unwrap();
        fs::create_dir(directory.path().join("data")).unwrap();
        fs::create_dir(directory.path().join("tokenizer")).unwrap();
        let place = Place { directory };
        place.configure(json!({"eos_token": "</s>", "bos_token": {"content": "<s>"}}));
        write_json(&place.tokenizer().join("tokenizer.json"), &tokenizer_json());
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    pub fn tokenizer(&self) -> PathBuf {
        self.path("tokenizer")
    }

    /// Replaces `tokenizer_config.json`.
    pub fn configure(&self, config: Value) {
        write_json(&self.tokenizer().join("tokenizer_config.json"), &config);
    }

    /// Writes `documents` as `data/NAME` in the plainest way.
    pub fn write(&self, name: &str, documents: &[Vec<u32>]) {
        Parquet::default().write(&self.data().join(name), &[documents]);
    }

    pub fn options(&self) -> IndexOptions {
        IndexOptions {
            dir: self.data(),
            column: "input_ids".to_owned(),
            tokenizer: self.tokenizer(),
            append_eot: Auto3::Auto,
            prepend_bos: Auto3::Never,
            heldout: 0,
        }
    }

    pub fn index(&self) -> Result<Manifest, DataError> {
        index(&self.options(), &())
    }

    pub fn index_with(
        &self,
        change: impl FnOnce(&mut IndexOptions),
    ) -> Result<Manifest, DataError> {
        let mut options = self.options();
        change(&mut options);
        index(&options, &())
    }
}

pub fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_vec(value).unwrap()).unwrap();
}

pub fn tokenizer_json() -> Value {
    let vocabulary: serde_json::Map<_, _> = (0..WORDS)
        .map(|id| {
            (
                if id == 0 {
                    "<unk>".to_owned()
                } else {
                    format!("w{id}")
                },
                json!(id),
            )
        })
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(BOS, "<s>"), special(EOT, "</s>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    })
}

#[derive(Clone, Copy, Debug)]
pub enum Lists {
    List,
    Large,
    /// Rows must have one length.
    Fixed,
}

/// How token parquet is written.
#[derive(Clone)]
pub struct Parquet {
    pub lists: Lists,
    pub item: DataType,
    pub properties: WriterProperties,
}

impl Default for Parquet {
    fn default() -> Parquet {
        Parquet {
            lists: Lists::List,
            item: DataType::Int32,
            properties: WriterProperties::default(),
        }
    }
}

impl Parquet {
    /// Writes `groups`, each as a row group of its own.
    pub fn write<D: AsRef<[Vec<u32>]>>(&self, path: &Path, groups: &[D]) {
        let mut writer: Option<ArrowWriter<File>> = None;
        for group in groups {
            let column = self.column(group.as_ref());
            let name = Field::new("input_ids", column.data_type().clone(), true);
            // A column before the one asked for, as others have them.
            let urls = StringArray::from_iter_values(
                (0..column.len()).map(|row| format!("https://example.org/{row}")),
            );
            let schema = Arc::new(Schema::new(vec![
                Field::new("url", DataType::Utf8, false),
                name,
            ]));
            let batch =
                RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(urls), column]).unwrap();
            let writer = writer.get_or_insert_with(|| {
                let file = File::create(path).unwrap();
                ArrowWriter::try_new(file, schema, Some(self.properties.clone())).unwrap()
            });
            writer.write(&batch).unwrap();
            writer.flush().unwrap();
        }
        writer.expect("at least one row group").close().unwrap();
    }

    fn column(&self, documents: &[Vec<u32>]) -> ArrayRef {
        let values: Int64Array = documents
            .iter()
            .flatten()
            .map(|token| i64::from(*token))
            .collect();
        let values = cast(&values, &self.item).unwrap();
        let item = Arc::new(Field::new("item", self.item.clone(), true));
        let lengths = documents.iter().map(Vec::len);
        match self.lists {
            Lists::List => Arc::new(ListArray::new(
                item,
                OffsetBuffer::from_lengths(lengths),
                values,
                None,
            )),
            Lists::Large => Arc::new(LargeListArray::new(
                item,
                OffsetBuffer::from_lengths(lengths),
                values,
                None,
            )),
            Lists::Fixed => Arc::new(FixedSizeListArray::new(
                item,
                documents[0].len() as i32,
                values,
                None,
            )),
        }
    }
}

/// Writes one column of any kind.
pub fn write_column(path: &Path, name: &str, column: ArrayRef) {
    let schema = Arc::new(Schema::new(vec![Field::new(
        name,
        column.data_type().clone(),
        true,
    )]));
    let batch = RecordBatch::try_new(Arc::clone(&schema), vec![column]).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// Writes texts as RefinedWeb does, `rows` to a row group.
pub fn write_texts(path: &Path, texts: &[Option<&str>], rows: usize) {
    let schema = Arc::new(Schema::new(vec![
        Field::new("dump", DataType::Utf8, false),
        Field::new("content", DataType::Utf8, true),
    ]));
    let mut writer =
        ArrowWriter::try_new(File::create(path).unwrap(), Arc::clone(&schema), None).unwrap();
    for texts in texts.chunks(rows) {
        let dump: ArrayRef = Arc::new(StringArray::from(vec!["debian"; texts.len()]));
        let content: ArrayRef = Arc::new(StringArray::from(texts.to_vec()));
        writer
            .write(&RecordBatch::try_new(Arc::clone(&schema), vec![dump, content]).unwrap())
            .unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
}

/// A list column with explicit offsets and nulls.
pub fn nullable_lists(
    values: Vec<Option<i64>>,
    offsets: Vec<i32>,
    rows: Option<Vec<bool>>,
) -> ArrayRef {
    let item = Arc::new(Field::new("item", DataType::Int64, true));
    let values = Arc::new(Int64Array::from(values));
    let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
    Arc::new(ListArray::new(item, offsets, values, rows.map(Into::into)))
}

/// The plain packed stream of documents, one after the other, and where they begin.
pub fn packed<D: AsRef<[u32]>>(documents: &[D], append: Option<u32>) -> (Vec<u32>, Vec<u64>) {
    let (mut tokens, mut starts) = (Vec::new(), Vec::new());
    for document in documents {
        let first = tokens.len() as u64;
        tokens.extend_from_slice(document.as_ref());
        tokens.extend(append);
        if tokens.len() as u64 > first {
            starts.push(first);
        }
    }
    (tokens, starts)
}

/// All windows of a reader must be the stream, cut; the windows are read in the order `order` gives.
pub fn assert_windows(
    reader: &mut Reader,
    stream: &(Vec<u32>, Vec<u64>),
    order: impl IntoIterator<Item = u64>,
) {
    let length = reader.sequence_length();
    assert_eq!(reader.windows(), (stream.0.len() as u64 - 1) / length);
    for window in order {
        let (first, last) = (window * length, (window + 1) * length);
        let (tokens, starts) = reader.window(window).unwrap();
        assert_eq!(
            tokens,
            stream.0[first as usize..=last as usize],
            "tokens of window {window}"
        );
        let expected: Vec<u32> = stream
            .1
            .iter()
            .filter(|start| (first..=last).contains(start))
            .map(|start| (start - first) as u32)
            .collect();
        assert_eq!(starts, expected, "starts of window {window}");
    }
}

/// The error with its sources, as the command line shows it.
pub fn shown(error: &DataError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Asserts that `result` is an error that says all of `parts`.
#[track_caller]
pub fn assert_error<T: std::fmt::Debug>(result: Result<T, DataError>, parts: &[&str]) {
    let text = shown(&result.unwrap_err());
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// `count` documents of 1 to `longest` words, always the same for the same `seed`.
pub fn documents(seed: u64, count: usize, longest: u64) -> Vec<Vec<u32>> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..count)
        .map(|_| {
            (0..1 + next() % longest)
                .map(|_| 1 + (next() % u64::from(WORDS - 1)) as u32)
                .collect()
        })
        .collect()
}

/// Overwrites one byte of a file.
pub fn flip(path: &Path, position: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[position] ^= 0x55;
    fs::write(path, bytes).unwrap();
}
