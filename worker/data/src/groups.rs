//! The row groups of token parquet: fetches stretches of the stream, decoding and checking each row group once.

use std::collections::VecDeque;
use std::ops::Range;

use crate::manifest::{Content, RowGroup};
use crate::scan::TokenFile;
use crate::stream::{Assembler, Checksum, Chunk, Rules, Sieve};
use crate::{DataError, Manifest};

/// Tokens of decoded row groups that are kept unless said: 256 MiB.
const CACHE_TOKENS: u64 = 1 << 26;

/// A row group in the stream.
struct Place {
    file: usize,
    /// Index into the file's listed row groups.
    group: usize,
    /// Its tokens in the stream.
    tokens: Range<u64>,
}

/// A decoded row group.
struct Decoded {
    place: usize,
    tokens: Vec<u32>,
    /// Ascending positions in `tokens`.
    starts: Vec<u32>,
}

/// Consecutive tokens of the stream.
pub(crate) struct Stretch {
    range: Range<u64>,
    tokens: Vec<u32>,
    /// Ascending positions in `tokens`.
    starts: Vec<u32>,
}

impl Stretch {
    fn new(range: Range<u64>) -> Stretch {
        let tokens = Vec::with_capacity((range.end - range.start) as usize);
        Stretch {
            range,
            tokens,
            starts: Vec::new(),
        }
    }

    /// Appends the part of `chunk`, which begins at `first` of the stream, that belongs here. Chunks come in order.
    fn append(&mut self, first: u64, chunk: Chunk<'_>) {
        let length = chunk.tokens.len() as u64;
        let from = self.range.start.saturating_sub(first).min(length) as usize;
        let to = self.range.end.saturating_sub(first).min(length) as usize;
        if from >= to {
            return;
        }
        let here = self.tokens.len() as u32;
        let starts = &chunk.starts[chunk
            .starts
            .partition_point(|start| (*start as usize) < from)..];
        let inside = starts.iter().take_while(|start| (**start as usize) < to);
        self.starts
            .extend(inside.map(|start| here + start - from as u32));
        self.tokens.extend_from_slice(&chunk.tokens[from..to]);
    }

    /// The tokens of `range`, which lies inside, and the document starts among them.
    pub(crate) fn cut(&self, range: &Range<u64>) -> (Vec<u32>, Vec<u32>) {
        let first = (range.start - self.range.start) as usize;
        let end = (range.end - self.range.start) as usize;
        let starts = &self.starts[self
            .starts
            .partition_point(|start| (*start as usize) < first)..];
        let starts = starts
            .iter()
            .take_while(|start| (**start as usize) < end)
            .map(|start| start - first as u32);
        (self.tokens[first..end].to_vec(), starts.collect())
    }
}

/// The row groups of token parquet.
pub(crate) struct Groups {
    places: Vec<Place>,
    rules: Rules,
    /// The pool.
    pub held: Vec<Stretch>,
    /// Around the last window that was not in the pool.
    pub recent: Vec<Stretch>,
    /// Whole row groups, the most recently used last, and how many tokens they may hold in all.
    cache: VecDeque<Decoded>,
    pub cache_tokens: u64,
}

impl Groups {
    pub(crate) fn new(manifest: &Manifest) -> Groups {
        let mut places = Vec::new();
        for (file, listed) in manifest.content().files.iter().enumerate() {
            for (group, row_group) in listed.row_groups.iter().enumerate() {
                let first = row_group.first_token;
                places.push(Place {
                    file,
                    group,
                    tokens: first..first + row_group.tokens,
                });
            }
        }
        let rules = Rules::of(manifest.content());
        Groups {
            places,
            rules,
            held: Vec::new(),
            recent: Vec::new(),
            cache: VecDeque::new(),
            cache_tokens: CACHE_TOKENS,
        }
    }

    /// The stretch that holds all of `tokens`.
    pub(crate) fn find(&self, tokens: &Range<u64>) -> Option<&Stretch> {
        let inside = |stretch: &&Stretch| {
            stretch.range.start <= tokens.start && tokens.end <= stretch.range.end
        };
        let before = self
            .held
            .partition_point(|stretch| stretch.range.start <= tokens.start);
        self.held[..before]
            .last()
            .filter(inside)
            .or_else(|| self.recent.iter().find(inside))
    }

