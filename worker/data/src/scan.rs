//! Reads parquet: opens a file with clear errors, and decodes its rows: a text column, or a list column of token ids.
//!
//! Token ids come in any integer type and any list type. The arrow schema that writers embed is ignored, so that list,
//! large list and fixed-size list all arrive as one type; the parquet annotations keep the integer's width and sign.

use std::fs::File;
use std::iter;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::ArrayRef;
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaData;

use crate::DataError;
use crate::guard::guarded;
use crate::headers::{Footer, Paged};
use crate::pages::{BadValue, Chart, Pages, Trouble};
use crate::rows::{Batch, Extent, Rows};

const INCOMPLETE: &str = "it is damaged or incomplete: copy it again, or remove it";

/// An open parquet file and one of its columns.
pub(crate) struct ColumnFile {
    path: PathBuf,
    file: File,
    metadata: ArrowReaderMetadata,
    column: usize,
}

impl ColumnFile {
    /// Opens the file at `path` for its column `column`.
    pub(crate) fn open(path: &Path, column: &str) -> Result<ColumnFile, DataError> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        if file.metadata().map_err(DataError::io("read", path))?.len() == 0 {
            return Err(DataError::content(
                path,
                "is empty (0 bytes), not parquet",
                INCOMPLETE,
            ));
        }
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata =
            guarded(|| ArrowReaderMetadata::load(&Footer(&file), options)).map_err(|source| {
                DataError::Parquet {
                    path: path.to_owned(),
                    place: String::new(),
                    source,
                    remedy: INCOMPLETE,
                }
            })?;
        let fields = metadata.schema().fields();
        let Some(column) = fields.iter().position(|field| field.name() == column) else {
            let names: Vec<_> = fields.iter().map(|field| field.name().as_str()).collect();
            let cause = format!(
                "has no column {column:?}; its columns are: {}",
                names.join(", ")
            );
            return Err(DataError::content(
                path,
                cause,
                "name the right one with --column",
            ));
        };
        let file = ColumnFile {
            path: path.to_owned(),
            file,
            metadata,
            column,
        };
        file.check_chunks()?;
        Ok(file)
    }

    /// That the column's pages lie somewhere, and none is compressed in a way that is not read here.
    fn check_chunks(&self) -> Result<(), DataError> {
        let schema = self.metadata().file_metadata().schema_descr();
        for (number, group) in self.metadata().row_groups().iter().enumerate() {
            let leaves = group.columns().iter().enumerate();
            for (_, chunk) in
                leaves.filter(|(leaf, _)| schema.get_column_root_idx(*leaf) == self.column)
            {
                let begin = chunk.dictionary_page_offset();
                let begin = begin.unwrap_or(chunk.data_page_offset());
                if begin < 0 || chunk.compressed_size() < 0 {
                    let cause = format!(
                        "row group {number}: the column is said to have {} bytes from byte {begin} on",
                        chunk.compressed_size()
                    );
                    return Err(DataError::content(&self.path, cause, INCOMPLETE));
                }
                let codec = match chunk.compression() {
                    Compression::BROTLI(_) => "brotli",
                    Compression::LZO => "lzo",
                    _ => continue,
                };
                let cause = format!(
                    "row group {number}: column {:?} is compressed by {codec}, which is not read",
                    self.metadata.schema().field(self.column).name()
                );
                let remedy = "write the file with zstd, snappy, gzip or lz4";
                return Err(DataError::content(&self.path, cause, remedy));
            }
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn metadata(&self) -> &ParquetMetaData {
        self.metadata.metadata()
    }

    pub(crate) fn row_groups(&self) -> usize {
        self.metadata().num_row_groups()
    }

    /// Rows of the file.
    pub(crate) fn rows(&self) -> u64 {
        (0..self.row_groups())
            .map(|group| self.group_rows(group))
            .sum()
    }

    /// Rows of row group `group`.
    pub(crate) fn group_rows(&self, group: usize) -> u64 {
        self.metadata().row_group(group).num_rows().max(0) as u64
    }

    /// The column's type.
    pub(crate) fn data_type(&self) -> &DataType {
        self.metadata.schema().field(self.column).data_type()
    }

    /// Decodes the column of row group `group`, `rows` rows at a time.
    pub(crate) fn batches(
        &self,
        group: usize,
        rows: usize,
    ) -> Result<impl Iterator<Item = Result<ArrayRef, DataError>>, DataError> {
        let unreadable = move |source| self.unreadable(group, source);
        let file = self
            .file
            .try_clone()
            .map_err(DataError::io("read", &self.path))?;
        let builder =
            ParquetRecordBatchReaderBuilder::new_with_metadata(Paged(file), self.metadata.clone())
                .with_row_groups(vec![group])
                .with_projection(ProjectionMask::roots(
                    self.metadata().file_metadata().schema_descr(),
                    [self.column],
                ))
                .with_batch_size(rows);
        let mut reader = guarded(|| builder.build()).map_err(unreadable)?;
        Ok(iter::from_fn(move || {
            let batch = guarded(|| Ok(reader.next().transpose()?));
            let column = batch.map(|batch| Some(Arc::clone(batch?.column(0))));
            column.map_err(unreadable).transpose()
        }))
    }

    fn unreadable(&self, group: usize, source: ParquetError) -> DataError {
        DataError::Parquet {
            path: self.path.clone(),
            place: format!("row group {group}: "),
            source,
            remedy: INCOMPLETE,
        }
    }
}

/// An open file of token rows.
pub(crate) struct TokenFile {
    file: ColumnFile,
    /// The column's number among the leaves of the schema.
    leaf: usize,
    unsigned: bool,
    vocabulary: u32,
}

impl TokenFile {
    /// Opens the file at `path`, whose column `column` holds lists of token ids below `vocabulary`.
    pub(crate) fn open(path: &Path, column: &str, vocabulary: u32) -> Result<TokenFile, DataError> {
        let file = ColumnFile::open(path, column)?;
        let schema = file.metadata().file_metadata().schema_descr();
        let leaf = (0..schema.num_columns())
            .find(|leaf| schema.get_column_root_idx(*leaf) == file.column)
            .unwrap_or_default();
        match file.data_type() {
            DataType::List(item) if item.data_type().is_integer() => Ok(TokenFile {
                leaf,
                unsigned: item.data_type().is_unsigned_integer(),
                file,
                vocabulary,
            }),
            other => {
                let cause = format!("column {column:?} is {other}, not a list of integers");
                let remedy = "name the column of token ids with --column; text is made into tokens by \
                              `supra data tokenize`";
                Err(DataError::content(path, cause, remedy))
            }
        }
    }

    /// The file below.
    pub(crate) fn file(&self) -> &ColumnFile {
        &self.file
    }

    /// Decodes row group `group` and hands its rows on in order. The sink returns whether it wants more.
    ///
    /// # Errors
    /// At a null, a token outside the vocabulary, or damage, naming the row.
    pub(crate) fn scan(
        &self,
        group: usize,
        mut sink: impl FnMut(Rows<'_>) -> bool,
    ) -> Result<(), DataError> {
        self.chart(group, |rows, _| sink(rows)).map(drop)
    }

    /// The same, and where each batch of rows lies, for [`TokenFile::rows`]; returns where the pages that were read lie.
    pub(crate) fn chart(
        &self,
        group: usize,
        mut sink: impl FnMut(Rows<'_>, Extent) -> bool,
    ) -> Result<Chart, DataError> {
        let (mut pages, mut batch) = (self.pages(group, None)?, Batch::default());
        while self.next(group, &mut pages, &mut batch)? {
            if batch.is_headless() {
                let cause = format!("row group {group} begins in the middle of a row");
                return Err(DataError::content(self.file.path(), cause, INCOMPLETE));
            }
            if let Some((rows, extent)) = batch.complete()
                && !sink(rows, extent)
            {
                return Ok(pages.read);
            }
            batch.advance();
        }
        if let Some((rows, extent)) = batch.rest() {
            sink(rows, extent);
        }
        let (found, expected) = (batch.rows_done(), self.file.group_rows(group));
        if found != expected {
            let cause = format!(
                "row group {group} holds {found} rows where the file's footer says {expected}"
            );
            return Err(DataError::content(self.file.path(), cause, INCOMPLETE));
        }
        Ok(pages.read)
    }

    /// Decodes the rows of row group `group` at `extent` of a chart, and hands them on together.
    ///
    /// # Errors
    /// As [`TokenFile::scan`], rows counted from the first one that begins in these pages; when there are not so many rows.
    pub(crate) fn rows(
        &self,
        group: usize,
        chart: &Chart,
        extent: &Extent,
        sink: impl FnOnce(Rows<'_>),
    ) -> Result<(), DataError> {
        let mut pages = self.pages(group, Some((chart, &extent.pages)))?;
        let mut batch = Batch::default();
        while self.next(group, &mut pages, &mut batch)? {
            batch.append();
        }
        match batch.slice(extent) {
            Some(rows) => sink(rows),
            None => {
                let cause = format!("row group {group} no longer holds the rows that it held");
                return Err(DataError::changed(self.file.path(), cause));
            }
        }
        Ok(())
    }

    fn pages(&self, group: usize, some: Option<(&Chart, &Range<u32>)>) -> Result<Pages, DataError> {
        let chunk = self.file.metadata().row_group(group).column(self.leaf);
        let file = (self.file.path(), &self.file.file);
        Pages::open(file, chunk, some, self.unsigned, self.vocabulary)?
            .map_err(|source| self.file.unreadable(group, source))
    }

    /// The next page; false when there is none.
    fn next(&self, group: usize, pages: &mut Pages, batch: &mut Batch) -> Result<bool, DataError> {
        pages
            .next(&mut batch.page)
            .map_err(|trouble| match trouble {
                Trouble::Parquet(source) => self.file.unreadable(group, source),
                Trouble::Value { row, what } => {
                    // Without a beginning in this page it is the last row that began before.
                    let row = (batch.rows_begun() + row.map_or(0, |row| row as u64 + 1)).max(1) - 1;
                    self.bad_value(group, row, &what)
                }
            })
    }

    fn bad_value(&self, group: usize, row: u64, what: &BadValue) -> DataError {
        let whole = "write the file without nulls, as lists of integers";
        let (cause, remedy) = match what {
            BadValue::NullRow => ("is null".to_owned(), whole),
            BadValue::NullToken => ("holds a null token".to_owned(), whole),
            BadValue::Outside(value) => {
                let most = self.vocabulary.saturating_sub(1);
                let cause = format!("token id {value} is outside the vocabulary (0 to {most})");
                (cause, "give the tokenizer that made these tokens")
            }
        };
        let cause = format!("row group {group}, row {row}: {cause}");
        DataError::content(self.file.path(), cause, remedy)
    }
}
