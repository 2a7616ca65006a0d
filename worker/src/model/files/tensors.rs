//! Reading and writing safetensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap, btree_map};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, TensorInfo, View};
use supra_checkpoint::{EXP_AVG, EXP_AVG_SQ, Manifest, PUBLISHED};
use tch::{Device, Kind, Tensor};

use crate::model::ModelError;

/// One file of weights.
pub const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a model directory, or of one file. Opening reads the headers only.
pub struct TensorFiles {
    root: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where its bytes are, in order.
    pieces: Vec<Extent>,
}

/// Some bytes of a tensor.
struct Extent {
    file: usize,
    /// Byte of the file at which they begin.
    offset: u64,
    bytes: usize,
}

impl TensorFiles {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, or the masters of a checkpoint.
    pub fn open(dir: &Path) -> Result<TensorFiles, ModelError> {
        if dir.join(PUBLISHED).is_file() {
            return TensorFiles::open_checkpoint(dir);
        }
        let single = dir.join(SINGLE);
        if single.is_file() {
            return TensorFiles::open_files(dir, vec![single]);
        }
        let index = dir.join(INDEX);
        if index.is_file() {
            return TensorFiles::open_shards(dir, &index);
        }
        let pickles = [
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "consolidated.00.pth",
        ];
        let reason = match pickles.iter().find(|name| dir.join(name).exists()) {
            Some(pickle) => format!(
                "the weights are a pickle ({pickle}), which is never read; save them as safetensors"
            ),
            None if !dir.is_dir() => "no such directory".to_owned(),
            None => format!(
                "neither {SINGLE} nor {INDEX}; give a model directory with weights in safetensors"
            ),
        };
        Err(ModelError::NoWeights {
            path: dir.to_owned(),
            reason,
        })
    }

    /// Opens one file.
    pub fn open_file(path: &Path) -> Result<TensorFiles, ModelError> {
        TensorFiles::open_files(path, vec![path.to_owned()])
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<TensorFiles, ModelError> {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let damaged = |reason| ModelError::NoWeights {
            path: index.to_owned(),
            reason,
        };
        let text = fs::read(index).map_err(|source| ModelError::Io {
            action: "read",
            path: index.to_owned(),
            source,
        })?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|source| ModelError::Json {
                path: index.to_owned(),
                source,
            })?;
        let names: BTreeSet<&String> = weight_map.values().collect();
        if let Some(name) = names.iter().find(|name| !is_plain_file_name(name)) {
            return Err(damaged(format!(
                "names the shard `{name}`; a shard must lie in the directory itself"
            )));
        }
        let files =
            TensorFiles::open_files(dir, names.into_iter().map(|name| dir.join(name)).collect())?;
        match weight_map
            .iter()
            .find(|(tensor, shard)| files.file_of(tensor) != Some(dir.join(shard).as_path()))
        {
            Some((tensor, shard)) => Err(damaged(format!(
                "says that `{tensor}` is in {shard}, but it is not"
            ))),
            None => Ok(files),
        }
    }

