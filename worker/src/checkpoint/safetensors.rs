//! Writing safetensors files from flat buffers, hashed while they are written.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use safetensors::{Dtype, tensor::Metadata, tensor::TensorInfo};
use supra_checkpoint::manifest::StoredFile;
use tch::Tensor;

use crate::optim::{Section, Slot};

/// One tensor to write: a slot of a flat fp32 buffer under a key.
pub struct Entry {
    /// Key in the file.
    pub key: String,
    /// Which part of the buffer.
    pub slot: Slot,
    /// The buffer.
    pub section: Section,
}

impl Entry {
    /// Bytes of the tensor's data.
    pub fn bytes(&self) -> u64 {
        self.slot.elements as u64 * size_of::<f32>() as u64
    }
}

/// A file that knows the hash of what was written to it.
pub struct HashedFile {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    /// Creates the file, which must not exist.
    pub fn create(path: &Path) -> io::Result<HashedFile> {
        let file = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
        Ok(HashedFile {
            file,
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    /// Makes the file durable and says what is in it.
    pub fn finish(self) -> io::Result<StoredFile> {
        let file = self
            .file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        Ok(StoredFile {
            bytes: self.bytes,
            blake3: self.hasher.finalize().to_hex().to_string(),
        })
    }
}

impl Write for HashedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A safetensors file, written a tensor at a time.
pub struct SafetensorsFile {
    file: HashedFile,
    host: Vec<f32>,
}

impl SafetensorsFile {
    /// Creates the file, which must not exist, for the tensors of `entries`, to be [`append`](Self::append)ed in this order.
    pub fn create(path: &Path, entries: &[Entry]) -> io::Result<SafetensorsFile> {
        let mut file = HashedFile::create(path)?;
        let header = header(entries)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        Ok(SafetensorsFile {
            file,
            host: Vec::new(),
        })
    }

    /// Writes a slot of a flat fp32 buffer.
    pub fn append(&mut self, slot: &Slot, flat: &Tensor) -> io::Result<()> {
        let elements = slot.elements as usize;
        self.host.resize(elements, 0.0);
        flat.narrow(0, slot.offset, slot.elements)
            .copy_data(&mut self.host, elements);
        self.file.write_all(bytemuck::cast_slice(&self.host))
    }

    /// Makes the file durable and says what is in it.
    pub fn finish(self) -> io::Result<StoredFile> {
        self.file.finish()
    }
}

/// The JSON header, padded so that the data is aligned to 8 bytes.
fn header(entries: &[Entry]) -> io::Result<Vec<u8>> {
    let mut start = 0;
    let infos = entries.iter().map(|entry| {
        let end = start + entry.bytes() as usize;
        let shape = entry.slot.shape.iter().map(|&size| size as usize).collect();
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape,
            data_offsets: (start, end),
        };
        start = end;
        (entry.key.clone(), info)
    });
    let format = [("format".to_owned(), "pt".to_owned())].into();
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(io::Error::other)?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok(json)
}
