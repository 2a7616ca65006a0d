//! Writing what `torch.load` reads: a zip of raw tensors and a pickle that says which is which.
//!
//! The pickle is a fixed sequence of instructions (protocol 2) for numbers, strings, dictionaries and tensors; nothing else is
//! ever written.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use tch::{Device, Kind, Tensor};
use zip::{CompressionMethod, ZipWriter, write::FileOptions};

use crate::model::ModelError;

/// The library begins tensors at multiples of this, so that they can be mapped.
const ALIGNMENT: u16 = 64;

/// A value beside the tensors of a checkpoint.
pub enum Value<'a> {
    /// An integer.
    Number(i64),
    /// A string.
    Text(&'a str),
}

/// Writes a dictionary of `facts` and, as `state_dict`, of `tensors` converted to `kind` one by one; on the disk when it returns.
pub fn write(
    path: &Path,
    facts: &[(&str, Value)],
    tensors: &[(String, Tensor)],
    kind: Kind,
) -> Result<(), ModelError> {
    let io = |source: std::io::Error| ModelError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    };
    let storage = storage_of(kind).ok_or_else(|| ModelError::Dtype {
        path: path.to_owned(),
        tensor: "state_dict".to_owned(),
        found: format!("{kind:?}"),
    })?;
    let file = File::create_new(path).map_err(io)?;
    write_zip(BufWriter::new(file), facts, tensors, kind, storage)
        .and_then(|file| Ok(file.into_inner().map_err(|error| error.into_error())?))
        .and_then(|file| Ok(file.sync_all()?))
        .map_err(|error| match error {
            zip::result::ZipError::Io(source) => io(source),
            error => io(std::io::Error::other(error)),
        })
}

fn write_zip(
    file: BufWriter<File>,
    facts: &[(&str, Value)],
    tensors: &[(String, Tensor)],
    kind: Kind,
    storage: &str,
) -> zip::result::ZipResult<BufWriter<File>> {
    let mut zip = ZipWriter::new(file);
    let options = FileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [
        ("archive/data.pkl", pickle(facts, tensors, storage)),
        ("archive/byteorder", b"little".to_vec()),
    ] {
        zip.start_file(name, options)?;
        zip.write_all(&bytes)?;
    }
    for (index, (_, tensor)) in tensors.iter().enumerate() {
        let tensor = tensor.detach().to_device(Device::Cpu).to_kind(kind);
        let mut bytes = vec![0; tensor.numel() * kind.elt_size_in_bytes()];
        tensor.contiguous().copy_data_u8(&mut bytes, tensor.numel());
        let options = options.large_file(bytes.len() > u32::MAX as usize / 2);
        zip.start_file_aligned(format!("archive/data/{index}"), options, ALIGNMENT)?;
        zip.write_all(&bytes)?;
    }
    zip.start_file("archive/version", options)?;
    zip.write_all(b"3\n")?;
    zip.finish()
}

/// What the library calls the storage of a kind.
fn storage_of(kind: Kind) -> Option<&'static str> {
    Some(match kind {
        Kind::Float => "FloatStorage",
        Kind::BFloat16 => "BFloat16Storage",
        Kind::Half => "HalfStorage",
        _ => return None,
    })
}

fn pickle(facts: &[(&str, Value)], tensors: &[(String, Tensor)], storage: &str) -> Vec<u8> {
    let mut pickle = Pickle(b"\x80\x02".to_vec());
    pickle.dictionary(|pickle| {
        for (name, value) in facts {
            pickle.text(name);
            match value {
                Value::Number(number) => pickle.number(*number),
                Value::Text(text) => pickle.text(text),
            }
        }
        pickle.text("state_dict");
        pickle.dictionary(|pickle| {
            for (index, (name, tensor)) in tensors.iter().enumerate() {
                pickle.text(name);
                pickle.tensor(index, &tensor.size(), storage);
            }
        });
    });
    pickle.0.push(b'.');
    pickle.0
}

/// Instructions of the pickle machine.
struct Pickle(Vec<u8>);

impl Pickle {
    fn number(&mut self, number: i64) {
        match i32::try_from(number) {
            Ok(number) => {
                self.0.push(b'J');
                self.0.extend(number.to_le_bytes());
            }
            Err(_) => {
                self.0.extend([0x8a, 8]);
                self.0.extend(number.to_le_bytes());
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.0.push(b'X');
        self.0.extend((text.len() as u32).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn global(&mut self, module: &str, name: &str) {
        self.0.extend(format!("c{module}\n{name}\n").bytes());
    }

    fn tuple(&mut self, fill: impl FnOnce(&mut Pickle)) {
        self.0.push(b'(');
        fill(self);
        self.0.push(b't');
    }

    fn dictionary(&mut self, fill: impl FnOnce(&mut Pickle)) {
        self.0.extend(b"}(");
        fill(self);
        self.0.push(b'u');
    }

    /// A contiguous tensor that fills the storage `archive/data/<index>`.
    fn tensor(&mut self, index: usize, shape: &[i64], storage: &str) {
        self.global("torch._utils", "_rebuild_tensor_v2");
        self.tuple(|pickle| {
            pickle.tuple(|pickle| {
                pickle.text("storage");
                pickle.global("torch", storage);
                pickle.text(&index.to_string());
                pickle.text("cpu");
                pickle.number(shape.iter().product());
            });
            // The tuple names the storage; the reader has the bytes.
            pickle.0.push(b'Q');
            pickle.number(0);
            pickle.tuple(|pickle| shape.iter().for_each(|&size| pickle.number(size)));
            let stride = |axis: usize| shape[axis + 1..].iter().product();
            pickle.tuple(|pickle| (0..shape.len()).for_each(|axis| pickle.number(stride(axis))));
            // No gradient is asked for, and there are no hooks.
            pickle.0.push(0x89);
            pickle.global("collections", "OrderedDict");
            pickle.0.extend(b")R");
        });
        self.0.push(b'R');
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn tensors_lie_in_the_archive_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("epoch_0.pt");
        let numbers = Tensor::from_slice(&[1f32, -2.5, 3.0, 0.1, 5.0, 6.0]);
        let tensors = vec![
            ("a.weight".to_owned(), numbers.view([2, 3])),
            ("b".to_owned(), numbers.narrow(0, 2, 1)),
        ];
        let facts = [("epoch", Value::Number(0)), ("name", Value::Text("run-1"))];
        write(&path, &facts, &tensors, Kind::Float).unwrap();
        assert!(
            write(&path, &facts, &tensors, Kind::Float).is_err(),
            "never overwritten"
        );
        let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();
        let mut read = |name: &str| {
            let mut entry = archive.by_name(name).unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.data_start(), bytes)
        };
        let (start, bytes) = read("archive/data/0");
        assert_eq!((start % u64::from(ALIGNMENT), bytes.len()), (0, 24));
        let (_, bytes) = read("archive/data/1");
        assert_eq!(bytes, 3f32.to_le_bytes());
        let (_, pickle) = read("archive/data.pkl");
        assert!(pickle.starts_with(b"\x80\x02}(") && pickle.ends_with(b"uu."));
        assert_eq!(read("archive/version").1, b"3\n");
    }

    #[test]
    fn numbers_beyond_32_bits_are_written_long() {
        let mut pickle = Pickle(Vec::new());
        pickle.number(1 << 40);
        assert_eq!(pickle.0, [0x8a, 8, 0, 0, 0, 0, 0, 1, 0, 0]);
    }
}