    fn open_files(root: &Path, files: Vec<PathBuf>) -> Result<TensorFiles, ModelError> {
        let mut tensors = BTreeMap::new();
        for (file, path) in files.iter().enumerate() {
            let (start, metadata) = read_header(path)?;
            for (name, info) in metadata.tensors() {
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    pieces: vec![Extent::of(file, start, info)],
                };
                if let Some(Entry { pieces, .. }) = tensors.insert(name.clone(), entry) {
                    let reason = format!(
                        "tensor `{name}` is also in {}; remove one of the files",
                        files[pieces[0].file].display()
                    );
                    return Err(ModelError::NoWeights {
                        path: path.clone(),
                        reason,
                    });
                }
            }
        }
        Ok(TensorFiles {
            root: root.to_owned(),
            files,
            tensors,
        })
    }

    /// Opens the masters of a checkpoint, of which each rank has written its part. Its hashes are for whoever reads all of it to
    /// prove.
    fn open_checkpoint(dir: &Path) -> Result<TensorFiles, ModelError> {
        let path = dir.join(PUBLISHED);
        let damaged = |reason: String| ModelError::NoWeights {
            path: path.clone(),
            reason,
        };
        let bytes = fs::read(&path).map_err(|source| ModelError::Io {
            action: "read",
            path: path.clone(),
            source,
        })?;
        let manifest =
            Manifest::parse(&bytes, &path).map_err(|error| damaged(error.to_string()))?;
        let is_moment = |name: &str| name.starts_with(EXP_AVG) || name.starts_with(EXP_AVG_SQ);
        let mut headers = BTreeMap::new();
        let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
        for (name, tensor) in manifest.tensors {
            if is_moment(&name) {
                continue;
            }
            let mut entry = Entry {
                dtype: Dtype::F32,
                shape: tensor.shape.iter().map(|&size| size as usize).collect(),
                pieces: Vec::with_capacity(tensor.slices.len()),
            };
            for slice in tensor.slices {
                let (file, start, header) = match headers.entry(slice.file) {
                    btree_map::Entry::Occupied(known) => known.into_mut(),
                    btree_map::Entry::Vacant(new) => {
                        let path = dir.join(new.key());
                        let (start, header) = read_header(&path)?;
                        files.push(path);
                        new.insert((files.len() - 1, start, header))
                    }
                };
                let bytes = (slice.end - slice.start) as usize * size_of::<f32>();
                let info = header.info(&slice.key);
                let info = info.filter(|info| info.dtype == entry.dtype);
                let piece = info.map(|info| Extent::of(*file, *start, info));
                let Some(piece) = piece.filter(|piece| piece.bytes == bytes) else {
                    let reason = format!("says that `{name}` is in it, but it is not as it says");
                    let path = files[*file].clone();
                    return Err(ModelError::NoWeights { path, reason });
                };
                entry.pieces.push(piece);
            }
            let bytes: usize = entry.pieces.iter().map(|piece| piece.bytes).sum();
            if bytes != entry.shape.iter().product::<usize>() * size_of::<f32>() {
                return Err(damaged(format!("has not all of `{name}`")));
            }
            tensors.insert(name, entry);
        }
        Ok(TensorFiles {
            root: dir.to_owned(),
            files,
            tensors,
        })
    }

    /// The directory or file that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The file that holds a tensor, or the beginning of it.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.tensors
            .get(name)
            .map(|entry| self.files[entry.pieces[0].file].as_path())
    }

    /// The shape of a tensor, from its file's header.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors
            .get(name)
            .map(|entry| entry.shape.iter().map(|&size| size as i64).collect())
    }

    /// Reads a tensor in its own kind, on the CPU. None if there is none of this name.
    pub fn read(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some(Entry {
            dtype,
            shape,
            pieces,
        }) = self.tensors.get(name)
        else {
            return Ok(None);
        };
        let kind = kind_of(*dtype).ok_or_else(|| ModelError::Dtype {
            path: self.files[pieces[0].file].clone(),
            tensor: name.to_owned(),
            found: format!("{dtype:?}"),
        })?;
        let mut bytes = vec![0; pieces.iter().map(|piece| piece.bytes).sum()];
        let mut rest = &mut bytes[..];
        for piece in pieces {
            let path = &self.files[piece.file];
            let (here, later) = rest.split_at_mut(piece.bytes);
            rest = later;
            File::open(path)
                .and_then(|mut file| {
                    file.seek(SeekFrom::Start(piece.offset))?;
                    file.read_exact(here)
                })
                .map_err(|source| ModelError::Io {
                    action: "read",
                    path: path.clone(),
                    source,
                })?;
        }
        let shape: Vec<i64> = shape.iter().map(|&size| size as i64).collect();
        Ok(Some(Tensor::f_from_data_size(&bytes, &shape, kind)?))
    }

    /// Reads a weight: fp32, on the CPU, every value finite.
    pub fn read_weight(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some(tensor) = self.read(name)? else {
            return Ok(None);
        };
        let path = || self.file_of(name).unwrap_or(&self.root).to_owned();
        if !matches!(tensor.kind(), Kind::Float | Kind::Half | Kind::BFloat16) {
            let found = format!("{:?}", tensor.kind());
            return Err(ModelError::Dtype {
                path: path(),
                tensor: name.to_owned(),
                found,
            });
        }
        let tensor = tensor.f_to_kind(Kind::Float)?;
        let count = tensor.numel() as i64
            - tensor
                .f_isfinite()?
                .f_sum(Kind::Int64)?
                .f_int64_value(&[])?;
        match count {
            0 => Ok(Some(tensor)),
            count => Err(ModelError::NonFinite {
                path: path(),
                tensor: name.to_owned(),
                count,
            }),
        }
    }
}

impl Extent {
    /// All of a tensor of a file whose data begins at byte `start`.
    fn of(file: usize, start: u64, info: &TensorInfo) -> Extent {
        let (first, last) = info.data_offsets;
        Extent {
            file,
            offset: start + first as u64,
            bytes: last - first,
        }
    }
}

fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    )
}

/// Where the data begins, and what the header says; the file is as long as it should be.
fn read_header(path: &Path) -> Result<(u64, Metadata), ModelError> {
    use supra_checkpoint::header::HeaderError;
    let io = |source| ModelError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    supra_checkpoint::header::read(&mut file, bytes).map_err(|error| match error {
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

fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        _ => return None,
    })
}

/// A tensor as the format's writer wants it; copied out of libtorch only while it is written.
struct Stored {
    tensor: Tensor,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.tensor
            .to_device(Device::Cpu)
            .copy_data_u8(&mut bytes, self.tensor.numel());
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// Writes one file, tensors in their own kinds, and waits until the disk has it.
pub fn write(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<(), ModelError> {
    let io = |source| ModelError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    };
    let mut stored = Vec::new();
    for (name, tensor) in tensors {
        let dtype = dtype_of(tensor.kind()).ok_or_else(|| ModelError::Dtype {
            path: path.to_owned(),
            tensor: name.clone(),
            found: format!("{:?}", tensor.kind()),
        })?;
        let shape = tensor
            .size()
            .into_iter()
            .map(|size| size as usize)
            .collect();
        stored.push((
            name,
            Stored {
                tensor,
                dtype,
                shape,
            },
        ));
    }
    // Other libraries ask for this before they read a file.
    let information = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(stored, Some(information), path).map_err(
        |source| match source {
            safetensors::SafeTensorError::IoError(source) => io(source),
            source => ModelError::SafeTensors {
                path: path.to_owned(),
                source,
            },
        },
    )?;
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(io)
}
