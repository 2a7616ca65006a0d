//! One file of weights: safetensors, or what PyTorch saves.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use supra_checkpoint::header::{self, HeaderError};
use supra_checkpoint::pytorch::{self, Listing};
use tch::{Kind, Tensor};

use crate::model::ModelError;

/// A file whose header has been read, and nothing else.
pub struct WeightFile {
    path: PathBuf,
    content: Content,
}

enum Content {
    SafeTensors {
        /// Byte of the file at which the data begin.
        start: u64,
        metadata: Metadata,
    },
    PyTorch(Listing),
}

/// Whether a file's name is one that PyTorch's users give to what `torch.save` writes.
pub fn is_pytorch(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    matches!(extension, Some("bin" | "pt" | "pth"))
}

impl WeightFile {
    /// Reads the header.
    pub fn open(path: &Path) -> Result<WeightFile, ModelError> {
        let content = if is_pytorch(path) {
            Content::PyTorch(Listing::open(path)?)
        } else {
            let (start, metadata) = read_header(path)?;
            Content::SafeTensors { start, metadata }
        };
        Ok(WeightFile {
            path: path.to_owned(),
            content,
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is called in messages.
    pub fn format(&self) -> &'static str {
        match &self.content {
            Content::SafeTensors { .. } => "safetensors",
            Content::PyTorch(listing) if !listing.has_checksums() => "PyTorch (without checksums)",
            Content::PyTorch(_) => "PyTorch",
        }
    }

    /// Names of its tensors.
    pub fn names(&self) -> Vec<String> {
        match &self.content {
            Content::SafeTensors { metadata, .. } => metadata.tensors().into_keys().collect(),
            Content::PyTorch(listing) => listing.tensors().keys().cloned().collect(),
        }
    }

    /// The shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        match &self.content {
            Content::SafeTensors { metadata, .. } => {
                let sizes = metadata.info(name)?.shape.iter();
                Some(sizes.map(|&size| size as i64).collect())
            }
            Content::PyTorch(listing) => {
                let sizes = listing.tensors().get(name)?.window.shape.iter();
                Some(sizes.map(|&size| size.cast_signed()).collect())
            }
        }
    }

    /// Reads a tensor in its own kind, on the CPU. None if there is none of this name.
    pub fn read(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let (bytes, kind, found) = match &self.content {
            Content::SafeTensors { start, metadata } => {
                let Some(info) = metadata.info(name) else {
                    return Ok(None);
                };
                let (begin, end) = info.data_offsets;
                let bytes = self.read_at(start + begin as u64, end - begin)?;
                (bytes, kind_of(info.dtype), format!("{:?}", info.dtype))
            }
            Content::PyTorch(listing) => {
                let Some(tensor) = listing.tensors().get(name) else {
                    return Ok(None);
                };
                let bytes = listing.read(&self.path, name)?.unwrap_or_default();
                let found = format!("{:?}", tensor.dtype);
                (bytes, kind_of_pytorch(tensor.dtype), found)
            }
        };
        let kind = kind.ok_or_else(|| ModelError::Dtype {
            path: self.path.clone(),
            tensor: name.to_owned(),
            found,
        })?;
        let shape = self.shape(name).unwrap_or_default();
        Ok(Some(Tensor::f_from_data_size(&bytes, &shape, kind)?))
    }

    fn read_at(&self, start: u64, length: usize) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; length];
        File::open(&self.path)
            .and_then(|mut file| {
                file.seek(SeekFrom::Start(start))?;
                file.read_exact(&mut bytes)
            })
            .map_err(|source| ModelError::Io {
                action: "read",
                path: self.path.clone(),
                source,
            })?;
        Ok(bytes)
    }
}

/// Where the data begins, and what the header says; the file is as long as it should be.
fn read_header(path: &Path) -> Result<(u64, Metadata), ModelError> {
    let io = |source| ModelError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    header::read(&mut file, bytes).map_err(|error| match error {
        HeaderError::Io(source) => io(source),
        HeaderError::Format(source) => ModelError::SafeTensors {
            path: path.to_owned(),
            source,
        },
        HeaderError::Length { expected, found } => ModelError::Length {
            path: path.to_owned(),
            expected,
            found,
        },
    })
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        _ => return None,
    })
}

fn kind_of_pytorch(dtype: pytorch::Dtype) -> Option<Kind> {
    Some(match dtype {
        pytorch::Dtype::F64 => Kind::Double,
        pytorch::Dtype::F32 => Kind::Float,
        pytorch::Dtype::F16 => Kind::Half,
        pytorch::Dtype::BF16 => Kind::BFloat16,
        pytorch::Dtype::I64 => Kind::Int64,
        pytorch::Dtype::I32 => Kind::Int,
        _ => return None,
    })
}
