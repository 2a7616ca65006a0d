//! `supra data pack`: writes the packed stream flat, for full shuffles and top speed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::groups::stream_all;
use crate::manifest::{Content, DATASET, DataFile, RowGroup, Selection, Store, Totals};
use crate::packed::{CHUNK, STARTS, TOKENS};
use crate::stream::{Checksum, Chunk};
use crate::{DataError, Manifest, Progress, files};

/// What `supra data pack` is asked to do.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// The dataset to pack: a manifest, or the directory of `dataset.json`.
    pub dataset: PathBuf,
    /// Directory for `tokens.bin`, `starts.bin` and their `dataset.json`; created when absent.
    pub output: PathBuf,
}

/// Writes the packed stream of a dataset as a flat store: tokens as u16 LE (u32 LE when the vocabulary needs it), and
/// the positions of document starts as u64 LE. The store is a dataset like any other, with a manifest of its own.
///
/// # Errors
/// When the dataset cannot be read, is packed already, or lies in the output directory.
pub fn pack(options: &PackOptions, progress: &dyn Progress) -> Result<Manifest, DataError> {
    let source = Manifest::load(&options.dataset)?;
    let output = &options.output;
    if source.content().store != Store::Parquet {
        return Err(DataError::content(
            source.path(),
            "is packed already",
            "read it as it is",
        ));
    }
    fs::create_dir_all(output).map_err(DataError::io("create directory", output))?;
    if same_directory(output, files::parent(source.path())) {
        let message = format!(
            "{}: the packed store needs a directory of its own",
            output.display()
        );
        return Err(DataError::Request(message));
    }
    progress.begin(1, source.documents());
    let token_bytes = if source.vocabulary() <= 1 << 16 { 2 } else { 4 };
    let mut packer = Packer::create(output, token_bytes)?;
    stream_all(&source, |chunk| {
        progress.advance(chunk.starts.len() as u64, chunk.tokens.len() as u64);
        packer.write(chunk)
    })?;
    let files = packer.finish()?;
    let content = Content {
        store: Store::Packed { token_bytes },
        append_eot: false,
        prepend_bos: false,
        totals: Totals::default(),
        files,
        ..source.content().clone()
    };
    Manifest::write(content, output.join(DATASET))
}

fn same_directory(one: &Path, other: &Path) -> bool {
    matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

/// A file under way, hashed as it is written.
struct Output {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Output {
    fn create(path: PathBuf) -> Result<Output, DataError> {
        let partial = files::partial_path(&path);
        let file = File::create(&partial).map_err(DataError::io("create", &partial))?;
        Ok(Output {
            path,
            partial,
            file: BufWriter::with_capacity(1 << 20, file),
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file
            .write_all(bytes)
            .map_err(DataError::io("write", &self.partial))
    }

    fn finish(self, row_groups: Vec<RowGroup>) -> Result<DataFile, DataError> {
        let file = self
            .file
            .into_inner()
            .map_err(|error| DataError::io("write", &self.partial)(error.into_error()))?;
        files::publish(&file, &self.partial, &self.path)?;
        let blake3 = self.hasher.finalize().to_hex().to_string();
        Ok(DataFile {
            name: files::name_of(&self.path)?,
            bytes: self.bytes,
            blake3,
            row_groups,
        })
    }
}

/// Cuts the stream into chunks and writes it.
struct Packer {
    tokens: Output,
    starts: Output,
    token_bytes: u8,
    checksum: Checksum,
    chunks: Vec<RowGroup>,
    buffer: Vec<u8>,
}

impl Packer {
    fn create(directory: &Path, token_bytes: u8) -> Result<Packer, DataError> {
        Ok(Packer {
            tokens: Output::create(directory.join(TOKENS))?,
            starts: Output::create(directory.join(STARTS))?,
            token_bytes,
            checksum: Checksum::default(),
            chunks: Vec::new(),
            buffer: Vec::new(),
        })
    }

    fn write(&mut self, chunk: Chunk<'_>) -> Result<(), DataError> {
        let first = self.tokens.bytes / u64::from(self.token_bytes);
        self.buffer.clear();
        self.buffer.extend(
            chunk
                .starts
                .iter()
                .flat_map(|start| (first + u64::from(*start)).to_le_bytes()),
        );
        self.starts.write(&self.buffer)?;
        self.buffer.clear();
        match self.token_bytes {
            2 => self.buffer.extend(
                chunk
                    .tokens
                    .iter()
                    .flat_map(|token| (*token as u16).to_le_bytes()),
            ),
            _ => self
                .buffer
                .extend(chunk.tokens.iter().flat_map(|token| token.to_le_bytes())),
        }
        self.tokens.write(&self.buffer)?;
        self.count(chunk);
        Ok(())
    }

    /// Adds `chunk` to the checksums, which are taken over `CHUNK` tokens each.
    fn count(&mut self, chunk: Chunk<'_>) {
        let (mut from, mut starts_from) = (0, 0);
        while from < chunk.tokens.len() {
            let room = (CHUNK - self.checksum.tokens()) as usize;
            let to = chunk.tokens.len().min(from + room);
            let starts_to = chunk.starts.partition_point(|start| (*start as usize) < to);
            let starts: Vec<u32> = chunk.starts[starts_from..starts_to]
                .iter()
                .map(|start| start - from as u32)
                .collect();
            self.checksum.update(Chunk {
                tokens: &chunk.tokens[from..to],
                starts: &starts,
            });
            (from, starts_from) = (to, starts_to);
            if self.checksum.tokens() == CHUNK {
                self.end_chunk();
            }
        }
    }

    fn end_chunk(&mut self) {
        let checksum = std::mem::take(&mut self.checksum);
        self.chunks.push(RowGroup {
            number: self.chunks.len() as u32,
            rows: checksum.documents(),
            first_token: 0,
            tokens: checksum.tokens(),
            documents: checksum.documents(),
            continues: false,
            selection: Selection::All,
            checksum: checksum.finish(),
        });
    }

    fn finish(mut self) -> Result<Vec<DataFile>, DataError> {
        if self.checksum.tokens() > 0 {
            self.end_chunk();
        }
        Ok(vec![
            self.tokens.finish(self.chunks)?,
            self.starts.finish(Vec::new())?,
        ])
    }
}
