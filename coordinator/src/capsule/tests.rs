use std::fs;

use supra_proto::v1::StepMetrics;

use super::*;
use crate::ledger::{Body, Open, Step};

fn ledger() -> (Tail, Vec<u8>) {
    let bodies = [
        Body::Open(Open {
            run: "small-1".into(),
            recipe_hash: [1; 32],
            manifest_hash: [2; 32],
            windows: 100,
            sequence_length: 8,
            batch_samples: 4,
            samples: 10,
            steps: 3,
        }),
        Body::Step(Step {
            generation: 1,
            step: 1,
            first_sample: 0,
            samples: 4,
            digest: [3; 32],
            skipped: true,
        }),
        Body::Void {
            generation: 1,
            after_step: 0,
            reason: "rank 1 \"vanished\"".into(),
        },
        Body::Durable {
            generation: 2,
            step: 3,
            manifest_hash: [4; 32],
        },
        Body::Close {
            step: 3,
            samples: 10,
        },
    ];
    let (mut tail, mut bytes) = (Tail::default(), Vec::new());
    for body in bodies {
        let record = tail.next(body);
        tail.advance(&record);
        lines::append(&mut bytes, record);
    }
    (tail, bytes)
}

fn capsule() -> Capsule {
    let (tail, bytes) = ledger();
    let members = [
        (LEDGER.to_owned(), bytes),
        (TRAIN.to_owned(), b"{}".to_vec()),
        (
            format!("checkpoints/{}/manifest.json", "s".repeat(200)),
            vec![7; 100_000],
        ),
    ];
    let missing = [(RECEIPT.to_owned(), "the run has not ended".to_owned())];
    Capsule::new(("small-1", "small"), &tail, members.into(), missing.into())
}

#[test]
fn a_file_and_a_folder_hold_the_same_and_twice_the_same_bytes() {
    let place = tempfile::tempdir().unwrap();
    let capsule = capsule();
    let (file, folder) = (
        place.path().join("one.tar.zst"),
        place.path().join("folder"),
    );
    for out in [&file, &folder] {
        let bytes = capsule.write(out).unwrap();
        assert!(bytes > 100, "{bytes}");
        assert_eq!(Capsule::read(out).unwrap(), capsule);
    }
    assert_eq!(fs::read(&file).unwrap(), capsule.to_bytes());
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2);
}

#[test]
fn nothing_is_overwritten() {
    let place = tempfile::tempdir().unwrap();
    for name in ["one.tar.zst", "folder"] {
        let out = place.path().join(name);
        fs::write(&out, "mine").unwrap();
        let error = capsule().write(&out).unwrap_err();
        assert!(matches!(error, CapsuleError::Taken(_)), "{error}");
        assert_eq!(fs::read_to_string(&out).unwrap(), "mine");
    }
}

#[test]
fn a_cut_or_altered_file_is_found_wherever_it_was_hit() {
    let bytes = capsule().to_bytes();
    let read = |bytes: &[u8]| Capsule::from_bytes(bytes, Path::new("x.tar.zst"));
    for length in (0..bytes.len()).step_by(7) {
        read(&bytes[..length]).unwrap_err();
    }
    for place in 0..bytes.len() {
        let mut altered = bytes.clone();
        altered[place] ^= 0x55;
        // A bit that says nothing, such as one of the compression's window, may change: not what is read.
        if let Ok(found) = read(&altered) {
            assert_eq!(found, capsule(), "{place}");
        }
    }
}

#[test]
fn a_folder_whose_members_are_others_is_no_capsule() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 4] = [
        ("ledger.jsonl is not what was packed", |folder| {
            fs::write(folder.join(LEDGER), "{}").unwrap();
        }),
        ("data/train.json is missing", |folder| {
            fs::remove_file(folder.join(TRAIN)).unwrap();
        }),
        ("\"more.txt\" does not belong to it", |folder| {
            fs::write(folder.join("more.txt"), "x").unwrap();
        }),
        ("index.json is not that of a capsule", |folder| {
            fs::remove_file(folder.join(INDEX)).unwrap();
        }),
    ];
    for (words, change) in changes {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("folder");
        capsule().write(&folder).unwrap();
        change(&folder);
        let error = Capsule::read(&folder).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn an_index_that_was_altered_is_found_wherever_it_was_hit() {
    let capsule = capsule();
    let index = capsule.index_bytes();
    let read = |index: &[u8]| Capsule::checked(Path::new("x"), index, capsule.members.clone());
    assert_eq!(read(&index).unwrap(), capsule);
    for place in 0..index.len() {
        let mut altered = index.clone();
        altered[place] ^= 1;
        read(&altered).unwrap_err();
    }
    // One of a build whose indices had no hash.
    let old = Index {
        format: 1,
        ..capsule.index.clone()
    };
    let read = read(&serde_json::to_vec(&old).unwrap()).unwrap();
    assert_eq!(read.members, capsule.members);
}

#[test]
fn a_capsule_of_a_later_version_asks_for_it() {
    let mut later = capsule();
    later.index.format = FORMAT + 1;
    let error = Capsule::from_bytes(&later.to_bytes(), Path::new("x")).unwrap_err();
    assert!(matches!(error, CapsuleError::Newer { .. }), "{error}");
}

#[test]
fn a_member_cannot_lie_outside() {
    let (tail, _) = ledger();
    for name in ["../up", "a/../../up"] {
        let members = [(name.to_owned(), b"x".to_vec())];
        let mut archive = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
        let outside = Capsule::new(("a", "a"), &tail, members.into(), BTreeMap::new());
        let index = outside.index_bytes();
        for (name, bytes) in [(INDEX, index.as_slice()), (name, b"x".as_slice())] {
            let mut header = tar::Header::new_gnu();
            // The library refuses to write such a name itself.
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            archive.append(&header, bytes).unwrap();
        }
        let bytes = archive.into_inner().unwrap().finish().unwrap();
        let error = Capsule::from_bytes(&bytes, Path::new("x")).unwrap_err();
        assert!(error.to_string().contains("outside of itself"), "{error}");
    }
}

#[test]
fn ledger_and_metrics_come_back_to_the_bit() {
    let records = capsule().ledger().unwrap();
    let mut tail = Tail::default();
    for record in &records {
        assert_eq!(&tail.next(record.body.clone()), record);
        tail.advance(record);
    }
    assert_eq!((tail, records.len()), (ledger().0, 5));

    let numbers = [0.1 + 0.2, f64::NAN, 1e-310, 3.0, f64::INFINITY, -0.0];
    let rows: Vec<StepMetrics> = (1..)
        .zip(numbers)
        .map(|(step, loss)| StepMetrics {
            step,
            generation: 2,
            loss,
            grad_norm: 1.0 / loss,
            learning_rate: 3e-5,
            ..StepMetrics::default()
        })
        .collect();
    let members = [(METRICS.to_owned(), metrics::csv(&rows))];
    let capsule = Capsule::new(("a", "a"), &tail, members.into(), BTreeMap::new());
    let read = capsule.metrics().unwrap();
    assert_eq!(read.len(), rows.len());
    for row in rows {
        let back = read[&row.step];
        let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(
            same(back.loss, row.loss) && same(back.grad_norm, row.grad_norm),
            "{row:?}"
        );
        assert_eq!((back.generation, back.learning_rate), (2, 3e-5));
    }
}
