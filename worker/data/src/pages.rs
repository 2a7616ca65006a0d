//! The pages of a parquet column that holds lists of integers: decoded one at a time, all of a row group or chosen ones.
//!
//! A page is the smallest piece of a column that can be decoded alone. Where pages lie is told by their own headers, so this
//! works without an index in the file. A page need not begin with a row: writers may cut rows in two.

use std::collections::VecDeque;
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parquet::basic::{Repetition, Type};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{DataType, Int32Type, Int64Type};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::page_index::offset_index::PageLocation;
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::ColumnDescPtr;

use crate::DataError;
use crate::guard::guarded;
use crate::headers::Paged;

/// Where a page lies in its file, header included.
#[derive(Debug, Clone, Copy)]
struct Span {
    offset: u64,
    bytes: u32,
}

/// Where the pages of a column chunk lie.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chart {
    /// The dictionary page, which others may refer to.
    dictionary: Option<Span>,
    /// Data pages, in order.
    data: Vec<Span>,
}

impl Chart {
    /// What has to be read to decode some of the data pages.
    fn locations(&self, pages: &Range<u32>) -> Vec<PageLocation> {
        let data = &self.data[pages.start as usize..pages.end as usize];
        let spans = self.dictionary.iter().chain(data);
        spans
            .map(|span| PageLocation {
                offset: span.offset.cast_signed(),
                compressed_page_size: span.bytes.cast_signed(),
                first_row_index: 0,
            })
            .collect()
    }
}

/// A file that remembers where the last read of a page's body ended, which is where the next page's header begins.
struct Watched {
    file: Paged,
    end: AtomicU64,
}

impl Length for Watched {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for Watched {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<BufReader<File>> {
        self.file.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.end.store(start + length as u64, Ordering::Relaxed);
        self.file.get_bytes(start, length)
    }
}

/// One decoded page.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Ascending positions in `tokens` at which rows begin; two equal ones are an empty row.
    pub begins: Vec<usize>,
}

/// What is wrong inside a page.
pub(crate) enum Trouble {
    /// The parquet reader's complaint.
    Parquet(ParquetError),
    /// A value that no token is, in a row that began in this page (`Some`, counted from 0) or before it.
    Value { row: Option<usize>, what: BadValue },
}

/// What stands where a token should.
pub(crate) enum BadValue {
    NullRow,
    NullToken,
    Outside(String),
}

impl From<ParquetError> for Trouble {
    fn from(error: ParquetError) -> Trouble {
        Trouble::Parquet(error)
    }
}

/// The pages of one row group's column on their way to tokens.
pub(crate) struct Pages {
    reader: SerializedPageReader<Watched>,
    watched: Arc<Watched>,
    column: ColumnDescPtr,
    /// Definition level from which on a slot is an element of a list, null or not.
    element: i16,
    unsigned: bool,
    vocabulary: u32,
    dictionary: Option<Page>,
    /// Where what has been read lies, if all pages are read in turn.
    pub read: Chart,
    levels: [Vec<i16>; 2],
    int32: Vec<i32>,
    int64: Vec<i64>,
}

impl Pages {
    /// Some pages, or all, of a column chunk of the file at `path`. Tokens have to be below `vocabulary`.
    pub(crate) fn open(
        (path, file): (&Path, &File),
        chunk: &ColumnChunkMetaData,
        some: Option<(&Chart, &Range<u32>)>,
        unsigned: bool,
        vocabulary: u32,
    ) -> std::result::Result<Result<Pages>, DataError> {
        let file = file.try_clone().map_err(DataError::io("read", path))?;
        let column = chunk.column_descr_ptr();
        let watched = Arc::new(Watched {
            file: Paged(file),
            end: AtomicU64::new(chunk.byte_range().0),
        });
        let locations = some.map(|(chart, pages)| chart.locations(pages));
        let reader = guarded(|| chosen(Arc::clone(&watched), chunk, locations));
        Ok(reader.map(|reader| Pages {
            reader,
            watched,
            element: column.max_def_level()
                - i16::from(
                    column.self_type().get_basic_info().repetition() == Repetition::OPTIONAL,
                ),
            column,
            unsigned,
            vocabulary,
            dictionary: None,
            read: Chart::default(),
            levels: [Vec::new(), Vec::new()],
            int32: Vec::new(),
            int64: Vec::new(),
        }))
    }

    /// Decodes the next page into `page`; false when there is none.
    pub(crate) fn next(&mut self, page: &mut Decoded) -> std::result::Result<bool, Trouble> {
        page.tokens.clear();
        page.begins.clear();
        loop {
            let begin = self.watched.end.load(Ordering::Relaxed);
            let Some(read) = guarded(|| self.reader.get_next_page())? else {
                return Ok(false);
            };
            let end = self.watched.end.load(Ordering::Relaxed);
            let span = Span {
                offset: begin,
                bytes: (end - begin) as u32,
            };
            if read.is_dictionary_page() {
                self.read.dictionary = Some(span);
                self.dictionary = Some(read);
                continue;
            }
            self.read.data.push(span);
            let pages = Queue(self.dictionary.iter().cloned().chain([read]).collect());
            let levels = &mut self.levels;
            match self.column.physical_type() {
                Type::INT32 => {
                    guarded(|| decode::<Int32Type>(&self.column, pages, levels, &mut self.int32))?
                }
                _ => guarded(|| decode::<Int64Type>(&self.column, pages, levels, &mut self.int64))?,
            }
            self.rows(page)?;
            self.widen(page)?;
            return Ok(true);
        }
    }

