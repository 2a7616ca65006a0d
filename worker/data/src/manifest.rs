//! The dataset manifest: which files, row groups and documents make up the packed stream, with counts and checksums.
//!
//! `dataset.json` (and `heldout.json`) lie beside the files they describe. The manifest's hash is BLAKE3 of the file's
//! bytes; it keys the order of samples, so the same bytes give the same order everywhere.

use std::fmt;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::DataError;
use crate::files;

/// Version of the manifest format.
const FORMAT: u32 = 1;
/// File name of the manifest that trains.
pub(crate) const DATASET: &str = "dataset.json";
/// File name of the manifest of the held-out documents.
pub(crate) const HELDOUT: &str = "heldout.json";

/// What a document is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Documents {
    /// Every row is one document.
    Row,
    /// Rows are pieces of a stream in which a document ends with EOT; every file begins a document.
    EndOfText,
}

/// How the files store tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Store {
    /// Parquet with a list column of token ids.
    Parquet,
    /// One flat file of little-endian token ids and one of document starts (see [`crate::pack()`]).
    Packed {
        /// Bytes per token: 2 or 4.
        token_bytes: u8,
    },
}

/// Which documents of a row group are in the stream. Documents are numbered from 1 in the order in which they begin in
/// the row group; 0 is the rest of one that began in the row group before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Selection {
    /// Every document.
    #[default]
    All,
    /// These only, ascending.
    Only(Vec<u32>),
    /// All but these, ascending.
    Except(Vec<u32>),
}

impl Selection {
    pub(crate) fn is_all(&self) -> bool {
        *self == Selection::All
    }
}

/// A row group, or a chunk of a packed store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RowGroup {
    /// Its number in the file.
    pub number: u32,
    /// Rows in the file, selected or not.
    pub rows: u64,
    /// Position in the stream of its first token: the sum of all tokens before. Filled in by [`Manifest::write`].
    pub first_token: u64,
    /// Tokens that it adds to the stream: after selection, with the BOS and EOT that are added.
    pub tokens: u64,
    /// Documents of the stream that begin in it.
    pub documents: u64,
    /// Whether its first token continues the last document of the row group before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
    /// Its documents that are in the stream.
    #[serde(default, skip_serializing_if = "Selection::is_all")]
    pub selection: Selection,
    /// BLAKE3, in hexadecimal, of what it adds: the tokens as u32 LE, then the positions in them at which documents
    /// begin as u64 LE.
    pub checksum: String,
}

/// A data file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DataFile {
    /// Name, in the manifest's directory.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// BLAKE3 of its bytes, in hexadecimal.
    pub blake3: String,
    /// Row groups that add tokens, ascending.
    pub row_groups: Vec<RowGroup>,
}

/// The content of a manifest file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Content {
    /// Version of this format.
    pub format: u32,
    /// Version of the plan that will order the samples ([`supra_recipes::plan::VERSION`]); recorded, not checked here.
    pub plan_version: u32,
    pub store: Store,
    /// The column of token ids.
    pub column: String,
    pub documents: Documents,
    /// Whether the reader adds EOT after each document.
    pub append_eot: bool,
    /// Whether the reader adds BOS before each document.
    pub prepend_bos: bool,
    pub eot: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bos: Option<u32>,
    /// Number of token ids: every token is below it.
    pub vocabulary: u32,
    /// BLAKE3 of `tokenizer.json`, in hexadecimal.
    pub tokenizer: String,
    /// How the kind of documents, EOT and BOS were found out.
    pub findings: Vec<String>,
    /// Sums over the row groups.
    pub totals: Totals,
    pub files: Vec<DataFile>,
}

/// Sums over the row groups of a manifest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Totals {
    pub rows: u64,
    pub documents: u64,
    pub tokens: u64,
}

impl Totals {
    pub(crate) fn of(files: &[DataFile]) -> Totals {
        let mut totals = Totals::default();
        for group in files.iter().flat_map(|file| &file.row_groups) {
            totals.rows = totals.rows.saturating_add(group.rows);
            totals.documents = totals.documents.saturating_add(group.documents);
            totals.tokens = totals.tokens.saturating_add(group.tokens);
        }
        totals
    }
}

/// A row group that tokens of the stream come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Source {
    /// Name of the file, in the manifest's directory.
    pub file: String,
    /// Number of the row group in it; of the chunk, in a packed store.
    pub row_group: u32,
}

/// A dataset: files, row groups and documents in the order of the packed stream.
#[derive(Clone, PartialEq, Eq)]
pub struct Manifest {
    content: Content,
    path: PathBuf,
    hash: [u8; 32],
}

impl Manifest {
    /// Reads the manifest at `path`: a JSON file, or a directory with `dataset.json`.
    ///
    /// # Errors
    /// When there is none, or when it is not a manifest of this version.
    pub fn load(path: &Path) -> Result<Manifest, DataError> {
        let path = if path.is_dir() {
            path.join(DATASET)
        } else {
            path.to_owned()
        };
        if !path.exists() {
            return Err(DataError::content(
                &path,
                "there is no such dataset manifest",
                "make it with `supra data tokenize` or `supra data index`",
            ));
        }
        let bytes = std::fs::read(&path).map_err(DataError::io("read", &path))?;
        let content: Content = serde_json::from_slice(&bytes).map_err(|source| DataError::Json {
            path: path.clone(),
            what: "a dataset manifest; if it was made by this program, make it again with `supra data index`",
            source,
        })?;
        content.check(&path)?;
        Ok(Manifest {
            content,
            path,
            hash: *blake3::hash(&bytes).as_bytes(),
        })
    }

