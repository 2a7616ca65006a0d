//! `supra data tokenize`: text parquet to token parquet, file by file, restartable.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray, StringArray};
use arrow::datatypes::DataType;
use parquet::file::metadata::KeyValue;
use serde::{Deserialize, Serialize};

use crate::directories::{clean, inputs, lock};
use crate::index::{Auto3, Indexer};
use crate::manifest::Documents;
use crate::scan::ColumnFile;
use crate::stream::Rules;
use crate::survey::Layout;
use crate::writer::TokenWriter;
use crate::{DataError, Manifest, Progress, TextTokenizer, files, parallel};

/// Column of token ids in the output.
const TOKEN_COLUMN: &str = "input_ids";
/// Footer entry of the output that tells what it was made from.
const ORIGIN: &str = "supra.tokenized";
/// Documents read at a time, per thread, and documents a thread takes at a time.
const DOCUMENTS: usize = 256;
const SHARE: usize = 16;

/// What `supra data tokenize` is asked to do.
#[derive(Debug, Clone)]
pub struct TokenizeOptions {
    /// Text parquet: files, or directories whose `*.parquet` files are all taken.
    pub input: Vec<PathBuf>,
    /// Directory for the token parquet (one file per input file, same name) and `dataset.json`; created when absent.
    pub output: PathBuf,
    /// Directory with `tokenizer.json` and its configuration, or that file.
    pub tokenizer: PathBuf,
    /// Column of text in the input, `content` in RefinedWeb.
    pub column: String,
    /// Whether EOT is written after each document; auto: yes.
    pub append_eot: Auto3,
    /// Whether BOS is written before each document; auto: as the tokenizer's configuration says.
    pub prepend_bos: Auto3,
    /// Exactly so many documents, chosen by their hash, go to `heldout.json`; 0 writes none.
    pub heldout: u64,
    /// Threads that tokenize; 0 takes one per core.
    pub threads: usize,
}

/// What `supra data tokenize` did.
#[derive(Debug, Clone)]
pub struct Tokenized {
    /// The dataset.
    pub manifest: Manifest,
    /// Files tokenized now.
    pub written: usize,
    /// Files that an earlier call had finished.
    pub skipped: usize,
}

/// Tokenizes text parquet and writes the dataset manifest. A file gets its name when it is complete; called again, only
/// files that are missing, or whose input or tokenizer changed, are made.
///
/// # Errors
/// For input that is missing, damaged or without the text column; for output files of other origin in the directory;
/// when another call works on the same directory.
pub fn tokenize(
    options: &TokenizeOptions,
    progress: &dyn Progress,
) -> Result<Tokenized, DataError> {
    let tokenizer = TextTokenizer::load(&options.tokenizer)?;
    let marks = Marks::resolve(&tokenizer, options.append_eot, options.prepend_bos)?;
    let inputs = inputs(&options.input)?;
    let output = &options.output;
    fs::create_dir_all(output).map_err(DataError::io("create directory", output))?;
    let _lock = lock(output)?;
    clean(output, &inputs)?;

    let threads = parallel::threads(options.threads);
    let job = Job {
        tokenizer: &tokenizer,
        marks,
        column: &options.column,
        threads,
        progress,
    };
    let tasks = job.tasks(&inputs, output)?;
    let rows = tasks
        .iter()
        .filter(|task| !task.finished)
        .map(|task| task.rows)
        .sum();
    progress.begin(tasks.len(), rows);
    for task in &tasks {
        if !task.finished {
            job.run(task)?;
        }
        progress.file_done(&task.output, task.finished);
    }
    let written = tasks.iter().filter(|task| !task.finished).count();
    let paths: Vec<_> = tasks.iter().map(|task| task.output.clone()).collect();
    let indexer = Indexer {
        directory: output,
        paths: &paths,
        column: TOKEN_COLUMN,
        tokenizer: &tokenizer,
        heldout: options.heldout,
        threads,
        progress: &(),
    };
    indexer.check_files()?;
    let layout = marks.layout(tokenizer.eot());
    let manifest = indexer.write(&layout, indexer.pass(&layout)?)?;
    manifest
        .findings()
        .iter()
        .for_each(|finding| progress.note(finding));
    Ok(Tokenized {
        manifest,
        written,
        skipped: tasks.len() - written,
    })
}

/// The tokens written around each document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Marks {
    bos: Option<u32>,
    eot: Option<u32>,
}

impl Marks {
    fn resolve(
        tokenizer: &TextTokenizer,
        append_eot: Auto3,
        prepend_bos: Auto3,
    ) -> Result<Marks, DataError> {
        let prepend = match prepend_bos {
            Auto3::Never => false,
            Auto3::Always => true,
            Auto3::Auto => tokenizer.adds_bos(),
        };
        if prepend && tokenizer.bos().is_none() {
            let remedy =
                "name it in tokenizer_config.json (bos_token), or pass --prepend-bos never";
            let cause = "no file beside it names a token that begins a document";
            return Err(DataError::content(tokenizer.path(), cause, remedy));
        }
        let eot = (append_eot != Auto3::Never).then(|| tokenizer.eot());
        Ok(Marks {
            bos: tokenizer.bos().filter(|_| prepend),
            eot,
        })
    }

    /// How the files written here are read: marks are in the rows, so the reader adds none.
    fn layout(self, eot: u32) -> Layout {
        let written = |name, mark: Option<u32>| match mark {
            Some(token) => format!("{name}: written into every row ({token})"),
            None => format!("{name}: not written"),
        };
        Layout {
            rules: Rules {
                documents: Documents::Row,
                prepend: None,
                append: None,
                eot,
            },
            findings: vec![
                "documents: every row is one".to_owned(),
                written("append_eot", self.eot),
                written("prepend_bos", self.bos),
            ],
        }
    }
}

