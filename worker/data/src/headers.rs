//! Headers of parquet files, looked through before the parquet library reads them.
//!
//! The library counts through the elements of lists and maps that it does not know, and finds booleans there in no bytes at
//! all (parquet 60): seven bytes that claim 2^31 of them keep it busy for many seconds, and a footer has room for thousands
//! of such claims. Thrift's own reader wants a byte for each.

use std::fs::File;
use std::io::{BufReader, Read};

use bytes::Bytes;
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{ChunkReader, Length};
use thrift::protocol::{TCompactInputProtocol, TInputProtocol, TType};

/// A file for reading its footer, which is taken as a chunk.
pub(crate) struct Footer<'a>(pub &'a File);

impl Length for Footer<'_> {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Footer<'_> {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<BufReader<File>> {
        self.0.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let footer = self.0.get_bytes(start, length)?;
        check(&footer[..])?;
        Ok(footer)
    }
}

/// A file for reading pages, of which the headers are taken as streams.
pub(crate) struct Paged(pub File);

impl Length for Paged {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for Paged {
    type T = BufReader<File>;

    fn get_read(&self, start: u64) -> Result<BufReader<File>> {
        check(self.0.get_read(start)?)?;
        self.0.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.0.get_bytes(start, length)
    }
}

/// That a struct in Thrift's compact protocol is whole.
fn check(from: impl Read) -> Result<()> {
    let skipped = TCompactInputProtocol::new(from).skip(TType::Struct);
    skipped.map_err(|error| ParquetError::External(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    /// A struct whose field 100, which parquet does not have, is `field` of Thrift's type `of`.
    fn unknown(of: u8, field: &[u8]) -> Vec<u8> {
        let id = [200, 1];
        iter::once(of)
            .chain(id)
            .chain(field.iter().copied())
            .chain([0])
            .collect()
    }

    #[test]
    fn collections_are_as_long_as_they_claim() {
        const MOST: [u8; 5] = [255, 255, 255, 255, 7];
        let (list, map) = (9, 11);
        let endless = [&[0xf2], &MOST[..]].concat();
        check(&unknown(list, &endless)[..]).unwrap_err();
        let lists = [&[0x29], &endless[..], &endless].concat();
        check(&unknown(list, &lists)[..]).unwrap_err();
        check(&unknown(map, &[&MOST[..], &[0x22]].concat())[..]).unwrap_err();

        check(&unknown(list, &[0x32, 1, 2, 1])[..]).unwrap();
        check(&unknown(map, &[0])[..]).unwrap();
        // As some writers have an empty list.
        check(&unknown(list, &[0])[..]).unwrap();
        check(&[][..]).unwrap_err();
    }
}