    /// Writes `content` to `path`, completely or not at all.
    pub(crate) fn write(mut content: Content, path: PathBuf) -> Result<Manifest, DataError> {
        let mut tokens = 0;
        for group in content
            .files
            .iter_mut()
            .flat_map(|file| &mut file.row_groups)
        {
            group.first_token = tokens;
            tokens += group.tokens;
        }
        content.totals = Totals::of(&content.files);
        content.check(&path)?;
        let mut bytes = serde_json::to_vec_pretty(&content)
            .expect("invariant: a manifest holds only strings and numbers");
        bytes.push(b'\n');
        files::write_atomically(&path, &bytes)?;
        Ok(Manifest {
            content,
            path,
            hash: *blake3::hash(&bytes).as_bytes(),
        })
    }

    /// BLAKE3 of the manifest file.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// The manifest file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the manifest and its data files.
    pub fn directory(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// Tokens of the packed stream.
    pub fn tokens(&self) -> u64 {
        self.content.totals.tokens
    }

    /// Documents of the packed stream; those without tokens do not count.
    pub fn documents(&self) -> u64 {
        self.content.totals.documents
    }

    /// What a document is.
    pub fn document_kind(&self) -> Documents {
        self.content.documents
    }

    /// Windows of `sequence_length` inputs and as many targets: `(tokens - 1) / sequence_length`.
    pub fn windows(&self, sequence_length: u64) -> u64 {
        self.tokens().saturating_sub(1) / sequence_length.max(1)
    }

    /// Number of token ids; every token is below it.
    pub fn vocabulary(&self) -> u32 {
        self.content.vocabulary
    }

    /// BLAKE3 of the `tokenizer.json` that made the tokens, in hexadecimal.
    pub fn tokenizer_hash(&self) -> &str {
        &self.content.tokenizer
    }

    /// The token that ends a document.
    pub fn eot(&self) -> u32 {
        self.content.eot
    }

    /// The token that begins a document, where the tokenizer has one.
    pub fn bos(&self) -> Option<u32> {
        self.content.bos
    }

    /// Names of the data files in the order of the stream.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &str> {
        self.content.files.iter().map(|file| file.name.as_str())
    }

    /// The row groups that these tokens of the packed stream come from, in its order.
    pub fn sources(&self, tokens: Range<u64>) -> Vec<Source> {
        let mut sources = Vec::new();
        for file in &self.content.files {
            // Row groups follow each other in the stream.
            let first = file
                .row_groups
                .partition_point(|group| group.first_token + group.tokens <= tokens.start);
            let met = file.row_groups[first..]
                .iter()
                .take_while(|group| group.first_token < tokens.end);
            sources.extend(met.map(|group| Source {
                file: file.name.clone(),
                row_group: group.number,
            }));
        }
        sources
    }

    /// How the kind of documents, EOT and BOS were found out, as sentences for the user.
    pub fn findings(&self) -> &[String] {
        &self.content.findings
    }

    pub(crate) fn content(&self) -> &Content {
        &self.content
    }
}

impl fmt::Debug for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Manifest({}, {} tokens)",
            self.path.display(),
            self.tokens()
        )
    }
}

impl Content {
    /// Refuses what this program did not write or cannot use.
    fn check(&self, path: &Path) -> Result<(), DataError> {
        let remedy = "make it again with `supra data index`";
        if self.format != FORMAT {
            let cause = format!(
                "is a manifest of format {}, this program reads format {FORMAT}",
                self.format
            );
            return Err(DataError::content(path, cause, remedy));
        }
        for file in &self.files {
            if !is_plain_name(&file.name) {
                let cause = format!(
                    "names the data file {:?}, which is not a plain file name",
                    file.name
                );
                return Err(DataError::content(path, cause, remedy));
            }
            if file
                .row_groups
                .windows(2)
                .any(|pair| pair[0].number >= pair[1].number)
            {
                let cause = format!("lists the row groups of {} out of order", file.name);
                return Err(DataError::content(path, cause, remedy));
            }
        }
        let mut tokens = 0;
        for group in self.files.iter().flat_map(|file| &file.row_groups) {
            if group.first_token != tokens {
                let cause = "its row groups do not follow one another without gaps";
                return Err(DataError::content(path, cause, remedy));
            }
            tokens = match group.first_token.checked_add(group.tokens) {
                Some(end) => end,
                None => {
                    let cause = "its row groups hold more tokens than can be counted";
                    return Err(DataError::content(path, cause, remedy));
                }
            };
        }
        if self.totals != Totals::of(&self.files) {
            let cause = "its totals are not the sums of its row groups";
            return Err(DataError::content(path, cause, remedy));
        }
        if self.totals.tokens == 0 {
            return Err(DataError::content(
                path,
                "holds no tokens",
                "give files with at least one non-empty document",
            ));
        }
        Ok(())
    }

    /// The format that this program writes.
    pub(crate) fn format() -> u32 {
        FORMAT
    }
}

/// Whether `name` is one normal path component: no separator, no `..`, not absolute.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name)
}
