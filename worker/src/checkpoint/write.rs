//! Writing a checkpoint: rank 0, everything synced. The manifest comes last, and not from here.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
};

use serde_json::json;
use supra_checkpoint::{
    EXP_AVG, EXP_AVG_SQ, Manifest, PUBLISHED, StoredError,
    manifest::{Slice, StoredFile, StoredTensor},
    store,
};
use tch::Tensor;

use super::{
    CheckpointError,
    safetensors::{Entry, SafetensorsFile},
};
use crate::{
    collective::DeviceCollective,
    model::{ModelConfig, files::save::copy_companions},
    optim::{Replica, Section, Slot},
};

/// Most bytes of tensors in one file; a single larger tensor has a file of its own.
const FILE_BYTES: u64 = 4 << 30;

/// Room beside the tensors: headers, manifest, tokenizer.
const OVERHEAD_BYTES: u64 = 32 << 20;

/// What is written.
pub struct Contents<'a> {
    /// Masters, moments and update counter.
    pub replica: &'a mut Replica,
    /// The ranks that keep parts of them: the others call [`hand_over`].
    pub collective: &'a mut dyn DeviceCollective,
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// Directory whose tokenizer files belong to the model, if there is one.
    pub base: Option<&'a Path>,
    /// All facts; tensors and files are filled in here.
    pub manifest: Manifest,
}

/// What was written: all but the manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// Directory, relative to the checkpoint root.
    pub relative: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// The manifest's text before and after the ledger's head.
    pub manifest: [String; 2],
}

/// Gives rank 0 this rank's part of what it writes.
pub fn hand_over(
    replica: &mut Replica,
    collective: &mut dyn DeviceCollective,
) -> Result<(), CheckpointError> {
    for section in Section::ALL {
        let _whole = replica.whole(section, collective)?;
    }
    Ok(())
}

/// Writes a checkpoint below `root` but for its manifest, which lacks the ledger's head.
///
/// What a crashed try of the same step and generation left is replaced; a published checkpoint never is. When writing
/// fails, nothing stays: half a checkpoint is of no use and takes room.
pub fn write(root: &Path, contents: Contents) -> Result<Receipt, CheckpointError> {
    let manifest = &contents.manifest;
    let relative = store::directory_name(manifest.step, manifest.generation);
    let dir = root.join(&relative);
    let needed = 3 * 4 * contents.replica.layout().numbers() as u64 + OVERHEAD_BYTES;
    store::ensure_room(root, needed)?;
    make_directory(&dir)?;
    match fill(&dir, contents).and_then(|filled| Ok(store::sync_directory(root).map(|()| filled)?))
    {
        Ok((bytes, manifest)) => Ok(Receipt {
            relative,
            bytes,
            manifest,
        }),
        Err(error) => {
            let _ = fs::remove_dir_all(&dir);
            Err(error)
        }
    }
}

/// Writes and syncs all files but the manifest. Returns their bytes and the manifest's text.
fn fill(dir: &Path, contents: Contents) -> Result<(u64, [String; 2]), CheckpointError> {
    let Contents {
        replica,
        collective,
        config,
        base,
        mut manifest,
    } = contents;
    let mut writer = Writer {
        dir,
        replica,
        collective,
        section: None,
        tensors: BTreeMap::new(),
        files: BTreeMap::new(),
    };
    writer.model()?;
    writer.optimizer()?;
    writer.side_files(config, base)?;
    manifest.tensors = writer.tensors;
    manifest.files = writer.files;
    store::sync_directory(dir)?;
    let bytes = manifest.files.values().map(|file| file.bytes).sum();
    Ok((bytes, manifest.around_head()))
}

fn make_directory(dir: &Path) -> Result<(), CheckpointError> {
    let failed = |source| CheckpointError::writing(dir, source);
    if dir.join(PUBLISHED).exists() {
        let problem = "it is published already and is never overwritten".to_owned();
        return Err(StoredError::Foreign {
            path: dir.to_owned(),
            problem,
        }
        .into());
    }
    if dir.is_dir() {
        fs::remove_dir_all(dir).map_err(failed)?;
    }
    fs::create_dir_all(dir).map_err(failed)
}

/// Collects what the manifest says about the files while they are written.
struct Writer<'a> {
    dir: &'a Path,
    replica: &'a mut Replica,
    collective: &'a mut dyn DeviceCollective,
    /// The section in hand, whole.
    section: Option<(Section, Tensor)>,
    tensors: BTreeMap<String, StoredTensor>,
    files: BTreeMap<String, StoredFile>,
}

