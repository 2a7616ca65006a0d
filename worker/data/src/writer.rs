//! Writes token parquet: one list of int32 per document, plain and zstd, which every tool reads and nothing reads faster.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Int32Array, ListArray, RecordBatch};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};

use crate::DataError;

/// A row group ends with the document that brings it to one of these: small enough to hold several in memory.
const GROUP_DOCUMENTS: usize = 8192;
const GROUP_TOKENS: usize = 4 << 20;

/// A token parquet file under way.
pub(crate) struct TokenWriter {
    path: PathBuf,
    writer: ArrowWriter<File>,
    schema: SchemaRef,
    item: Arc<Field>,
    tokens: Vec<i32>,
    /// Where documents begin and end in `tokens`.
    offsets: Vec<i32>,
}

impl TokenWriter {
    /// Creates the file at `path` with `column` and the footer entry `origin`.
    pub(crate) fn create(
        path: &Path,
        column: &str,
        origin: KeyValue,
    ) -> Result<TokenWriter, DataError> {
        let item = Arc::new(Field::new("element", DataType::Int32, false));
        let schema = Arc::new(Schema::new(vec![Field::new(
            column,
            DataType::List(Arc::clone(&item)),
            false,
        )]));
        // A dictionary of token ids makes indices that compress worse, and statistics of them tell nothing.
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .set_max_row_group_row_count(None)
            .set_key_value_metadata(Some(vec![origin]))
            .build();
        let file = File::create(path).map_err(DataError::io("create", path))?;
        let writer = ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties))
            .map_err(failed(path))?;
        Ok(TokenWriter {
            path: path.to_owned(),
            writer,
            schema,
            item,
            tokens: Vec::new(),
            offsets: vec![0],
        })
    }

    /// Appends a document.
    pub(crate) fn push(&mut self, document: &[u32]) -> Result<(), DataError> {
        self.tokens
            .extend(document.iter().map(|token| *token as i32));
        self.offsets.push(self.tokens.len() as i32);
        if self.offsets.len() > GROUP_DOCUMENTS || self.tokens.len() >= GROUP_TOKENS {
            self.end_group()?;
        }
        Ok(())
    }

    /// Ends the file and returns it, still to be synced.
    pub(crate) fn finish(mut self) -> Result<File, DataError> {
        if self.offsets.len() > 1 {
            self.end_group()?;
        }
        self.writer.into_inner().map_err(failed(&self.path))
    }

    fn end_group(&mut self) -> Result<(), DataError> {
        let tokens = Int32Array::from(std::mem::take(&mut self.tokens));
        let offsets = OffsetBuffer::new(ScalarBuffer::from(std::mem::replace(
            &mut self.offsets,
            vec![0],
        )));
        let write = |writer: &mut ArrowWriter<File>| -> Result<(), ParquetError> {
            let lists =
                ListArray::try_new(Arc::clone(&self.item), offsets, Arc::new(tokens), None)?;
            let batch: Result<_, ArrowError> =
                RecordBatch::try_new(Arc::clone(&self.schema), vec![Arc::new(lists)]);
            writer.write(&batch?)?;
            writer.flush()
        };
        write(&mut self.writer).map_err(failed(&self.path))
    }
}

fn failed(path: &Path) -> impl FnOnce(ParquetError) -> DataError {
    move |source| DataError::Write {
        path: path.to_owned(),
        source,
    }
}
