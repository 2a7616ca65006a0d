//! The header of a safetensors file: what the file holds, and where.

use std::io::{self, Read};

use safetensors::{SafeTensorError, tensor::Metadata};

/// The format's own limit, bytes.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes of the header's length.
const PREFIX: u64 = size_of::<u64>() as u64;

/// Why a header cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The file ends early or late.
    #[error("{found} bytes, but the header speaks of {expected}")]
    Length {
        /// Bytes that the header promises, itself included.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// The header is not one of safetensors.
    #[error(transparent)]
    Format(#[from] SafeTensorError),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads the header of a file of `bytes` bytes from its beginning: the byte at which the data begins, and what lies where
/// behind it. The file is as long as the header says, and every tensor lies in it.
///
/// # Errors
/// Anything else.
pub fn read(file: &mut impl Read, bytes: u64) -> Result<(u64, Metadata), HeaderError> {
    let long_enough = |expected| match bytes < expected {
        true => Err(HeaderError::Length {
            expected,
            found: bytes,
        }),
        false => Ok(()),
    };
    long_enough(PREFIX)?;
    let mut length = [0; PREFIX as usize];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(SafeTensorError::HeaderTooLarge.into());
    }
    let start = PREFIX + length;
    long_enough(start)?;
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(SafeTensorError::InvalidHeaderDeserialization)?;
    // Sizes that only add up beyond 2^64 are those of no file.
    let expected = start.saturating_add(metadata.data_len() as u64);
    match bytes == expected {
        true => Ok((start, metadata)),
        false => Err(HeaderError::Length {
            expected,
            found: bytes,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header.as_bytes());
        file.resize(file.len() + data, 0);
        file
    }

    fn parse(file: &[u8]) -> Result<(u64, Metadata), HeaderError> {
        read(&mut &*file, file.len() as u64)
    }

    const HEADER: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    #[test]
    fn a_header_says_where_the_data_begins_and_what_lies_there() {
        let (start, metadata) = parse(&file(HEADER, 8)).unwrap();
        assert_eq!(start, 8 + HEADER.len() as u64);
        assert_eq!(metadata.info("a").unwrap().data_offsets, (0, 8));
    }

    #[test]
    fn a_file_that_is_cut_or_longer_anywhere_is_refused() {
        let whole = file(HEADER, 8);
        for length in 0..whole.len() {
            assert!(parse(&whole[..length]).is_err(), "{length}");
        }
        assert!(parse(&file(HEADER, 9)).is_err());
        assert!(parse(&u64::MAX.to_le_bytes()).is_err());
    }

    #[test]
    fn sizes_that_add_up_to_more_than_numbers_hold_are_refused() {
        let most = u64::MAX / 8 / 8 * 8;
        let tensor = |nth: u64| {
            let (from, to) = (most * nth, most * (nth + 1));
            let shape = most / 8;
            format!(r#""{nth}":{{"dtype":"F64","shape":[{shape}],"data_offsets":[{from},{to}]}}"#)
        };
        let tensors: Vec<String> = (0..8).map(tensor).collect();
        let error = parse(&file(&format!("{{{}}}", tensors.join(",")), 8)).unwrap_err();
        assert!(matches!(error, HeaderError::Length { .. }), "{error}");
    }
}
