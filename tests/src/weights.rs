//! Looking into safetensors files: equality to the bit, and damage on purpose.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

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

/// The fp32 weights of a model directory, by name.
pub type Weights = BTreeMap<String, Vec<f32>>;

/// Reads `model.safetensors`.
pub fn model(directory: &Path) -> Result<Weights> {
    let path = directory.join("model.safetensors");
    let bytes = std::fs::read(&path).while_doing(path.display())?;
    let tensors = SafeTensors::deserialize(&bytes).while_doing(path.display())?;
    let mut weights = BTreeMap::new();
    for (name, tensor) in tensors.iter() {
        if tensor.dtype() != Dtype::F32 {
            let place = path.display();
            return Err(Failure::new(format!("{name} in {place} is not fp32")));
        }
        let numbers = tensor.data().as_chunks().0.iter();
        weights.insert(
            name.to_owned(),
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
