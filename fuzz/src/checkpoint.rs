//! What checkpoints and models are made of.

use std::path::Path;

use safetensors::SafeTensors;
use supra_checkpoint::{Manifest, header};

/// The manifest of a checkpoint. What is read, written and read again is the same.
pub fn manifest(data: &[u8]) {
    let path = Path::new("manifest.json");
    let Ok(manifest) = Manifest::parse(data, path) else {
        return;
    };
    let again = Manifest::parse(&manifest.to_bytes(), path).expect("written by us");
    assert_eq!(again, manifest);
}

/// The header of a safetensors file. Every tensor of a header that is taken lies in the file, and other readers agree.
pub fn safetensors(data: &[u8]) {
    let bytes = data.len() as u64;
    let Ok((start, metadata)) = header::read(&mut &*data, bytes) else {
        return;
    };
    let file = SafeTensors::deserialize(data).expect("the library of the format takes it, too");
    for (name, info) in metadata.tensors() {
        let (from, to) = info.data_offsets;
        assert!(from <= to && start + to as u64 <= bytes, "{name}");
        let view = file.tensor(&name).expect("the same tensors");
        assert_eq!(
            (view.dtype(), view.shape()),
            (info.dtype, info.shape.as_slice())
        );
        assert_eq!(view.data().len(), to - from);
    }
}
