//! What a file holds: the names, kinds and shapes of its weights, and where their values lie.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek},
    path::Path,
    sync::{Mutex, PoisonError},
};

use super::{
    Dtype, Fault, PyTorchError,
    pickle::{self, shown},
    value::{Id, Value, Values},
    view::{Storage, Window},
    zip::{self, Directory, Record},
};

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// The kind of its elements.
    pub dtype: Dtype,
    /// Where it lies in its storage.
    pub window: Window,
    /// The bytes of its storage in the file. Tensors may share them.
    pub storage: Record,
}

/// The weights of a file. Making it reads the directory and the pickle, and no values.
#[derive(Debug)]
pub struct Listing {
    tensors: BTreeMap<String, StoredTensor>,
    checksums: bool,
    /// Storages whose CRC-32 was compared as a whole, by their first byte.
    verified: Mutex<BTreeSet<u64>>,
}

impl Listing {
    /// Lists a file.
    ///
    /// # Errors
    /// When it is none that PyTorch wrote, damaged, holds no dictionary of tensors, or asks for anything else.
    pub fn open(path: &Path) -> Result<Listing, PyTorchError> {
        File::open(path)
            .map_err(Fault::Io)
            .and_then(|mut file| Listing::from_reader(&mut file))
            .map_err(|fault| fault.of(path))
    }

    /// Lists what a reader gives.
    ///
    /// # Errors
    /// As [`Listing::open`].
    pub fn from_reader(reader: &mut (impl Read + Seek)) -> Result<Listing, Fault> {
        let directory = Directory::read(reader)?;
        let folder = folder(&directory)?;
        check_byte_order(reader, &directory, &folder)?;
        let name = format!("{folder}data.pkl");
        let record = directory.find(reader, &name)?;
        let record = record.expect("invariant: the folder was found by this name");
        let pickle = zip::read_record(reader, &record, &name)?;
        let (values, root) = pickle::run(&pickle)?;
        let mut tensors = BTreeMap::new();
        let mut records = BTreeMap::new();
        for (name, storage, window) in weights(&values, root)? {
            let record = match records.get(storage.key) {
                Some(record) => *record,
                None => {
                    let key = format!("{folder}data/{}", storage.key);
                    let found = directory.find(reader, &key)?;
                    let missing = || Fault::Damaged(format!("it has no record `{}`", shown(&key)));
                    *records
                        .entry(storage.key)
                        .or_insert(found.ok_or_else(missing)?)
                }
            };
            if storage.elements.checked_mul(storage.dtype.bytes()) != Some(record.bytes) {
                return Err(Fault::Damaged(format!(
                    "the storage of `{}` has {} bytes, its pickle speaks of {} elements of {:?}",
                    shown(name),
                    record.bytes,
                    storage.elements,
                    storage.dtype
                )));
            }
            let tensor = StoredTensor {
                dtype: storage.dtype,
                window: window.clone(),
                storage: record,
            };
            if tensors.insert(name.to_owned(), tensor).is_some() {
                return Err(Fault::Damaged(format!("it holds `{}` twice", shown(name))));
            }
        }
        Ok(Listing {
            tensors,
            checksums: directory.has_checksums(),
            verified: Mutex::default(),
        })
    }

    /// Whether the file keeps a CRC-32 of its values.
    pub fn has_checksums(&self) -> bool {
        self.checksums
    }

    /// All weights, by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The values of a weight of the file that was listed: little-endian, the last axis fastest. None if there is none of this
    /// name.
    ///
    /// # Errors
    /// When the file cannot be read or is not what was written.
    pub fn read(&self, path: &Path, name: &str) -> Result<Option<Vec<u8>>, PyTorchError> {
        File::open(path)
            .map_err(Fault::Io)
            .and_then(|mut file| self.read_from(&mut file, name))
            .map_err(|fault| fault.of(path))
    }

