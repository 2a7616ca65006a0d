//! A read-only memory map: the one place of this crate with `unsafe`.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::DataError;

/// A mapped file of little-endian integers.
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps the file at `path`, which must not be empty.
    #[allow(unsafe_code)]
    pub(crate) fn open(path: &Path) -> Result<Mapping, DataError> {
        let file = File::open(path).map_err(DataError::io("open", path))?;
        // SAFETY: the map is only read, as plain integers, for which every bit pattern is valid. A packed store is
        // written under another name, renamed when complete and never written again by this program; whoever overwrites
        // it in place meanwhile changes what is read, which the checksums find, and whoever truncates it ends the
        // process with SIGBUS.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::io("map", path))?;
        Ok(Mapping(map))
    }

    /// The file as integers; the bytes after the last whole one are left out.
    pub(crate) fn integers<T: bytemuck::AnyBitPattern>(&self) -> &[T] {
        let whole = self.0.len() / size_of::<T>() * size_of::<T>();
        // A map begins at a page, so it is aligned for any integer.
        bytemuck::cast_slice(&self.0[..whole])
    }
}
