//! Reads parquet: opens a file with clear errors, and decodes a list column of token ids batch by batch.
//!
//! Token ids come in any integer type and any list type. The arrow schema that writers embed is ignored, so that list,
//! large list and fixed-size list all arrive as one type; the parquet annotations keep the integer's width and sign.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, ArrowPrimitiveType, ListArray, PrimitiveArray};
use arrow::datatypes::{
    DataType, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type,
    UInt64Type,
};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::ParquetMetaData;

use crate::DataError;

/// Tokens decoded at a time, roughly: large enough to amortise, small enough to stay in cache and memory.
const BATCH_TOKENS: u64 = 1 << 18;
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
            ArrowReaderMetadata::load(&file, options).map_err(|source| DataError::Parquet {
                path: path.to_owned(),
                place: String::new(),
                source,
                remedy: INCOMPLETE,
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
        Ok(ColumnFile {
            path: path.to_owned(),
            file,
            metadata,
            column,
        })
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
        let unreadable = move |source| DataError::Parquet {
            path: self.path.clone(),
            place: format!("row group {group}: "),
            source,
            remedy: INCOMPLETE,
        };
        let file = self
            .file
            .try_clone()
            .map_err(DataError::io("read", &self.path))?;
        let reader =
            ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
                .with_row_groups(vec![group])
                .with_projection(ProjectionMask::roots(
                    self.metadata().file_metadata().schema_descr(),
                    [self.column],
                ))
                .with_batch_size(rows)
                .build()
                .map_err(unreadable)?;
        Ok(reader.map(move |batch| match batch {
            Ok(batch) => Ok(Arc::clone(batch.column(0))),
            Err(error) => Err(unreadable(error.into())),
        }))
    }
}

/// Some rows of a row group.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// Their tokens, one row after the other.
    pub tokens: &'a [u32],
    /// Where rows begin and end in `tokens`: one more than there are rows, from 0 to `tokens.len()`.
    pub bounds: &'a [usize],
}

impl<'a> Rows<'a> {
    /// The rows one by one.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a [u32]> {
        let tokens = self.tokens;
        self.bounds
            .windows(2)
            .map(move |pair| &tokens[pair[0]..pair[1]])
    }
}

/// An open file of token rows.
pub(crate) struct TokenFile {
    file: ColumnFile,
    vocabulary: u32,
}

