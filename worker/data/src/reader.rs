//! Random access to the windows of the packed stream.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use crate::groups::Groups;
use crate::manifest::Store;
use crate::packed::PackedStore;
use crate::{DataError, Manifest, files};

/// Tokens fetched around a window that nothing announced.
const STRETCH_TOKENS: u64 = 1 << 20;

/// Reads windows of the packed stream. Every row group is checked against the manifest whenever it is decoded.
///
/// [`Reader::hold`] fetches the windows of a pool with one decode per row group; any other window fetches some of its
/// neighbours with it. Decoded row groups are kept as long as they fit into a cache.
pub struct Reader {
    manifest: Manifest,
    sequence_length: u64,
    source: Source,
}

enum Source {
    Parquet(Groups),
    Packed(PackedStore),
}

impl Reader {
    /// Opens the dataset at `manifest` (a JSON file, or a directory with `dataset.json`) for windows of
    /// `sequence_length` inputs.
    ///
    /// # Errors
    /// When the files beside it are not the ones it lists, by name and size, or hold less than one window.
    pub fn open(manifest: &Path, sequence_length: u64) -> Result<Reader, DataError> {
        let manifest = Manifest::load(manifest)?;
        if sequence_length == 0 {
            return Err(DataError::Request(
                "a window must hold at least one token: the sequence length is 0".to_owned(),
            ));
        }
        check_files(&manifest)?;
        if manifest.windows(sequence_length) == 0 {
            let cause = format!(
                "holds {} tokens, one window takes {}",
                manifest.tokens(),
                sequence_length.saturating_add(1)
            );
            let remedy = "add data, or choose a smaller sequence length";
            return Err(DataError::content(manifest.path(), cause, remedy));
        }
        let source = match manifest.content().store {
            Store::Parquet => Source::Parquet(Groups::new(&manifest)),
            Store::Packed { token_bytes } => {
                Source::Packed(PackedStore::open(&manifest, token_bytes)?)
            }
        };
        Ok(Reader {
            manifest,
            sequence_length,
            source,
        })
    }

    /// Keeps decoded row groups of `tokens` tokens in all (4 bytes each); 64 Mi unless said. A row group larger than a
    /// quarter of that is not kept, and not held in memory as a whole.
    pub fn with_cache(mut self, tokens: u64) -> Reader {
        if let Source::Parquet(groups) = &mut self.source {
            groups.cache_tokens = tokens;
        }
        self
    }

    /// The dataset.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Inputs per window.
    pub fn sequence_length(&self) -> u64 {
        self.sequence_length
    }

    /// Windows of the dataset.
    pub fn windows(&self) -> u64 {
        self.manifest.windows(self.sequence_length)
    }

    /// Window `w`: its `sequence_length + 1` tokens, and the ascending positions in them at which documents begin.
    ///
    /// # Errors
    /// Past the last window; when a file cannot be read or has changed.
    pub fn window(&mut self, w: u64) -> Result<(Vec<u32>, Vec<u32>), DataError> {
        let windows = self.windows();
        if w >= windows {
            let message = format!(
                "{}: there is no window {w}, it has {windows}",
                self.manifest.path().display()
            );
            return Err(DataError::Request(message));
        }
        let tokens = self.tokens_of(w..w + 1);
        match &mut self.source {
            Source::Packed(store) => store.read(&self.manifest, tokens),
            Source::Parquet(groups) => {
                if groups.find(&tokens).is_none() {
                    let neighbours = (STRETCH_TOKENS / self.sequence_length).max(1);
                    let first = w / neighbours * neighbours;
                    let last = (first + neighbours).min(windows);
                    let around = first * self.sequence_length..last * self.sequence_length + 1;
                    groups.recent = groups.fetch(&self.manifest, &[around])?;
                }
                let stretch = groups
                    .find(&tokens)
                    .expect("invariant: the stretch around the window was just fetched");
                Ok(stretch.cut(&tokens))
            }
        }
    }

    /// Fetches the windows of `blocks` and keeps them until the next call, decoding every row group once.
    ///
    /// # Errors
    /// As [`Reader::window`].
    pub fn hold(&mut self, blocks: &[Range<u64>]) -> Result<(), DataError> {
        let mut ranges: Vec<_> = blocks
            .iter()
            .map(|block| self.tokens_of(block.clone()))
            .collect();
        ranges.sort_by_key(|range| range.start);
        if ranges
            .iter()
            .any(|range| range.end > self.manifest.tokens())
        {
            let message = format!(
                "{}: asked to hold windows past its last",
                self.manifest.path().display()
            );
            return Err(DataError::Request(message));
        }
        if let Source::Parquet(groups) = &mut self.source {
            // The old pool goes first: two never lie in memory together.
            groups.held = Vec::new();
            groups.held = groups.fetch(&self.manifest, &ranges)?;
        }
        Ok(())
    }

    /// The tokens of consecutive windows, the last target included.
    fn tokens_of(&self, windows: Range<u64>) -> Range<u64> {
        let first = windows.start.saturating_mul(self.sequence_length);
        let last = windows.end.saturating_mul(self.sequence_length);
        first..last.saturating_add(1)
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Reader({:?}, {} tokens per window)",
            self.manifest, self.sequence_length
        )
    }
}

/// The files beside the manifest are the ones it lists, by name and size.
fn check_files(manifest: &Manifest) -> Result<(), DataError> {
    let directory = manifest.directory();
    let known = &manifest.content().files;
    for file in known {
        let path = directory.join(&file.name);
        let found = std::fs::metadata(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => DataError::changed(&path, "is missing"),
            _ => DataError::io("read", &path)(error),
        })?;
        if found.len() != file.bytes {
            let cause = format!(
                "has {} bytes, the manifest says {}",
                found.len(),
                file.bytes
            );
            return Err(DataError::changed(&path, cause));
        }
    }
    for path in files::parquet_files(files::parent(manifest.path()))? {
        if !known.iter().any(|file| {
            path.file_name()
                .is_some_and(|name| name == file.name.as_str())
        }) {
            return Err(DataError::changed(
                &path,
                format!("is not in {}", manifest.path().display()),
            ));
        }
    }
    Ok(())
}
