//! Reads a flat packed store: all tokens of the stream in one file, all document starts in another.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::manifest::DataFile;
use crate::mapping::Mapping;
use crate::stream::{Checksum, Chunk};
use crate::{DataError, Manifest};

/// The token file.
pub(crate) const TOKENS: &str = "tokens.bin";
/// The file of document starts: positions in the stream as u64 LE, ascending.
pub(crate) const STARTS: &str = "starts.bin";
/// Tokens per chunk, the unit of checksums; the last may be shorter.
pub(crate) const CHUNK: u64 = 1 << 20;
/// Tokens that are widened and hashed at a time: they stay in the processor's cache.
const PIECE: usize = 1 << 13;

/// A mapped packed store. A chunk is checked against the manifest when it is first read.
pub(crate) struct PackedStore {
    path: PathBuf,
    tokens: Mapping,
    starts: Mapping,
    token_bytes: u8,
    checked: Vec<bool>,
}

impl PackedStore {
    /// Maps the store of `manifest`, whose tokens take `token_bytes` bytes each. The files' sizes are checked before.
    pub(crate) fn open(manifest: &Manifest, token_bytes: u8) -> Result<PackedStore, DataError> {
        let directory = manifest.directory();
        let chunks = chunks(manifest)?;
        let expected = [
            (TOKENS, manifest.tokens().saturating_mul(token_bytes.into())),
            (
                STARTS,
                manifest.documents().saturating_mul(size_of::<u64>() as u64),
            ),
        ];
        for (name, bytes) in expected {
            if !manifest
                .content()
                .files
                .iter()
                .any(|file| file.name == name && file.bytes == bytes)
            {
                return Err(broken(
                    manifest.path(),
                    format!("does not list {name} with {bytes} bytes"),
                ));
            }
        }
        if !matches!(token_bytes, 2 | 4) {
            return Err(broken(
                manifest.path(),
                format!("gives a token {token_bytes} bytes"),
            ));
        }
        Ok(PackedStore {
            path: directory.join(TOKENS),
            tokens: Mapping::open(&directory.join(TOKENS))?,
            starts: Mapping::open(&directory.join(STARTS))?,
            token_bytes,
            checked: vec![false; chunks.row_groups.len()],
        })
    }

    /// The tokens of `range` and the positions among them at which documents begin.
    pub(crate) fn read(
        &mut self,
        manifest: &Manifest,
        range: Range<u64>,
    ) -> Result<(Vec<u32>, Vec<u32>), DataError> {
        for chunk in range.start / CHUNK..range.end.div_ceil(CHUNK) {
            self.check(manifest, chunk as usize)?;
        }
        Ok(self.copy(range))
    }

    fn copy(&self, range: Range<u64>) -> (Vec<u32>, Vec<u32>) {
        let (first, end) = (range.start as usize, range.end as usize);
        let tokens = match self.token_bytes {
            2 => self.tokens.integers::<u16>()[first..end]
                .iter()
                .map(|token| u32::from(*token))
                .collect(),
            _ => self.tokens.integers::<u32>()[first..end].to_vec(),
        };
        let starts = self.starts.integers::<u64>();
        let starts = &starts[starts.partition_point(|start| *start < range.start)..];
        let starts = starts.iter().take_while(|start| **start < range.end);
        (
            tokens,
            // Of starts that are not in order the checksum tells.
            starts
                .map(|start| start.wrapping_sub(range.start) as u32)
                .collect(),
        )
    }

    fn check(&mut self, manifest: &Manifest, chunk: usize) -> Result<(), DataError> {
        if self.checked[chunk] {
            return Ok(());
        }
        let first = chunk as u64 * CHUNK;
        let end = (first + CHUNK).min(manifest.tokens());
        let (mut checksum, mut most) = (Checksum::default(), 0);
        for piece in (first..end).step_by(PIECE) {
            let (tokens, starts) = self.copy(piece..end.min(piece + PIECE as u64));
            checksum.update(Chunk {
                tokens: &tokens,
                starts: &starts,
            });
            most = tokens.iter().fold(most, |most, token| most.max(*token));
        }
        if most >= manifest.vocabulary()
            || checksum.finish() != chunks(manifest)?.row_groups[chunk].checksum
        {
            let cause = format!("tokens from {first} on do not have the checksum in the manifest");
            return Err(DataError::changed(&self.path, cause));
        }
        self.checked[chunk] = true;
        Ok(())
    }
}

/// The entry of the token file, whose row groups are the chunks.
fn chunks(manifest: &Manifest) -> Result<&DataFile, DataError> {
    let file = manifest
        .content()
        .files
        .iter()
        .find(|file| file.name == TOKENS);
    let file = file.ok_or_else(|| broken(manifest.path(), format!("does not list {TOKENS}")))?;
    if file.row_groups.len() as u64 != manifest.tokens().div_ceil(CHUNK) {
        return Err(broken(
            manifest.path(),
            "does not list its chunks".to_owned(),
        ));
    }
    Ok(file)
}

fn broken(path: &Path, cause: String) -> DataError {
    DataError::content(path, cause, "make the store again with `supra data pack`")
}
