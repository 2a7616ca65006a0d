//! Weights that PyTorch saved.

use std::io::Cursor;

use supra_checkpoint::pytorch::Listing;

/// A file of `torch.save`. Every tensor that is listed is read in its own size, or refused.
pub fn pickle(data: &[u8]) {
    let mut file = Cursor::new(data);
    let Ok(listing) = Listing::from_reader(&mut file) else {
        return;
    };
    for (name, tensor) in listing.tensors() {
        if let Ok(bytes) = listing.read_from(&mut file, name) {
            let bytes = bytes.expect("it is listed");
            let shape = &tensor.window.shape;
            // The product of the others may be beyond all numbers then.
            let elements = match shape.contains(&0) {
                true => 0,
                false => shape.iter().product(),
            };
            let expected = elements * tensor.dtype.bytes();
            assert_eq!(bytes.len() as u64, expected, "{name}");
        }
    }
}
