//! `base.json`: which base model a run began with. Large files are told by a sample of their bytes, so that packing a capsule
//! does not read all weights: other weights differ nearly everywhere.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Files up to this size are hashed as a whole.
const WHOLE: u64 = 32 << 20;

/// Blocks of a larger file that are hashed, evenly spaced from its first to its last byte, and the bytes of each.
const BLOCKS: u64 = 64;
const BLOCK: u64 = 64 << 10;

/// A file of the base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFile {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3 of all bytes, hexadecimal; or of 64 blocks of 64 KiB, evenly spaced from the first byte to the last.
    #[serde(flatten)]
    pub hash: BaseHash,
}

/// How a file was hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BaseHash {
    /// All bytes.
    Blake3(String),
    /// Some blocks.
    Blake3OfBlocks(String),
}

impl BaseHash {
    /// The hexadecimal digits.
    pub fn digits(&self) -> &str {
        let (BaseHash::Blake3(digits) | BaseHash::Blake3OfBlocks(digits)) = self;
        digits
    }
}

/// The files in `directory`, without hidden ones and what is in folders.
pub(super) fn files(directory: &Path) -> io::Result<BTreeMap<String, BaseFile>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let (name, path) = (
            entry.file_name().to_string_lossy().into_owned(),
            entry.path(),
        );
        if !name.starts_with('.') && path.is_file() {
            files.insert(name, file(&path)?);
        }
    }
    Ok(files)
}

fn file(path: &Path) -> io::Result<BaseFile> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    if bytes <= WHOLE {
        hasher.update_reader(file)?;
        let hash = BaseHash::Blake3(hasher.finalize().to_string());
        return Ok(BaseFile { bytes, hash });
    }
    let mut block = vec![0; BLOCK as usize];
    for number in 0..BLOCKS {
        let place = u128::from(bytes - BLOCK) * u128::from(number) / u128::from(BLOCKS - 1);
        file.seek(SeekFrom::Start(place as u64))?;
        file.read_exact(&mut block)?;
        hasher.update(&block);
    }
    let hash = BaseHash::Blake3OfBlocks(hasher.finalize().to_string());
    Ok(BaseFile { bytes, hash })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_a_large_file_are_among_its_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        let written = File::create(&path).unwrap();
        written.set_len(WHOLE + 12_345).unwrap();
        let mut seen = vec![files(directory.path()).unwrap()];
        assert!(matches!(
            seen[0]["model.safetensors"].hash,
            BaseHash::Blake3OfBlocks(_)
        ));
        for place in [0, WHOLE + 12_344] {
            use std::os::unix::fs::FileExt;
            written.write_all_at(&[1], place).unwrap();
            seen.push(files(directory.path()).unwrap());
        }
        assert!(seen.windows(2).all(|pair| pair[0] != pair[1]));
        fs::write(directory.path().join(".cache"), "x").unwrap();
        assert_eq!(files(directory.path()).unwrap(), seen[2]);
    }
}
