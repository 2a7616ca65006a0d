//! The tensors of a model: read from whatever files hold them, written as safetensors.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::{Dtype, View};
use supra_checkpoint::{EXP_AVG, EXP_AVG_SQ, Manifest, PUBLISHED};
use tch::{Device, Kind, Tensor};

use super::find::{self, Weights};
use super::meta::Cut;
use super::weight_file::WeightFile;
use crate::model::ModelError;

/// One file of weights.
pub const SINGLE: &str = "model.safetensors";
/// Which shard holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// All tensors of a model directory, or of one file. Opening reads the headers only.
pub struct TensorFiles {
    root: PathBuf,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    /// Numbers of the files that hold it: several if a model was cut for as many devices.
    files: Vec<usize>,
    shape: Vec<i64>,
    cut: Cut,
}

impl TensorFiles {
    /// Opens the weights of a model directory, whoever wrote them, the file of weights that is named, or the masters of a
    /// checkpoint.
    pub fn open(model: &Path) -> Result<TensorFiles, ModelError> {
        if model.join(PUBLISHED).is_file() {
            return TensorFiles::open_checkpoint(model);
        }
        match find::weights(model)? {
            Weights::Files(files) => TensorFiles::open_files(model, &files),
            Weights::Indexed(index) => TensorFiles::open_shards(model, &index),
            Weights::Cut(files) => TensorFiles::open_cut(model, &files),
        }
    }

    /// Opens one file.
    pub fn open_file(path: &Path) -> Result<TensorFiles, ModelError> {
        TensorFiles::open_files(path, &[path.to_owned()])
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
        let shards: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
        let files = TensorFiles::open_files(dir, &shards)?;
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

    /// Opens files of which each holds other tensors.
    fn open_files(root: &Path, paths: &[PathBuf]) -> Result<TensorFiles, ModelError> {
        let files = open_all(paths)?;
        let mut tensors = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.names() {
                let entry = Entry {
                    files: vec![number],
                    shape: file.shape(&name).unwrap_or_default(),
                    cut: Cut::Copies,
                };
                if let Some(first) = tensors.insert(name.clone(), entry) {
                    let reason = format!(
                        "tensor `{name}` is also in {}; remove one of the files",
                        files[first.files[0]].path().display()
                    );
                    return Err(ModelError::NoWeights {
                        path: file.path().to_owned(),
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
        let masters = manifest.tensors.into_iter();
        let masters: Vec<_> = masters.filter(|(name, _)| !is_moment(name)).collect();
        let slices = masters.iter().flat_map(|(_, tensor)| &tensor.slices);
        let names: BTreeSet<String> = slices.map(|slice| slice.file.clone()).collect();
        let paths: Vec<PathBuf> = names.iter().map(|name| dir.join(name)).collect();
        let files = open_all(&paths)?;
        let numbers: BTreeMap<String, usize> = names.into_iter().zip(0..).collect();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in masters {
            let mut covered = 0;
            for slice in &tensor.slices {
                let shape = files[numbers[&slice.file]].shape(&name).unwrap_or_default();
                let there: i64 = shape.iter().product();
                if slice.key != name || slice.start != covered || slice.end != covered + there {
                    let file = &slice.file;
                    return Err(damaged(format!(
                        "says of `{name}` in {file} what is not so"
                    )));
                }
                covered = slice.end;
            }
            if covered != tensor.shape.iter().product::<i64>() {
                return Err(damaged(format!("has not all of `{name}`")));
            }
            let entry = Entry {
                files: tensor
                    .slices
                    .iter()
                    .map(|slice| numbers[&slice.file])
                    .collect(),
                shape: tensor.shape,
                cut: Cut::Along(0),
            };
            tensors.insert(name, entry);
        }
        Ok(TensorFiles {
            root: dir.to_owned(),
            files,
            tensors,
        })
    }

    /// Opens Meta's files of which each holds a part of every tensor.
    fn open_cut(root: &Path, paths: &[PathBuf]) -> Result<TensorFiles, ModelError> {
        let files = open_all(paths)?;
        let mut shapes: BTreeMap<String, Vec<(usize, Vec<i64>)>> = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for name in file.names() {
                let shape = file.shape(&name).unwrap_or_default();
                shapes.entry(name).or_default().push((number, shape));
            }
        }
        let width = shapes
            .get("norm.weight")
            .and_then(|parts| parts[0].1.first().copied());
        let mut tensors = BTreeMap::new();
        for (name, parts) in shapes {
            let (numbers, parts): (Vec<usize>, Vec<Vec<i64>>) = parts.into_iter().unzip();
            let joined = match numbers.len() == files.len() {
                true => Cut::of(&name, &parts[0], width).join(&parts),
                false => Err(format!(
                    "it is in {} of {} files",
                    numbers.len(),
                    files.len()
                )),
            };
            let (cut, shape) = joined.map_err(|problem| ModelError::NoWeights {
                path: root.to_owned(),
                reason: format!("the files are not the parts of one model: `{name}`: {problem}"),
            })?;
            tensors.insert(
                name,
                Entry {
                    files: numbers,
                    shape,
                    cut,
                },
            );
        }
        Ok(TensorFiles {
            root: root.to_owned(),
            files,
            tensors,
        })
    }

    /// The directory or file that was opened.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Number and format of the files, as people say it.
    pub fn describe(&self) -> String {
        let format = self.files.first().map_or("no", WeightFile::format);
        match self.files.len() {
            1 => format!("one {format} file"),
            count => format!("{count} {format} files"),
        }
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The file that holds a tensor, or its first part.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        let entry = self.tensors.get(name)?;
        Some(self.files[entry.files[0]].path())
    }

    /// The shape of a tensor, from its files' headers.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors.get(name).map(|entry| entry.shape.clone())
    }

    /// Whether a tensor is put together from several files.
    pub fn is_cut(&self, name: &str) -> bool {
        let entry = self.tensors.get(name);
        entry.is_some_and(|entry| entry.files.len() > 1 && entry.cut != Cut::Copies)
    }

    /// Reads a tensor in its own kind, on the CPU. None if there is none of this name.
    pub fn read(&self, name: &str) -> Result<Option<Tensor>, ModelError> {
        let Some(Entry { files, shape, cut }) = self.tensors.get(name) else {
            return Ok(None);
        };
        let mut parts = Vec::new();
        for &number in files {
            parts.extend(self.files[number].read(name)?);
        }
        match (cut, parts.as_slice()) {
            (_, [_]) => Ok(parts.pop()),
            // A rank's part of a tensor is flat.
            (Cut::Along(axis), _) => Ok(Some(Tensor::f_cat(&parts, *axis)?.f_reshape(shape)?)),
            (Cut::Copies, parts) => match parts.iter().find(|part| **part != parts[0]) {
                None => Ok(Some(parts[0].shallow_clone())),
                Some(_) => Err(ModelError::NoWeights {
                    path: self.root.clone(),
                    reason: format!(
                        "`{name}` differs from file to file, although every file should hold the same; they do not \
                         belong together"
                    ),
                }),
            },
        }
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

fn open_all(paths: &[PathBuf]) -> Result<Vec<WeightFile>, ModelError> {
    paths.iter().map(|path| WeightFile::open(path)).collect()
}

fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    )
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
