//! Looking into safetensors files: equality to the bit, and damage on purpose.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use supra_checkpoint::{EXP_AVG, EXP_AVG_SQ, PUBLISHED, Store, verify};

use crate::failure::{Failure, Result, While};

/// A tensor as it is stored.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// All tensors of a checkpoint, put together from what its ranks wrote, or of the safetensors files of another directory.
fn stored(directory: &Path) -> Result<BTreeMap<String, Stored>> {
    let mut pieces = BTreeMap::new();
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
            let stored = Stored {
                dtype: tensor.dtype(),
                shape: tensor.shape().to_vec(),
                bytes: tensor.data().to_vec(),
            };
            pieces.insert((file.clone().into_owned(), name.to_owned()), stored);
        }
    }
    if pieces.is_empty() {
        let place = directory.display();
        return Err(Failure::new(format!("no tensors in {place}")));
    }
    if !directory.join(PUBLISHED).exists() {
        let whole = pieces.into_iter().map(|((_, name), stored)| (name, stored));
        return Ok(whole.collect());
    }
    let store = Store::open(&directory.to_string_lossy())?;
    let manifest = verify::manifest(&store, "", None)?;
    let mut tensors = BTreeMap::new();
    for (name, tensor) in manifest.tensors {
        let mut whole: Option<Stored> = None;
        for slice in tensor.slices {
            let missing = || Failure::new(format!("no {} in {}", slice.key, slice.file));
            let key = (slice.file.clone(), slice.key.clone());
            let piece = pieces.remove(&key).ok_or_else(missing)?;
            match &mut whole {
                Some(whole) => whole.bytes.extend(piece.bytes),
                None => whole = Some(piece),
            }
        }
        if let Some(mut whole) = whole {
            whole.shape = tensor.shape.iter().map(|&size| size as usize).collect();
            tensors.insert(name, whole);
        }
    }
    Ok(tensors)
}

/// BLAKE3 of every tensor (type, shape, bytes), by name.
pub type Hashes = BTreeMap<String, blake3::Hash>;

/// The hashes of all tensors of a checkpoint, or of the safetensors files of another directory.
///
/// Files are not compared as they are: their headers may name the run or the generation, and each rank has its own.
pub fn hashes(directory: &Path) -> Result<Hashes> {
    let hash = |(name, tensor): (String, Stored)| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{:?} {:?}", tensor.dtype, tensor.shape).as_bytes());
        hasher.update(&tensor.bytes);
        (name, hasher.finalize())
    };
    Ok(stored(directory)?.into_iter().map(hash).collect())
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

/// The fp32 weights of a model directory, by name.
pub type Weights = BTreeMap<String, Vec<f32>>;

/// Reads those of a checkpoint or a model directory.
pub fn model(directory: &Path) -> Result<Weights> {
    let mut weights = BTreeMap::new();
    for (name, tensor) in stored(directory)? {
        if name.starts_with(EXP_AVG) || name.starts_with(EXP_AVG_SQ) {
            continue;
        }
        if tensor.dtype != Dtype::F32 {
            let place = directory.display();
            return Err(Failure::new(format!("{name} in {place} is not fp32")));
        }
        let numbers = tensor.bytes.as_chunks().0.iter();
        weights.insert(
            name,
            numbers.map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        );
    }
    Ok(weights)
}

/// The length of the difference of two models: the root of the sum of its squares. NaN where one of them has one.
pub fn distance(one: &Weights, other: &Weights) -> Result<f64> {
    let alike = one.keys().eq(other.keys());
    let pairs = || one.values().zip(other.values());
    if !alike || pairs().any(|(one, other)| one.len() != other.len()) {
        return Err(Failure::new("two models have other tensors"));
    }
    let squares = pairs().flat_map(|(one, other)| one.iter().zip(other));
    let squares = squares.map(|(one, other)| f64::from(one - other).powi(2));
    Ok(squares.sum::<f64>().sqrt())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distance_is_that_of_all_numbers_together_and_keeps_nan() {
        let weights = |a: &[f32], b: &[f32]| {
            Weights::from([("a".to_owned(), a.to_vec()), ("b".to_owned(), b.to_vec())])
        };
        let one = weights(&[1.0, 2.0], &[3.0]);
        assert_eq!(distance(&one, &weights(&[4.0, 2.0], &[7.0])).unwrap(), 5.0);
        let lost = distance(&one, &weights(&[1.0, f32::NAN], &[3.0])).unwrap();
        assert!(lost.is_nan());
        distance(&one, &weights(&[1.0], &[3.0])).expect_err("another shape");
    }
}
