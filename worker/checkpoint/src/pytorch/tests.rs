//! Genuine files, files that want something else, and files that are no files.

use std::{fs, io::Cursor, path::Path};

use proptest::prelude::*;

use super::{Dtype, Fault, Listing, pickle};

/// A file that PyTorch wrote: `tests/parity/make_pytorch_fixtures.py`.
fn fixture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pytorch");
    fs::read(folder.join(name)).unwrap()
}

fn list(file: &[u8]) -> Result<Listing, Fault> {
    Listing::from_reader(&mut Cursor::new(file))
}

/// A tensor with its values.
#[derive(Debug, PartialEq)]
struct Read {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    values: Vec<u8>,
}

/// Every tensor with its values.
fn read(file: &[u8]) -> Result<Vec<Read>, Fault> {
    let listing = list(file)?;
    let tensors = listing.tensors().iter();
    tensors
        .map(|(name, tensor)| {
            Ok(Read {
                name: name.clone(),
                dtype: tensor.dtype,
                shape: tensor.window.shape.clone(),
                values: listing.read_from(&mut Cursor::new(file), name)?.unwrap(),
            })
        })
        .collect()
}

/// An archive of stored records, as small as they come.
fn archive(records: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in records {
        let (at, name) = ((file.len() as u32).to_le_bytes(), format!("x/{name}"));
        let length = (bytes.len() as u32).to_le_bytes();
        // What both headers have: version, flags, method, time and date, which are all 0, and then this.
        let fields = [
            &[0; 10],
            &crc32fast::hash(bytes).to_le_bytes()[..],
            &length,
            &length,
            &(name.len() as u16).to_le_bytes(),
            &[0; 2],
        ]
        .concat();
        file.extend([b"PK\x03\x04", &fields[..], name.as_bytes(), bytes].concat());
        directory.extend(
            [
                b"PK\x01\x02\0\0",
                &fields[..],
                &[0; 10],
                &at,
                name.as_bytes(),
            ]
            .concat(),
        );
    }
    let (start, count) = (file.len() as u32, (records.len() as u16).to_le_bytes());
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend(count);
    file.extend(count);
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0; 2]);
    file
}

fn text(text: &str) -> Vec<u8> {
    let length = (text.len() as u32).to_le_bytes();
    [b"X", &length[..], text.as_bytes()].concat()
}

/// `{"w": tensor}` on a storage of four floats in record `key`, with this shape and these strides.
fn dictionary(key: &str, first: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let tuple = |numbers: &[u8]| {
        let numbers = numbers.iter().flat_map(|&number| [b'K', number]);
        [vec![b'('], numbers.collect(), vec![b't']].concat()
    };
    let storage = [
        b"(".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text(key),
        text("cpu"),
        b"K\x04tQ".to_vec(),
    ];
    [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
        storage.concat(),
        vec![b'K', first],
        tuple(shape),
        tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
    ]
    .concat()
}

fn floats() -> Vec<u8> {
    [1.0_f32, 2.0, 3.0, 4.0].map(f32::to_le_bytes).concat()
}

/// What is said of a pickle that stands where weights should be.
fn complaint(pickle: &[u8]) -> String {
    let file = archive(&[("data.pkl", pickle), ("data/0", &floats())]);
    list(&file)
        .expect_err("should have been refused")
        .to_string()
}

#[test]
fn a_genuine_file_lists_its_tensors_and_gives_their_values() {
    let all = read(&fixture("kinds.pt")).unwrap();
    let double = [1.5_f64, -2.0].map(f64::to_le_bytes).concat();
    let count = [3_i64, -4].map(i64::to_le_bytes).concat();
    let tensor = |name: &str, dtype, shape: &[u64], values| Read {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        values,
    };
    let expected = [
        tensor("count", Dtype::I64, &[2], count),
        tensor("double", Dtype::F64, &[1, 2], double),
    ];
    assert_eq!(all, expected);
}

