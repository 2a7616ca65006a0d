//! The row groups of token parquet: fetches stretches of the stream.
//!
//! The first visit decodes a row group as a whole and checks it against the manifest. It leaves behind where the pieces of
//! the stream lie in the file and a checksum of each, so that later visits decode, and check, only pieces that are wanted.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use crate::manifest::{Content, RowGroup};
use crate::pages::Chart;
use crate::rows::Extent;
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

/// Some rows of a row group, about a page, and the state in which they are met.
struct Piece {
    extent: Extent,
    /// Its tokens in the row group's part of the stream.
    tokens: Range<u64>,
    /// Whether its first token continues a document.
    continues: bool,
    /// Number of the document that the token before belongs to.
    document: u32,
}

/// What the first visit to a row group leaves behind.
struct Visited {
    chart: Chart,
    /// Pieces that add tokens, in order, and their checksums.
    pieces: Vec<(Piece, blake3::Hash)>,
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
    /// By number of the place.
    visited: HashMap<usize, Visited>,
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
            visited: HashMap::new(),
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
                self.visit(manifest, number, &mut stretches[first..first + met])?;
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

    /// Appends to `stretches` what row group `number` has of them: from the cache if it lies there.
    fn visit(
        &mut self,
        manifest: &Manifest,
        number: usize,
        stretches: &mut [Stretch],
    ) -> Result<(), DataError> {
        let place = &self.places[number];
        if let Some(known) = self
            .cache
            .iter()
            .position(|decoded| decoded.place == number)
        {
            let decoded = self
                .cache
                .remove(known)
                .expect("invariant: the position was just found");
            decoded.copy_to(place.tokens.start, stretches);
            self.keep(decoded);
            return Ok(());
        }
        if let Some(visited) = self.visited.get(&number) {
            return visited.copy_to(manifest, place, &self.rules, stretches);
        }
        let size = place.tokens.end - place.tokens.start;
        // Row groups too large to keep several of them are streamed.
        let mut decoded = (size <= self.cache_tokens / 4).then(|| Decoded {
            place: number,
            tokens: Vec::with_capacity(size as usize),
            starts: Vec::new(),
        });
        let mut pieces = Vec::new();
        let chart = stream(manifest, place, &self.rules, |piece, chunk| {
            append_all(stretches, place.tokens.start + piece.tokens.start, chunk);
            if let Some(decoded) = &mut decoded {
                decoded.append(chunk);
            }
            if !chunk.tokens.is_empty() {
                pieces.push((piece, chunk.checksum()));
            }
        })?;
        self.visited.insert(number, Visited { chart, pieces });
        if let Some(decoded) = decoded {
            self.keep(decoded);
        }
        Ok(())
    }

    /// Puts a row group into the cache; the oldest ones make room.
    fn keep(&mut self, decoded: Decoded) {
        self.cache.push_back(decoded);
        let kept = self.cache.iter();
        let mut kept: u64 = kept.map(|decoded| decoded.tokens.len() as u64).sum();
        while kept > self.cache_tokens {
            let Some(oldest) = self.cache.pop_front() else {
                break;
            };
            kept -= oldest.tokens.len() as u64;
        }
    }
}

impl Decoded {
    fn append(&mut self, chunk: Chunk<'_>) {
        let here = self.tokens.len() as u32;
        self.starts
            .extend(chunk.starts.iter().map(|start| here + start));
        self.tokens.extend_from_slice(chunk.tokens);
    }

    fn copy_to(&self, first: u64, stretches: &mut [Stretch]) {
        let chunk = Chunk {
            tokens: &self.tokens,
            starts: &self.starts,
        };
        append_all(stretches, first, chunk);
    }
}

impl Visited {
    /// Decodes the pieces that `stretches` meet, and checks them against the first visit.
    fn copy_to(
        &self,
        manifest: &Manifest,
        place: &Place,
        rules: &Rules,
        stretches: &mut [Stretch],
    ) -> Result<(), DataError> {
        let (file, expected) = open(manifest, place)?;
        let group = expected.number as usize;
        let first = place.tokens.start;
        for (piece, checksum) in &self.pieces {
            let (start, end) = (first + piece.tokens.start, first + piece.tokens.end);
            let wanted = |stretch: &Stretch| stretch.range.start < end && start < stretch.range.end;
            if !stretches.iter().any(wanted) {
                continue;
            }
            let mut assembler = Assembler::new(*rules, piece.continues);
            let mut sieve = Sieve::after(&expected.selection, piece.document);
            let mut unchanged = false;
            file.rows(group, &self.chart, &piece.extent, |rows| {
                let chunk = sieve.select(assembler.assemble(rows));
                unchanged = chunk.checksum() == *checksum;
                append_all(stretches, start, chunk);
            })?;
            if !unchanged {
                let cause = format!("row group {group} changed since it was first read");
                return Err(DataError::changed(file.file().path(), cause));
            }
        }
        Ok(())
    }
}

/// Appends what `chunk`, which begins at `first` of the stream, has of each stretch.
fn append_all(stretches: &mut [Stretch], first: u64, chunk: Chunk<'_>) {
    stretches
        .iter_mut()
        .for_each(|stretch| stretch.append(first, chunk));
}

/// The file of the row group at `place`, and what the manifest says of the row group.
fn open<'a>(manifest: &'a Manifest, place: &Place) -> Result<(TokenFile, &'a RowGroup), DataError> {
    let content: &Content = manifest.content();
    let listed = &content.files[place.file];
    let expected = &listed.row_groups[place.group];
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
    Ok((file, expected))
}

/// Decodes the row group at `place` and checks it against the manifest; an error comes after the last piece.
fn stream(
    manifest: &Manifest,
    place: &Place,
    rules: &Rules,
    mut sink: impl FnMut(Piece, Chunk<'_>),
) -> Result<Chart, DataError> {
    let (file, expected) = open(manifest, place)?;
    let group = expected.number as usize;
    let mut assembler = Assembler::new(*rules, expected.continues);
    let mut sieve = Sieve::new(&expected.selection);
    let mut checksum = Checksum::default();
    let chart = file.chart(group, |rows, extent| {
        let (continues, document) = (!assembler.at_start(), sieve.document());
        let chunk = sieve.select(assembler.assemble(rows));
        let first = checksum.tokens();
        checksum.update(chunk);
        let piece = Piece {
            extent,
            tokens: first..checksum.tokens(),
            continues,
            document,
        };
        sink(piece, chunk);
        true
    })?;
    // The checksum is of what is there: it does not say that the manifest counts right.
    let tokens = checksum.tokens();
    if tokens != expected.tokens {
        return Err(DataError::changed(
            file.file().path(),
            format!(
                "row group {group} has {tokens} tokens, and {} in the manifest",
                expected.tokens
            ),
        ));
    }
    if checksum.finish() != expected.checksum {
        return Err(DataError::changed(
            file.file().path(),
            format!("row group {group} does not have the checksum in the manifest"),
        ));
    }
    Ok(chart)
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