    /// As [`Listing::read`], from a reader.
    ///
    /// # Errors
    /// As [`Listing::read`].
    pub fn read_from(
        &self,
        reader: &mut (impl Read + Seek),
        name: &str,
    ) -> Result<Option<Vec<u8>>, Fault> {
        let Some(tensor) = self.tensors.get(name) else {
            return Ok(None);
        };
        let StoredTensor {
            dtype,
            window,
            storage,
        } = tensor;
        let length = window.spanned() * dtype.bytes();
        if length == 0 {
            return Ok(Some(Vec::new()));
        }
        let start = storage.start + window.first * dtype.bytes();
        let bytes = zip::read_at(reader, start, length)?;
        if length == storage.bytes {
            zip::check(crc32fast::hash(&bytes), storage)?;
        } else {
            self.verify(reader, storage)?;
        }
        Ok(Some(match window.is_contiguous() {
            true => bytes,
            false => window.gather(&bytes, dtype.bytes() as usize),
        }))
    }

    /// Compares the CRC-32 of a storage of which tensors are parts, once.
    fn verify(&self, reader: &mut (impl Read + Seek), storage: &Record) -> Result<(), Fault> {
        let known = || self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        if storage.crc.is_none() || known().contains(&storage.start) {
            return Ok(());
        }
        zip::verify(reader, storage)?;
        known().insert(storage.start);
        Ok(())
    }
}

/// The folder of the archive in which everything lies, with its slash.
fn folder(directory: &Directory) -> Result<String, Fault> {
    let mut folders = directory.names().filter_map(|name| {
        let folder = name.strip_suffix("data.pkl")?;
        (folder.matches('/').count() == 1 && folder.ends_with('/')).then_some(folder)
    });
    match (folders.next(), folders.next()) {
        (Some(folder), None) => {
            let script = format!("{folder}constants.pkl");
            match directory.names().any(|name| name == script) {
                true => Err(Fault::Unfit(
                    "a TorchScript archive: a program with weights. Load it with torch.jit.load and save its state_dict \
                     with torch.save"
                        .to_owned(),
                )),
                false => Ok(folder.to_owned()),
            }
        }
        _ => Err(Fault::Unfit(
            "a zip archive, but not one of torch.save: there is not one `data.pkl` in a folder"
                .to_owned(),
        )),
    }
}

/// Refuses values of machines that store the highest byte first.
fn check_byte_order(
    reader: &mut (impl Read + Seek),
    directory: &Directory,
    folder: &str,
) -> Result<(), Fault> {
    let name = format!("{folder}byteorder");
    let Some(record) = directory.find(reader, &name)? else {
        // Older writers do not say, and were never used elsewhere.
        return Ok(());
    };
    match zip::read_record(reader, &record, &name)?.as_slice() {
        b"little" => Ok(()),
        _ => Err(Fault::Unfit(
            "written with the highest byte first, which is not read. Load it with PyTorch here and save it again"
                .to_owned(),
        )),
    }
}

/// The tensors of the dictionary that a pickle leaves, or of the `state_dict` in it.
fn weights<'v, 'p>(
    values: &'v Values<'p>,
    root: Id,
) -> Result<Vec<(&'p str, Storage<'p>, &'v Window)>, Fault> {
    let Value::Dict(top) = values.get(root) else {
        let kind = values.get(root).kind();
        return Err(Fault::Unfit(format!(
            "holds {kind}, not a dictionary of tensors"
        )));
    };
    let nested = top
        .iter()
        .find_map(|&(key, value)| match (values.get(key), values.get(value)) {
            (Value::Text("state_dict"), Value::Dict(nested)) => Some(nested),
            _ => None,
        });
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for &(key, value) in nested.unwrap_or(top) {
        match (values.get(key), values.get(value)) {
            (Value::Text(name), Value::Tensor(storage, window)) => {
                found.push((*name, *storage, window));
            }
            other => others.push(other),
        }
    }
    if others.is_empty() && !found.is_empty() {
        return Ok(found);
    }
    let examples = others.iter().take(5).map(|(key, value)| match key {
        Value::Text(name) => format!("`{}` is {}", shown(name), value.kind()),
        key => format!("a name is {}", key.kind()),
    });
    Err(Fault::Unfit(format!(
        "holds {} tensors and {} other entries ({}). Weights are expected by name, alone, at the top or under `state_dict`",
        found.len(),
        others.len(),
        examples.collect::<Vec<_>>().join(", ")
    )))
}
