//! `supra data`: tokenize, index, inspect and pack training data, and measure how fast it is read.

mod bench;

use std::fmt::Display;
use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use supra_data::{
    At, Auto3, DataError, Documents, IndexOptions, InspectOptions, Manifest, PackOptions, Progress,
    TokenizeOptions,
};
use supra_recipes::Recipe;

use super::failure::{Exit, Failure, chain};
use super::format::{self, Table};
use super::out;
use super::runs::Json;

/// `supra data`'s commands.
#[derive(Subcommand, Debug)]
pub enum Data {
    /// Turn text parquet into token parquet, one file per input file, with a dataset manifest;
    /// an interrupted call goes on where it stopped
    Tokenize(Tokenize),
    /// Make the dataset manifest of token parquet that others wrote
    Index(Index),
    /// Show a window of the training data, decoded, with its document boundaries
    Inspect(Inspect),
    /// Write a dataset as one flat packed store: faster to read than compressed parquet
    Pack(Pack),
    /// Time how fast the samples of a run are read here, in one thread
    Bench(bench::Bench),
}

/// Arguments of `supra data tokenize`.
#[derive(Args, Debug)]
pub struct Tokenize {
    /// Text parquet: files, or directories of which every *.parquet is taken
    #[arg(value_name = "INPUT", required = true)]
    input: Vec<PathBuf>,
    /// Directory for the token parquet and its manifest; made when absent
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    /// Column of text
    #[arg(long, value_name = "NAME", default_value = "content")]
    column: String,
    /// Threads that tokenize [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    common: Common,
}

/// Arguments of `supra data index`.
#[derive(Args, Debug)]
pub struct Index {
    /// Directory of token parquet; its *.parquet are taken in the order of their names
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Column of token ids: a list of integers per row
    #[arg(long, value_name = "NAME", default_value = "input_ids")]
    column: String,
    #[command(flatten)]
    common: Common,
}

/// What tokenizing and indexing share.
#[derive(Args, Debug)]
struct Common {
    /// The tokenizer that makes or made the tokens: a directory with tokenizer.json, or that file
    #[arg(long, value_name = "PATH")]
    tokenizer: PathBuf,
    /// Add the end-of-text token after each document: auto, never or always; auto looks at the
    /// data and says what it found
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = Auto3::from_str)]
    append_eot: Auto3,
    /// Add the begin-of-text token before each document: auto, never or always
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = Auto3::from_str)]
    prepend_bos: Auto3,
    /// Documents, chosen by their hash, that are kept out of training and listed in heldout.json
    #[arg(long, value_name = "N", default_value_t = 0)]
    heldout: u64,
    #[command(flatten)]
    json: Json,
}

/// Arguments of `supra data inspect`.
#[derive(Args, Debug)]
pub struct Inspect {
    /// Dataset: a manifest, or the directory of dataset.json
    /// [default: the training data of --recipe]
    #[arg(value_name = "DATASET", required_unless_present = "recipe")]
    dataset: Option<PathBuf>,
    /// Window of the packed stream to show, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "sample")]
    window: u64,
    /// Length of a window in tokens
    #[arg(
        long,
        value_name = "TOKENS",
        default_value_t = 2048,
        conflicts_with = "recipe"
    )]
    sequence_length: u32,
    /// Sample of the run to show, counted from 0 over the whole run; needs --recipe
    #[arg(long, value_name = "N", requires = "recipe")]
    sample: Option<u64>,
    /// Recipe whose data, order and sequence length hold
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<PathBuf>,
    /// Tokenizer to decode with: a directory with tokenizer.json, or that file
    /// [default: the base of --recipe; without one token ids are shown]
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

/// Arguments of `supra data pack`.
#[derive(Args, Debug)]
pub struct Pack {
    /// Dataset: a manifest, or the directory of dataset.json
    #[arg(value_name = "DATASET")]
    dataset: PathBuf,
    /// Directory for the packed store and its manifest; made when absent
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    json: Json,
}

/// Runs a data command.
///
/// # Errors
/// Data, tokenizer or options that do not fit, each named.
pub fn run(command: Data) -> Result<Exit, Failure> {
    match command {
        Data::Tokenize(command) => tokenize(command),
        Data::Index(command) => index(command),
        Data::Inspect(command) => inspect(command),
        Data::Pack(command) => pack(&command),
        Data::Bench(command) => bench::run(&command),
    }?;
    Ok(Exit::Done)
}

fn tokenize(command: Tokenize) -> Result<(), Failure> {
    let options = TokenizeOptions {
        input: command.input,
        output: command.output,
        tokenizer: command.common.tokenizer,
        column: command.column,
        append_eot: command.common.append_eot,
        prepend_bos: command.common.prepend_bos,
        heldout: command.common.heldout,
        threads: command.threads.unwrap_or(0),
    };
    let bar = Bar::new();
    let tokenized = supra_data::tokenize(&options, &bar).map_err(failure)?;
    bar.end();
    if !command.common.json.json && tokenized.skipped > 0 {
        out::line(&format!(
            "{} files were there already, {} are new.",
            tokenized.skipped, tokenized.written
        ))?;
    }
    describe(&tokenized.manifest, command.common.json)
}

