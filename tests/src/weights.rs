//! Looking into safetensors files: equality to the bit, and damage on purpose.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::failure::{Failure, Result, While};

/// BLAKE3 of every tensor (type, shape, bytes) of a checkpoint, by `FILE:NAME`.
pub type Hashes = BTreeMap<String, blake3::Hash>;

/// The hashes of all tensors in the safetensors files of a directory.
///
/// Files are not compared as they are: their headers may name the run or the generation.
pub fn hashes(directory: &Path) -> Result<Hashes> {
    let mut hashes = BTreeMap::new();
    for entry in std::fs::read_dir(directory).while_doing(directory.display())? {
        let path = entry?.path();
        if path
            .extension()
            .is_none_or(|extension| extension != "safetensors")
        {
            continue;
        }
        let bytes = std::fs::read(&path)?;
        let tensors = SafeTensors::deserialize(&bytes).while_doing(path.display())?;
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        for (name, tensor) in tensors.iter() {
            let mut hasher = blake3::Hasher::new();
            hasher.update(format!("{:?} {:?}", tensor.dtype(), tensor.shape()).as_bytes());
            hasher.update(tensor.data());
            hashes.insert(format!("{file}:{name}"), hasher.finalize());
        }
    }
    if hashes.is_empty() {
        return Err(Failure::new(format!(
            "no tensors in {}",
            directory.display()
        )));
    }
    Ok(hashes)
}

/// Fails, naming the tensors, unless both directories hold the same bits.
pub fn expect_same(one: &Path, other: &Path) -> Result<()> {
    expect(&hashes(one)?, other).while_doing(one.display())
}

/// Fails, naming the tensors, unless a directory holds the tensors of these [`hashes`].
pub fn expect(expected: &Hashes, directory: &Path) -> Result<()> {
    let found = hashes(directory)?;
    let differing: Vec<_> = expected
        .keys()
        .chain(found.keys().filter(|name| !expected.contains_key(*name)))
        .filter(|name| expected.get(*name) != found.get(*name))
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{} of {} tensors in {} differ from those expected: {differing:?}",
        differing.len(),
        expected.len(),
        directory.display()
    )))
}

/// Rewrites a file with one tensor's bytes changed by `damage`.
pub fn alter(file: &Path, tensor: &str, damage: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
    let bytes = std::fs::read(file)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let mut altered = tensors.tensor(tensor)?.data().to_vec();
    damage(&mut altered);
    let views = tensors.iter().map(|(name, view)| -> Result<_> {
        let data = if name == tensor {
            &altered
        } else {
            view.data()
        };
        Ok((
            name.to_owned(),
            TensorView::new(view.dtype(), view.shape().to_vec(), data)?,
        ))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    let rewritten = safetensors::serialize(views, None)?;
    std::fs::write(file, rewritten)?;
    Ok(())
}