impl TokenFile {
    /// Opens the file at `path`, whose column `column` holds lists of token ids below `vocabulary`.
    pub(crate) fn open(path: &Path, column: &str, vocabulary: u32) -> Result<TokenFile, DataError> {
        let file = ColumnFile::open(path, column)?;
        match file.data_type() {
            DataType::List(item) if item.data_type().is_integer() => {
                Ok(TokenFile { file, vocabulary })
            }
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
        let rows = self.file.group_rows(group).max(1);
        let values = self
            .file
            .metadata()
            .row_group(group)
            .columns()
            .iter()
            .map(|column| column.num_values())
            .max();
        let rows_per_batch = BATCH_TOKENS * rows / (values.unwrap_or(1).max(1) as u64);
        let (mut tokens, mut bounds) = (Vec::new(), Vec::new());
        let mut first_row = 0;
        for array in self
            .file
            .batches(group, rows_per_batch.clamp(1, 1 << 16) as usize)?
        {
            let array = array?;
            tokens.clear();
            bounds.clear();
            self.decode(&array, &mut tokens, &mut bounds)
                .map_err(|fault| {
                    let cause = format!(
                        "row group {group}, row {}: {}",
                        first_row + fault.row,
                        fault.cause
                    );
                    DataError::content(self.file.path(), cause, fault.remedy)
                })?;
            if !sink(Rows {
                tokens: &tokens,
                bounds: &bounds,
            }) {
                return Ok(());
            }
            first_row += array.len();
        }
        Ok(())
    }

    fn decode(
        &self,
        array: &ArrayRef,
        tokens: &mut Vec<u32>,
        bounds: &mut Vec<usize>,
    ) -> Result<(), Fault> {
        let Some(list) = array.as_any().downcast_ref::<ListArray>() else {
            return Err(Fault::new(
                0,
                format!("is {}, not a list", array.data_type()),
            ));
        };
        if let Some(nulls) = list.nulls().filter(|nulls| nulls.null_count() > 0) {
            let row = (0..list.len()).find(|row| nulls.is_null(*row)).unwrap_or(0);
            return Err(Fault::new(row, "is null".to_owned()));
        }
        let offsets = list.value_offsets();
        let (first, last) = (offsets[0] as usize, offsets[list.len()] as usize);
        bounds.extend(offsets.iter().map(|offset| *offset as usize - first));
        let values = list.values().slice(first, last - first);
        let row_of = |position: usize| {
            bounds
                .partition_point(|bound| *bound <= position)
                .saturating_sub(1)
        };
        if let Some(nulls) = values.nulls().filter(|nulls| nulls.null_count() > 0) {
            let position = (0..values.len())
                .find(|position| nulls.is_null(*position))
                .unwrap_or(0);
            return Err(Fault::new(
                row_of(position),
                "holds a null token".to_owned(),
            ));
        }
        let bad = match values.data_type() {
            DataType::Int8 => widen::<Int8Type>(&values, self.vocabulary, tokens),
            DataType::Int16 => widen::<Int16Type>(&values, self.vocabulary, tokens),
            DataType::Int32 => widen::<Int32Type>(&values, self.vocabulary, tokens),
            DataType::Int64 => widen::<Int64Type>(&values, self.vocabulary, tokens),
            DataType::UInt8 => widen::<UInt8Type>(&values, self.vocabulary, tokens),
            DataType::UInt16 => widen::<UInt16Type>(&values, self.vocabulary, tokens),
            DataType::UInt32 => widen::<UInt32Type>(&values, self.vocabulary, tokens),
            DataType::UInt64 => widen::<UInt64Type>(&values, self.vocabulary, tokens),
            other => return Err(Fault::new(0, format!("holds {other}, not integers"))),
        };
        let Some((position, value)) = bad else {
            return Ok(());
        };
        Err(Fault {
            row: row_of(position),
            cause: format!(
                "token id {value} is outside the vocabulary (0 to {})",
                self.vocabulary.saturating_sub(1)
            ),
            remedy: "give the tokenizer that made these tokens",
        })
    }
}

/// What is wrong with a row of a batch.
struct Fault {
    row: usize,
    cause: String,
    remedy: &'static str,
}

impl Fault {
    fn new(row: usize, cause: String) -> Fault {
        Fault {
            row,
            cause,
            remedy: "write the file without nulls, as lists of integers",
        }
    }
}

/// Appends `values` to `tokens`; the first one that is not below `vocabulary` is returned with its position.
fn widen<T: ArrowPrimitiveType>(
    values: &ArrayRef,
    vocabulary: u32,
    tokens: &mut Vec<u32>,
) -> Option<(usize, String)>
where
    T::Native: Id,
{
    let values: &PrimitiveArray<T> = values
        .as_any()
        .downcast_ref()
        .expect("invariant: the data type was matched");
    let mut outside = false;
    // No early exit, so that the loop is vectorised; the offender is looked for only when there is one.
    tokens.extend(values.values().iter().map(|value| {
        outside |= value.id() >= u64::from(vocabulary);
        value.id() as u32
    }));
    if !outside {
        return None;
    }
    let position = values
        .values()
        .iter()
        .position(|value| value.id() >= u64::from(vocabulary))?;
    Some((position, values.value(position).to_string()))
}

/// An integer as a token id: negative ones become huge.
trait Id: Copy + std::fmt::Display {
    fn id(self) -> u64;
}

macro_rules! id {
    ($($integer:ty),*) => { $(impl Id for $integer { fn id(self) -> u64 { self as u64 } })* };
}
id!(i8, i16, i32, i64, u8, u16, u32, u64);