    /// Finds where rows begin; the levels and values of the page are there.
    fn rows(&self, page: &mut Decoded) -> std::result::Result<(), Trouble> {
        let [definition, repetition] = &self.levels;
        let full = self.column.max_def_level();
        // Every slot a token: the rule, and a loop without branches.
        if definition
            .iter()
            .fold(true, |all, level| all & (*level == full))
        {
            for (start, slots) in (0..).step_by(SLOTS).zip(repetition.chunks(SLOTS)) {
                if slots.iter().fold(false, |any, level| any | (*level == 0)) {
                    let begins = (start..).zip(slots).filter(|(_, level)| **level == 0);
                    page.begins.extend(begins.map(|(slot, _)| slot));
                }
            }
            return Ok(());
        }
        let mut tokens = 0;
        for (definition, repetition) in definition.iter().zip(repetition) {
            if *repetition == 0 {
                page.begins.push(tokens);
            }
            let bad = |what| Trouble::Value {
                row: page.begins.len().checked_sub(1),
                what,
            };
            if *definition == full {
                tokens += 1;
            } else if *definition >= self.element {
                return Err(bad(BadValue::NullToken));
            } else if *definition < self.element - 1 {
                return Err(bad(BadValue::NullRow));
            }
        }
        Ok(())
    }

    fn widen(&self, page: &mut Decoded) -> std::result::Result<(), Trouble> {
        let (tokens, vocabulary) = (&mut page.tokens, self.vocabulary);
        let outside = match self.column.physical_type() {
            // Negative ones become huge.
            Type::INT32 => take(tokens, &self.int32, |value| value as u32, vocabulary),
            _ => take(
                tokens,
                &self.int64,
                |value| u32::try_from(value).unwrap_or(u32::MAX),
                vocabulary,
            ),
        };
        let Some(position) = outside else {
            return Ok(());
        };
        let value = match self.column.physical_type() {
            Type::INT32 if self.unsigned => self.int32[position].cast_unsigned().to_string(),
            Type::INT32 => self.int32[position].to_string(),
            _ if self.unsigned => self.int64[position].cast_unsigned().to_string(),
            _ => self.int64[position].to_string(),
        };
        let begun = page.begins.partition_point(|begin| *begin <= position);
        Err(Trouble::Value {
            row: begun.checked_sub(1),
            what: BadValue::Outside(value),
        })
    }
}

/// Reads the pages at `locations`, or all.
fn chosen(
    watched: Arc<Watched>,
    chunk: &ColumnChunkMetaData,
    locations: Option<Vec<PageLocation>>,
) -> Result<SerializedPageReader<Watched>> {
    let first = locations.as_ref().and_then(|locations| locations.first());
    let begin = chunk.byte_range().0.cast_signed();
    let gap = first.is_some_and(|first| first.offset != begin);
    // How many rows there are is asked by those only who skip some.
    let mut reader = SerializedPageReader::new(watched, chunk, 0, locations)?;
    if gap {
        // It takes whatever is before the first location for a dictionary.
        reader.skip_next_page()?;
    }
    Ok(reader)
}

/// Slots that are looked at together.
const SLOTS: usize = 64;

/// Appends `values` as tokens; where the first one lies that is not below `vocabulary`.
fn take<T: Copy>(
    tokens: &mut Vec<u32>,
    values: &[T],
    id: impl Fn(T) -> u32,
    vocabulary: u32,
) -> Option<usize> {
    tokens.extend(values.iter().map(|value| id(*value)));
    // No early exit, so that the loop is vectorised; the offender is looked for only when there is one.
    let most = tokens.iter().fold(0, |most, token| most.max(*token));
    if most < vocabulary {
        return None;
    }
    tokens.iter().position(|token| *token >= vocabulary)
}

/// Decodes a data page, which may follow a dictionary page: definition and repetition levels, and the values that are not
/// null.
fn decode<T: DataType>(
    column: &ColumnDescPtr,
    pages: Queue,
    [definition, repetition]: &mut [Vec<i16>; 2],
    values: &mut Vec<T::T>,
) -> Result<()> {
    definition.clear();
    repetition.clear();
    values.clear();
    let mut reader = ColumnReaderImpl::<T>::new(Arc::clone(column), Box::new(pages));
    reader.read_records(usize::MAX, Some(definition), Some(repetition), values)?;
    Ok(())
}

/// Pages that have been read, for the reader that decodes them.
struct Queue(VecDeque<Page>);

impl Iterator for Queue {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Result<Page>> {
        self.0.pop_front().map(Ok)
    }
}

impl PageReader for Queue {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        Ok(self.0.pop_front())
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        Ok(None)
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.0.pop_front();
        Ok(())
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        Ok(true)
    }
}