impl Writer<'_> {
    /// The masters, in files that any reader of model directories understands.
    fn model(&mut self) -> Result<(), CheckpointError> {
        let entries = self.entries("", Section::Masters);
        let names = self.tensors("model", entries)?;
        if names.len() > 1 {
            let slots = self.replica.layout().slots();
            let total: u64 = slots.iter().map(|slot| slot.elements as u64 * 4).sum();
            let weight_map: BTreeMap<&str, &str> = slots
                .iter()
                .map(|slot| {
                    (
                        slot.name.as_str(),
                        self.tensors[&slot.name].slices[0].file.as_str(),
                    )
                })
                .collect();
            let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
            let path = self.dir.join("model.safetensors.index.json");
            fs::write(&path, format!("{index:#}\n"))
                .map_err(|source| CheckpointError::writing(&path, source))?;
        }
        Ok(())
    }

    fn optimizer(&mut self) -> Result<(), CheckpointError> {
        let mut entries = self.entries(EXP_AVG, Section::ExpAvg);
        entries.extend(self.entries(EXP_AVG_SQ, Section::ExpAvgSq));
        self.tensors("optimizer", entries).map(drop)
    }

    /// A section of every parameter.
    fn entries(&self, prefix: &str, section: Section) -> Vec<Entry> {
        let entry = |slot: &Slot| Entry {
            key: format!("{prefix}{}", slot.name),
            slot: slot.clone(),
            section,
        };
        self.replica.layout().slots().iter().map(entry).collect()
    }

    /// All numbers of a section. Each is brought together once, since sections are written one after the other.
    fn whole(&mut self, section: Section) -> Result<Tensor, CheckpointError> {
        if let Some((_, flat)) = self.section.as_ref().filter(|(there, _)| *there == section) {
            return Ok(flat.shallow_clone());
        }
        let flat = self.replica.whole(section, self.collective)?;
        self.section = Some((section, flat.shallow_clone()));
        Ok(flat)
    }

    /// Writes one file.
    fn file(&mut self, path: &Path, entries: &[Entry]) -> Result<StoredFile, CheckpointError> {
        let failed = |source| CheckpointError::writing(path, source);
        let mut file = SafetensorsFile::create(path, entries).map_err(failed)?;
        for entry in entries {
            let flat = self.whole(entry.section)?;
            file.append(&entry.slot, &flat).map_err(failed)?;
        }
        file.finish().map_err(failed)
    }

    /// Writes tensors to `<stem>.safetensors`, or to numbered files if one would be too large. Returns their names.
    fn tensors(&mut self, stem: &str, entries: Vec<Entry>) -> Result<Vec<String>, CheckpointError> {
        let groups = group(entries, FILE_BYTES);
        let count = groups.len();
        let mut names = Vec::with_capacity(count);
        for (index, entries) in groups.into_iter().enumerate() {
            let name = match count {
                1 => format!("{stem}.safetensors"),
                _ => format!("{stem}-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let path = self.dir.join(&name);
            let stored = self.file(&path, &entries)?;
            self.files.insert(name.clone(), stored);
            for entry in entries {
                let slice = Slice {
                    file: name.clone(),
                    key: entry.key.clone(),
                    start: 0,
                    end: entry.slot.elements,
                };
                let tensor = StoredTensor {
                    shape: entry.slot.shape.clone(),
                    dtype: "F32".to_owned(),
                    slices: vec![slice],
                };
                self.tensors.insert(entry.key, tensor);
            }
            names.push(name);
        }
        Ok(names)
    }

    /// What makes the directory a model directory: configuration and tokenizer.
    fn side_files(
        &mut self,
        config: &ModelConfig,
        base: Option<&Path>,
    ) -> Result<(), CheckpointError> {
        config
            .save(self.dir)
            .and_then(|()| base.map_or(Ok(()), |base| copy_companions(base, self.dir)))
            .map_err(CheckpointError::companions)?;
        let entries =
            fs::read_dir(self.dir).map_err(|source| CheckpointError::writing(self.dir, source))?;
        for entry in entries {
            let path = entry
                .map_err(|source| CheckpointError::writing(self.dir, source))?
                .path();
            self.adopt(&path)?;
        }
        Ok(())
    }

    /// Syncs and records a small file that is already written, unless it is recorded.
    fn adopt(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        if self.files.contains_key(&name) {
            return Ok(());
        }
        let failed = |source| CheckpointError::writing(path, source);
        File::open(path)
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
        let bytes = fs::read(path).map_err(failed)?;
        let blake3 = blake3::hash(&bytes).to_hex().to_string();
        self.files.insert(
            name,
            StoredFile {
                bytes: bytes.len() as u64,
                blake3,
            },
        );
        Ok(())
    }
}

/// Cuts entries, in order, into groups of at most `limit` bytes; a larger entry is alone.
fn group(entries: Vec<Entry>, limit: u64) -> Vec<Vec<Entry>> {
    let mut groups: Vec<Vec<Entry>> = Vec::new();
    let mut used = 0;
    for entry in entries {
        let bytes = entry.bytes();
        match groups.last_mut() {
            Some(group) if used + bytes <= limit => {
                used += bytes;
                group.push(entry);
            }
            _ => {
                used = bytes;
                groups.push(vec![entry]);
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_stay_below_the_limit_unless_one_tensor_is_larger() {
        let sizes = [10, 20, 30, 100, 5];
        let slots: Vec<Slot> = sizes
            .iter()
            .map(|&elements| Slot {
                name: String::new(),
                shape: vec![elements],
                offset: 0,
                elements,
            })
            .collect();
        let entries = slots
            .into_iter()
            .map(|slot| Entry {
                key: String::new(),
                slot,
                section: Section::Masters,
            })
            .collect();
        let groups = group(entries, 4 * 50);
        let sizes: Vec<Vec<i64>> = groups
            .iter()
            .map(|group| group.iter().map(|entry| entry.slot.elements).collect())
            .collect();
        assert_eq!(sizes, [vec![10, 20], vec![30], vec![100], vec![5]]);
    }
}