    /// Fetches `ranges`, ascending, visiting every row group once.
    pub(crate) fn fetch(
        &mut self,
        manifest: &Manifest,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Stretch>, DataError> {
        let mut stretches: Vec<_> = ranges.iter().cloned().map(Stretch::new).collect();
        let mut number = 0;
        while let Some(place) = self.places.get(number) {
            let tokens = place.tokens.clone();
            // Ranges ascend and hardly overlap, so those that a row group meets stand together.
            let first = stretches.partition_point(|stretch| stretch.range.end <= tokens.start);
            let met = stretches[first..]
                .iter()
                .take_while(|stretch| stretch.range.start < tokens.end)
                .count();
            if met > 0 {
                let met = &mut stretches[first..first + met];
                self.visit(manifest, number, |offset, chunk| {
                    met.iter_mut()
                        .for_each(|stretch| stretch.append(tokens.start + offset, chunk));
                })?;
                number += 1;
            } else if let Some(next) = stretches.get(first) {
                number = self
                    .places
                    .partition_point(|place| place.tokens.end <= next.range.start);
            } else {
                break;
            }
        }
        Ok(stretches)
    }

    /// Hands on the stream of row group `number`, from the cache if it lies there, with offsets into the row group.
    fn visit(
        &mut self,
        manifest: &Manifest,
        number: usize,
        mut sink: impl FnMut(u64, Chunk<'_>),
    ) -> Result<(), DataError> {
        let place = &self.places[number];
        let size = place.tokens.end - place.tokens.start;
        // Row groups too large to keep several of them are streamed.
        if size > self.cache_tokens / 4 {
            return stream(manifest, place, &self.rules, sink);
        }
        let decoded = match self
            .cache
            .iter()
            .position(|decoded| decoded.place == number)
        {
            Some(known) => self
                .cache
                .remove(known)
                .expect("invariant: the position was just found"),
            None => {
                let mut decoded = Decoded {
                    place: number,
                    tokens: Vec::with_capacity(size as usize),
                    starts: Vec::new(),
                };
                stream(manifest, place, &self.rules, |offset, chunk| {
                    decoded
                        .starts
                        .extend(chunk.starts.iter().map(|start| offset as u32 + start));
                    decoded.tokens.extend_from_slice(chunk.tokens);
                })?;
                decoded
            }
        };
        sink(
            0,
            Chunk {
                tokens: &decoded.tokens,
                starts: &decoded.starts,
            },
        );
        self.cache.push_back(decoded);
        let mut kept: u64 = self
            .cache
            .iter()
            .map(|decoded| decoded.tokens.len() as u64)
            .sum();
        while kept > self.cache_tokens {
            let Some(oldest) = self.cache.pop_front() else {
                break;
            };
            kept -= oldest.tokens.len() as u64;
        }
        Ok(())
    }
}

/// Decodes the row group at `place` and checks it against the manifest; an error comes after the last chunk.
fn stream(
    manifest: &Manifest,
    place: &Place,
    rules: &Rules,
    mut sink: impl FnMut(u64, Chunk<'_>),
) -> Result<(), DataError> {
    let content: &Content = manifest.content();
    let listed = &content.files[place.file];
    let expected: &RowGroup = &listed.row_groups[place.group];
    let path = manifest.directory().join(&listed.name);
    let group = expected.number as usize;
    let file = TokenFile::open(&path, &content.column, content.vocabulary)?;
    if group >= file.file().row_groups() || file.file().group_rows(group) != expected.rows {
        let cause = format!(
            "row group {group} does not have the {} rows that the manifest lists",
            expected.rows
        );
        return Err(DataError::changed(&path, cause));
    }
    let mut assembler = Assembler::new(*rules, expected.continues);
    let mut sieve = Sieve::new(&expected.selection);
    let mut checksum = Checksum::default();
    file.scan(group, |rows| {
        let chunk = sieve.select(assembler.assemble(rows));
        sink(checksum.tokens(), chunk);
        checksum.update(chunk);
        true
    })?;
    if checksum.finish() != expected.checksum {
        return Err(DataError::changed(
            &path,
            format!("row group {group} does not have the checksum in the manifest"),
        ));
    }
    Ok(())
}

/// The whole stream of a parquet dataset in order, checked.
pub(crate) fn stream_all(
    manifest: &Manifest,
    mut sink: impl FnMut(Chunk<'_>) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let groups = Groups::new(manifest);
    for place in &groups.places {
        let mut outcome = Ok(());
        stream(manifest, place, &groups.rules, |_, chunk| {
            if outcome.is_ok() {
                outcome = sink(chunk);
            }
        })?;
        outcome?;
    }
    Ok(())
}
