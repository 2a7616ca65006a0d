//! Headers of parquet files, looked through before the parquet library reads them.
//!
//! The library counts through the elements of lists and maps that it does not know, and finds booleans there in no bytes at
//! all (parquet 60): seven bytes that claim 2^31 of them keep it busy for many seconds, and a footer has room for thousands
//! of such claims. So that what is looked through is what it reads, fields have to be of the types that the format gives them.

use std::fs::File;
use std::io::BufReader;

use bytes::Bytes;
use parquet::errors::{ParquetError, Result};
use parquet::file::FOOTER_SIZE;
use parquet::file::reader::{ChunkReader, Length};

use self::Kind::{Binary, Bool, Double, I8, I16, I32, I64, List, Struct};
use crate::compact::{Kind, check};

/// Fields by their numbers, as parquet.thrift of apache/parquet-format has them.
type Fields = &'static [(i16, Kind)];

const STATISTICS: Fields = &[
    (1, Binary),
    (2, Binary),
    (3, I64),
    (4, I64),
    (5, Binary),
    (6, Binary),
    (7, Bool),
    (8, Bool),
];
const KEY_VALUE: Fields = &[(1, Binary), (2, Binary)];
const TIME: Fields = &[
    (1, Bool),
    (
        2,
        Struct(&[(1, Struct(&[])), (2, Struct(&[])), (3, Struct(&[]))]),
    ),
];
const LOGICAL_TYPE: Fields = &[
    (1, Struct(&[])),
    (2, Struct(&[])),
    (3, Struct(&[])),
    (4, Struct(&[])),
    (5, Struct(&[(1, I32), (2, I32)])),
    (6, Struct(&[])),
    (7, Struct(TIME)),
    (8, Struct(TIME)),
    (10, Struct(&[(1, I8), (2, Bool)])),
    (11, Struct(&[])),
    (12, Struct(&[])),
    (13, Struct(&[])),
    (14, Struct(&[])),
    (15, Struct(&[])),
    (16, Struct(&[(1, I8)])),
    (17, Struct(&[(1, Binary)])),
    (18, Struct(&[(1, Binary), (2, I32)])),
];
const SCHEMA_ELEMENT: Fields = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, Binary),
    (5, I32),
    (6, I32),
    (7, I32),
    (8, I32),
    (9, I32),
    (10, Struct(LOGICAL_TYPE)),
];
const BOUNDING_BOX: Fields = &[
    (1, Double),
    (2, Double),
    (3, Double),
    (4, Double),
    (5, Double),
    (6, Double),
    (7, Double),
    (8, Double),
];
const COLUMN_METADATA: Fields = &[
    (1, I32),
    (2, List(&I32)),
    (3, List(&Binary)),
    (4, I32),
    (5, I64),
    (6, I64),
    (7, I64),
    (8, List(&Struct(KEY_VALUE))),
    (9, I64),
    (10, I64),
    (11, I64),
    (12, Struct(STATISTICS)),
    (13, List(&Struct(&[(1, I32), (2, I32), (3, I32)]))),
    (14, I64),
    (15, I32),
    (16, Struct(&[(1, I64), (2, List(&I64)), (3, List(&I64))])),
    (17, Struct(&[(1, Struct(BOUNDING_BOX)), (2, List(&I32))])),
];
const COLUMN_CHUNK: Fields = &[
    (1, Binary),
    (2, I64),
    (3, Struct(COLUMN_METADATA)),
    (4, I64),
    (5, I32),
    (6, I64),
    (7, I32),
    (
        8,
        Struct(&[
            (1, Struct(&[])),
            (2, Struct(&[(1, List(&Binary)), (2, Binary)])),
        ]),
    ),
    (9, Binary),
];
const ROW_GROUP: Fields = &[
    (1, List(&Struct(COLUMN_CHUNK))),
    (2, I64),
    (3, I64),
    (4, List(&Struct(&[(1, I32), (2, Bool), (3, Bool)]))),
    (5, I64),
    (6, I64),
    (7, I16),
];
const CIPHER: Fields = &[(1, Binary), (2, Binary), (3, Bool)];
const FILE_METADATA: Fields = &[
    (1, I32),
    (2, List(&Struct(SCHEMA_ELEMENT))),
    (3, I64),
    (4, List(&Struct(ROW_GROUP))),
    (5, List(&Struct(KEY_VALUE))),
    (6, Binary),
    (7, List(&Struct(&[(1, Struct(&[])), (2, Struct(&[]))]))),
    (8, Struct(&[(1, Struct(CIPHER)), (2, Struct(CIPHER))])),
    (9, Binary),
];
const PAGE_HEADER: Fields = &[
    (1, I32),
    (2, I32),
    (3, I32),
    (4, I32),
    (
        5,
        Struct(&[
            (1, I32),
            (2, I32),
            (3, I32),
            (4, I32),
            (5, Struct(STATISTICS)),
        ]),
    ),
    (6, Struct(&[])),
    (7, Struct(&[(1, I32), (2, I32), (3, Bool)])),
    (
        8,
        Struct(&[
            (1, I32),
            (2, I32),
            (3, I32),
            (4, I32),
            (5, I32),
            (6, I32),
            (7, Bool),
            (8, Struct(STATISTICS)),
        ]),
    ),
];

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
        let tail = self.0.get_bytes(start + length as u64, FOOTER_SIZE)?;
        // One that is encrypted is refused by the library.
        if !tail.ends_with(b"PARE") {
            check(&footer[..], FILE_METADATA).map_err(wrong)?;
        }
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
        check(self.0.get_read(start)?, PAGE_HEADER).map_err(wrong)?;
        self.0.get_read(start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.0.get_bytes(start, length)
    }
}

fn wrong(error: thrift::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}