/// What an output file was made from; equal origins give equal files, on any machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Origin {
    version: u32,
    /// BLAKE3 of the input file, in hexadecimal.
    input: String,
    column: String,
    /// BLAKE3 of `tokenizer.json`, in hexadecimal.
    tokenizer: String,
    marks: Marks,
}

/// One input file and its output.
struct Task {
    input: PathBuf,
    output: PathBuf,
    rows: u64,
    finished: bool,
}

struct Job<'a> {
    tokenizer: &'a TextTokenizer,
    marks: Marks,
    column: &'a str,
    threads: usize,
    progress: &'a dyn Progress,
}

impl Job<'_> {
    /// Looks at every input before the long work, and which outputs are finished.
    fn tasks(
        &self,
        inputs: &BTreeMap<String, PathBuf>,
        directory: &Path,
    ) -> Result<Vec<Task>, DataError> {
        let inputs: Vec<_> = inputs.iter().collect();
        parallel::in_order(inputs.len(), self.threads, |number| {
            let (name, input) = inputs[number];
            let rows = self.open(input)?.rows();
            let output = directory.join(name);
            let finished = match origin_of(&output) {
                Some(found) => found == self.origin(input)?,
                None => false,
            };
            Ok(Task {
                input: input.clone(),
                output,
                rows,
                finished,
            })
        })
    }

    /// What a file made from `input` now would be made from.
    fn origin(&self, input: &Path) -> Result<Origin, DataError> {
        Ok(Origin {
            version: 1,
            input: files::hash_file(input)?.to_hex().to_string(),
            column: self.column.to_owned(),
            tokenizer: self.tokenizer.hash().to_owned(),
            marks: self.marks,
        })
    }

    fn open(&self, path: &Path) -> Result<ColumnFile, DataError> {
        let file = ColumnFile::open(path, self.column)?;
        match file.data_type() {
            DataType::Utf8 => Ok(file),
            other => {
                let cause = format!("column {:?} is {other}, not text", self.column);
                let remedy = "name the column of text with --column, or write this one as strings";
                Err(DataError::content(path, cause, remedy))
            }
        }
    }

    fn run(&self, task: &Task) -> Result<(), DataError> {
        let input = self.open(&task.input)?;
        let partial = files::partial_path(&task.output);
        let origin = serde_json::to_string(&self.origin(&task.input)?)
            .expect("invariant: an origin holds only strings and numbers");
        let mut writer = TokenWriter::create(
            &partial,
            TOKEN_COLUMN,
            KeyValue::new(ORIGIN.to_owned(), origin),
        )?;
        for group in 0..input.row_groups() {
            let mut first_row = 0;
            for array in input.batches(group, DOCUMENTS * self.threads.min(16))? {
                let array = array?;
                let texts = texts(&array, &task.input, group, first_row)?;
                let mut tokens = 0;
                for share in self.encode(texts)? {
                    for row in share.bounds.windows(2) {
                        writer.push(&share.tokens[row[0]..row[1]])?;
                    }
                    tokens += share.tokens.len() as u64;
                }
                first_row += array.len();
                self.progress.advance(array.len() as u64, tokens);
            }
        }
        let file = writer.finish()?;
        files::publish(&file, &partial, &task.output)
    }

    /// The tokens of `texts`, in order, made on all threads.
    fn encode(&self, texts: &StringArray) -> Result<Vec<Share>, DataError> {
        parallel::in_order(texts.len().div_ceil(SHARE), self.threads, |number| {
            let mut share = Share {
                tokens: Vec::new(),
                bounds: vec![0],
            };
            for document in number * SHARE..texts.len().min((number + 1) * SHARE) {
                share.tokens.extend(self.marks.bos);
                self.tokenizer
                    .encode(texts.value(document), &mut share.tokens)?;
                share.tokens.extend(self.marks.eot);
                share.bounds.push(share.tokens.len());
            }
            Ok(share)
        })
    }
}

/// Some tokenized documents, one after the other.
struct Share {
    tokens: Vec<u32>,
    /// Where documents begin and end, from 0 to `tokens.len()`.
    bounds: Vec<usize>,
}

fn texts<'a>(
    array: &'a ArrayRef,
    path: &Path,
    group: usize,
    first_row: usize,
) -> Result<&'a StringArray, DataError> {
    let texts = array.as_string_opt::<i32>();
    let texts = texts.ok_or_else(|| {
        DataError::content(
            path,
            format!("row group {group} holds no text"),
            "check --column",
        )
    })?;
    match (0..texts.len())
        .find(|row| texts.is_null(*row))
        .filter(|_| texts.null_count() > 0)
    {
        None => Ok(texts),
        Some(row) => {
            let cause = format!(
                "row group {group}, row {}: the text is null",
                first_row + row
            );
            Err(DataError::content(
                path,
                cause,
                "remove the row, or write an empty text",
            ))
        }
    }
}

/// What the file at `path` says it was made from; nothing when it is absent, damaged or says nothing.
fn origin_of(path: &Path) -> Option<Origin> {
    let file = ColumnFile::open(path, TOKEN_COLUMN).ok()?;
    let entries = file.metadata().file_metadata().key_value_metadata()?;
    let entry = entries.iter().find(|entry| entry.key == ORIGIN)?;
    serde_json::from_str(entry.value.as_deref()?).ok()
}