#[test]
fn values_are_compared_with_their_checksum_where_there_is_one() {
    let pickle = dictionary("0", 0, &[2], &[2]);
    let mut file = archive(&[("data.pkl", &pickle), ("data/0", &floats())]);
    let values = file
        .windows(16)
        .position(|window| window == floats())
        .unwrap();
    assert!(list(&file).unwrap().has_checksums());
    // Not an element of the tensor, but of its storage.
    file[values + 4] ^= 1;
    assert!(read(&file).unwrap_err().to_string().contains("CRC-32"));
    let mut at = file
        .windows(4)
        .position(|window| window == b"PK\x01\x02")
        .unwrap();
    while file[at..].starts_with(b"PK\x01\x02") {
        file[at + 16..at + 20].fill(0);
        at += 46 + usize::from(file[at + 28]);
    }
    assert!(!list(&file).unwrap().has_checksums());
    assert_eq!(read(&file).unwrap()[0].shape, [2]);
}

#[test]
fn tensors_are_windows_on_storages() {
    let values = |first, shape: &[u8], strides: &[u8]| {
        let pickle = dictionary("0", first, shape, strides);
        let file = archive(&[("data.pkl", &pickle), ("data/0", &floats())]);
        let tensor = read(&file).unwrap().remove(0);
        assert_eq!((tensor.name.as_str(), tensor.dtype), ("w", Dtype::F32));
        let floats = tensor.values.as_chunks::<4>().0.iter();
        floats
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect::<Vec<_>>()
    };
    assert_eq!(values(0, &[4], &[1]), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(values(1, &[2], &[2]), [2.0, 4.0]);
    assert_eq!(values(0, &[2, 2], &[1, 2]), [1.0, 3.0, 2.0, 4.0]);
    assert_eq!(values(3, &[], &[]), [4.0]);
    assert!(values(200, &[0, 7], &[7, 1]).is_empty());
}

#[test]
fn a_pickle_that_wants_more_than_tensors_is_refused_by_name() {
    let call = |module: &str, name: &str| {
        let global = format!("c{module}\n{name}\n");
        [
            b"\x80\x02".to_vec(),
            global.into_bytes(),
            text("echo owned"),
            b"\x85R.".to_vec(),
        ]
        .concat()
    };
    let hidden = [
        b"\x80\x04".to_vec(),
        text("builtins"),
        text("eval"),
        b"\x93.".to_vec(),
    ]
    .concat();
    let outside =
        |parts: &[Vec<u8>]| [b"\x80\x02(".to_vec(), parts.concat(), b"tQ.".to_vec()].concat();
    for (pickle, words) in [
        (call("os", "system"), "`os.system`"),
        (call("posix", "system"), "`posix.system`"),
        (call("builtins", "eval"), "`builtins.eval`"),
        (
            call("torch.serialization", "load"),
            "`torch.serialization.load`",
        ),
        (
            call("collections.OrderedDict", "__reduce__"),
            "not on the list",
        ),
        (hidden, "`builtins.eval`"),
        (
            call("collections", "OrderedDict"),
            "a call of a function or class",
        ),
        (
            call("torch", "FloatStorage"),
            "a call of a function or class",
        ),
        (
            b"\x80\x02(ios\nsystem\n.".to_vec(),
            "an object of any class",
        ),
        (
            b"\x80\x02ccollections\nOrderedDict\n)\x81.".to_vec(),
            "an object of any class",
        ),
        (b"\x80\x02\x82\x01.".to_vec(), "a registry"),
        (b"\x80\x02P0\n.".to_vec(), "named by a text"),
        (b"\x80\x05\x97.".to_vec(), "a buffer outside"),
        (b"\x80\x06N.".to_vec(), "protocol 6"),
        (b"(lp0\n.".to_vec(), "protocol 0"),
        (
            b"\x80\x02}r\xff\xff\xff\xff.".to_vec(),
            "memory place 4294967295",
        ),
        (
            b"\x80\x02ctorch\nSize\n}b.".to_vec(),
            "attributes of a function",
        ),
        (outside(&[text("module"), text("0")]), "no storage"),
        (
            outside(&[
                text("storage"),
                text("FloatStorage"),
                text("0"),
                text("cpu"),
                b"K\x04".to_vec(),
            ]),
            "no storage",
        ),
        (
            dictionary("../../etc/passwd", 0, &[4], &[1]),
            "no record `x/data/../../etc/passwd`",
        ),
        (
            dictionary("0", 0, &[5], &[1]),
            "5 elements on a storage of 4",
        ),
        (
            dictionary("0", 0, &[255, 255, 255], &[0, 0, 0]),
            "16581375 elements",
        ),
        (dictionary("0", 2, &[3], &[1]), "reaches beyond"),
        (dictionary("0", 0, &[1; 9], &[1; 9]), "9 axes"),
    ] {
        let complaint = complaint(&pickle);
        assert!(complaint.contains(words), "{words}: {complaint}");
    }
}

#[test]
fn depth_and_promised_lengths_cost_nothing() {
    let deep = [
        b"\x80\x02".to_vec(),
        b"]".repeat(1 << 20),
        b"a".repeat((1 << 20) - 1),
        b".".to_vec(),
    ];
    assert!(complaint(&deep.concat()).contains("holds a list"));
    let open = [b"\x80\x02".to_vec(), b"(".repeat(1 << 20)].concat();
    assert!(complaint(&open).contains("ends early"));
    let long = [b"\x80\x04\x8d".to_vec(), vec![0xff; 8]].concat();
    assert!(complaint(&long).contains("ends early"));
    // A shape that is remembered may be used again and again: a long one must not be copied each time.
    let wide = [
        b"\x80\x02(".to_vec(),
        b"K\x01".repeat(1000),
        b"tq\x00".to_vec(),
    ]
    .concat();
    let tensor = dictionary("0", 0, &[], &[]);
    let place = tensor
        .windows(4)
        .position(|window| window == b"(t(t")
        .unwrap();
    let again = [
        &wide,
        &tensor[2..place],
        b"h\x00h\x00",
        &tensor[place + 4..],
    ]
    .concat();
    assert!(complaint(&again).contains("shape or strides"));
}

#[test]
fn what_holds_no_weights_says_what_it_holds() {
    let optimizer = [b"\x80\x02}".to_vec(), text("optimizer"), b"}s.".to_vec()].concat();
    let found = complaint(&optimizer);
    assert!(
        found.contains("`optimizer` is a dictionary") && found.contains("state_dict"),
        "{found}"
    );
    assert!(complaint(b"\x80\x02}.").contains("0 tensors"));
    assert!(complaint(b"\x80\x02K\x01.").contains("holds a number"));
}

#[test]
fn other_files_are_told_apart() {
    // What torch.save wrote first before 1.6.
    let legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.";
    assert!(matches!(list(legacy), Err(Fault::Legacy)));
    let found = |file: &[u8]| list(file).unwrap_err().to_string();
    assert!(found(b"version https://git-lfs.github.com/spec/v1\noid").contains("git lfs pull"));
    assert!(found(b"").contains("not a file of PyTorch's"));
    assert!(found(&archive(&[("readme", b"")])).contains("not one of torch.save"));
    let script = [("data.pkl", &b"\x80\x02}."[..]), ("constants.pkl", b"")];
    assert!(found(&archive(&script)).contains("TorchScript"));
    let big = [("data.pkl", &b"\x80\x02}."[..]), ("byteorder", b"big")];
    assert!(found(&archive(&big)).contains("highest byte first"));
    let mut packed = archive(&[("data.pkl", b"\x80\x02}.")]);
    let directory = packed
        .windows(4)
        .position(|window| window == b"PK\x01\x02")
        .unwrap();
    packed[directory + 10] = 8;
    assert!(found(&packed).contains("compressed"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_pickle_is_refused_or_bounded(
        // Mostly instructions of the machine, so that many of them are reached.
        pickle in prop::collection::vec(
            prop_oneof![
                8 => prop::sample::select(b"(tld}])asuqhQRbcKNMX.\x80\x85\x86\x87\x88\x94\x8c\x02\x00\x01".to_vec()),
                1 => any::<u8>(),
            ],
            0..300,
        )
    ) {
        if let Ok((values, root)) = pickle::run(&pickle) {
            let _ = values.get(root);
            prop_assert!(values.count() <= pickle.len());
        }
        let _ = list(&archive(&[("data.pkl", &pickle), ("data/0", &floats())]));
        let _ = list(&pickle);
    }

    #[test]
    fn a_damaged_file_gives_the_same_tensors_or_none(
        damages in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let whole = fixture("kinds.pt");
        let mut file = whole.clone();
        for (place, change) in damages {
            let at = place.index(file.len());
            file[at] ^= change;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        if let Ok(found) = read(&file) {
            prop_assert_eq!(found, read(&whole).unwrap());
        }
    }
}