fn index(command: Index) -> Result<(), Failure> {
    let options = IndexOptions {
        dir: command.directory,
        column: command.column,
        tokenizer: command.common.tokenizer,
        append_eot: command.common.append_eot,
        prepend_bos: command.common.prepend_bos,
        heldout: command.common.heldout,
    };
    let bar = Bar::new();
    let manifest = supra_data::index(&options, &bar).map_err(failure)?;
    bar.end();
    describe(&manifest, command.common.json)
}

fn inspect(command: Inspect) -> Result<(), Failure> {
    let recipe = match &command.recipe {
        Some(path) => Some(Recipe::load(path).map_err(|error| Failure::input(error.to_string()))?),
        None => None,
    };
    // clap asks for one of the two.
    let dataset = command
        .dataset
        .or_else(|| recipe.as_ref().map(|recipe| recipe.data.train.clone()));
    let dataset = dataset.ok_or_else(|| Failure::input("name a DATASET or a --recipe."))?;
    let tokenizer = command
        .tokenizer
        .or_else(|| Some(recipe.as_ref()?.base.directory()?.to_owned()));
    let length = recipe.as_ref().map_or(command.sequence_length, |recipe| {
        recipe.batch.sequence_length
    });
    let at = match (command.sample, recipe) {
        (Some(number), Some(recipe)) => At::Sample {
            number,
            recipe: Box::new(recipe),
        },
        _ => At::Window {
            number: command.window,
            sequence_length: u64::from(length),
        },
    };
    let inspected = supra_data::inspect(&InspectOptions {
        dataset,
        tokenizer,
        at,
    })
    .map_err(failure)?;
    if command.json.json {
        out::json(&inspected)
    } else {
        out::line(inspected.to_string().trim_end())
    }
}

fn pack(command: &Pack) -> Result<(), Failure> {
    let options = PackOptions {
        dataset: command.dataset.clone(),
        output: command.output.clone(),
    };
    let bar = Bar::new();
    let manifest = supra_data::pack(&options, &bar).map_err(failure)?;
    bar.end();
    describe(&manifest, command.json)
}

fn failure(error: DataError) -> Failure {
    let message = chain(&error);
    match error {
        // The disk's fault, not the input's.
        DataError::Io {
            action: "write", ..
        } => Failure::failed(message),
        _ => Failure::input(message),
    }
}

/// Says what a dataset holds.
fn describe(manifest: &Manifest, json: Json) -> Result<(), Failure> {
    let kind = match manifest.document_kind() {
        Documents::Row => "row",
        Documents::EndOfText => "end_of_text",
    };
    if json.json {
        return out::json(&serde_json::json!({
            "manifest": manifest.path(),
            "hash": format::hex(&manifest.hash()),
            "files": manifest.files().len(),
            "documents": manifest.documents(),
            "document_kind": kind,
            "tokens": manifest.tokens(),
            "vocabulary": manifest.vocabulary(),
            "tokenizer_hash": manifest.tokenizer_hash(),
            "eot": manifest.eot(),
            "bos": manifest.bos(),
            "findings": manifest.findings(),
        }));
    }
    let mut table = Table::new(&["", ""]);
    let mut fact = |name: &str, value: String| table.row([name.to_owned(), value]);
    fact("manifest", manifest.path().display().to_string());
    fact("hash", format::hex(&manifest.hash()));
    fact("files", format::grouped(manifest.files().len() as u64));
    fact("documents", format::grouped(manifest.documents()));
    fact("tokens", format::grouped(manifest.tokens()));
    fact(
        "vocabulary",
        format::grouped(u64::from(manifest.vocabulary())),
    );
    for finding in manifest.findings() {
        fact("found", finding.clone());
    }
    out::text(&table.render())
}

/// Progress over rows on stderr: a bar on a terminal, a line per file otherwise.
struct Bar {
    bar: ProgressBar,
    plain: bool,
    tokens: AtomicU64,
}

impl Bar {
    fn new() -> Bar {
        let plain = !stderr().is_terminal();
        let target = if plain {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template("{wide_bar} {percent:>3} %\n{msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Bar {
            bar,
            plain,
            tokens: AtomicU64::new(0),
        }
    }

    fn say(&self, text: impl Display) {
        self.bar.suspend(|| out::complain(&text.to_string()));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Bar {
    fn begin(&self, files: usize, rows: u64) {
        self.bar.set_length(rows.max(1));
        if self.plain {
            self.say(format_args!(
                "{} rows in {files} files",
                format::grouped(rows)
            ));
        }
    }

    fn advance(&self, rows: u64, tokens: u64) {
        let tokens = self.tokens.fetch_add(tokens, Ordering::Relaxed) + tokens;
        self.bar.inc(rows);
        self.bar.set_message(format!(
            "{} rows  {}",
            format::grouped(self.bar.position()),
            format::tokens(tokens)
        ));
    }

    fn file_done(&self, file: &Path, skipped: bool) {
        if self.plain {
            let how = if skipped { "was done before" } else { "done" };
            self.say(format_args!("{}: {how}", file.display()));
        }
    }

    fn note(&self, message: &str) {
        self.say(message);
    }
}
