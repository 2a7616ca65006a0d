//! What every store does, with a directory and with the object store that is in memory.

use std::io::Write;

use super::{object::PART, *};

/// One of each kind.
fn stores() -> (tempfile::TempDir, [Store; 2]) {
    let root = tempfile::tempdir().unwrap();
    let local = Store::open(root.path().to_str().unwrap()).unwrap();
    let object = Store {
        url: "s3://bucket/prefix".into(),
        backend: Arc::new(Backend::Object(Bucket::in_memory("s3://bucket/prefix"))),
    };
    (root, [local, object])
}

fn put(store: &Store, name: &str, bytes: &[u8]) {
    let mut file = store.create(name).unwrap();
    file.write_all(bytes).unwrap();
    let stored = file.finish().unwrap();
    assert_eq!(stored.bytes, bytes.len() as u64);
    assert_eq!(stored.blake3, blake3::hash(bytes).to_hex().as_str());
}

#[test]
fn a_finished_file_is_there_with_its_hash_and_is_never_overwritten() {
    let (_root, stores) = stores();
    for store in stores {
        put(&store, "step-1/a", b"hello");
        assert_eq!(store.read("step-1/a", 1..4).unwrap(), b"ell");
        assert_eq!(store.size("step-1/a").unwrap(), 5);
        assert_eq!(store.list("").unwrap(), ["step-1"]);
        assert_eq!(store.list("step-1").unwrap(), ["a"]);
        assert!(!store.exists("step-1").unwrap(), "a directory is no file");
        let error = store.create("step-1/a").err().unwrap().to_string();
        assert!(error.contains("step-1/a"), "{error}");
        let error = store.read("step-1/a", 3..9).unwrap_err().to_string();
        assert!(error.contains("ends before byte 9"), "{error}");
        let error = store.read_all("step-1/b").unwrap_err().to_string();
        assert!(error.contains("step-1/b: the file is missing"), "{error}");
    }
}

#[test]
fn a_file_of_many_parts_is_read_back_from_anywhere() {
    let (_root, stores) = stores();
    let bytes: Vec<u8> = (0..5 * PART / 2).map(|at| (at % 251) as u8).collect();
    for store in stores {
        put(&store, "a", &bytes);
        let (from, to) = (PART - 7, 2 * PART + 9);
        let read = store.read("a", from as u64..to as u64).unwrap();
        assert!(read == bytes[from..to]);
        assert!(store.read_all("a").unwrap() == bytes);
    }
}

#[test]
fn a_file_that_is_not_finished_leaves_nothing() {
    let (_root, stores) = stores();
    for store in stores {
        let mut file = store.create("step-1/a").unwrap();
        file.write_all(&vec![7; PART + 1]).unwrap();
        drop(file);
        assert!(!store.exists("step-1/a").unwrap());
        put(&store, "step-1/manifest.json", b"{}");
        store.remove("step-1/a").unwrap();
        store.remove_dir("step-1").unwrap();
        store.remove_dir("step-1").unwrap();
        assert_eq!(store.list("").unwrap(), [""; 0]);
    }
}

#[test]
fn what_is_replaced_is_there_as_a_whole() {
    let (_root, stores) = stores();
    for store in stores {
        store.replace("receipt.json", b"{}").unwrap();
        store.replace("receipt.json", b"[]").unwrap();
        assert_eq!(store.read_all("receipt.json").unwrap(), b"[]");
        assert_eq!(store.list("").unwrap(), ["receipt.json"]);
    }
}

#[test]
fn publishing_renames_and_a_repeat_changes_nothing() {
    let (_root, stores) = stores();
    for store in stores {
        let hash = *blake3::hash(b"{}").as_bytes();
        put(&store, "step-1/manifest.pending", b"{}");
        let refused = |error: PublishError| {
            let error = error.to_string();
            assert!(error.contains("not the journalled one"), "{error}");
        };
        refused(store.publish("step-1", [7; 32]).unwrap_err());
        assert!(!store.exists("step-1/manifest.json").unwrap());
        for _ in 0..2 {
            store.publish("step-1", hash).unwrap();
            assert_eq!(store.list("step-1").unwrap(), [PUBLISHED]);
        }
        refused(store.publish("step-1", [7; 32]).unwrap_err());
        let error = store.publish("step-2", hash).unwrap_err().to_string();
        assert!(error.contains(PUBLISHED), "{error}");
    }
}

#[test]
fn of_two_publishers_with_different_manifests_one_wins_and_one_is_told() {
    let (_root, [_, store]) = stores();
    for round in 0..50 {
        let step = format!("step-{round}");
        let publish = |text: &'static str| {
            let (store, step) = (store.clone(), step.clone());
            std::thread::spawn(move || {
                let pending = join(&step, PENDING);
                store.replace(&pending, text.as_bytes()).unwrap();
                let hash = *blake3::hash(text.as_bytes()).as_bytes();
                store
                    .publish(&step, hash)
                    .map_err(|error| error.to_string())
            })
        };
        let results = ["{}", "[]"]
            .map(publish)
            .map(|thread| thread.join().unwrap());
        let published = store.read_all(&join(&step, PUBLISHED)).unwrap();
        let loser = usize::from(published == b"{}");
        assert!(results[1 - loser].is_ok(), "{results:?}");
        let told = results[loser].as_ref().unwrap_err();
        assert!(told.contains("not the journalled one"), "{told}");
    }
}

#[test]
fn paths_stay_below_the_root() {
    let (_root, stores) = stores();
    for store in stores {
        for path in ["..", "a/../b", "/etc", "a/.."] {
            let error = store.read_all(path).unwrap_err().to_string();
            assert!(error.contains("plain relative path"), "{error}");
        }
    }
}

#[test]
fn a_store_has_a_scheme_that_is_known_and_a_bucket() {
    assert_eq!(Store::open("file:///a/b/").unwrap().url(), "/a/b");
    assert_eq!(Store::open("/").unwrap().url(), "/");
    let store = Store::open("s3://bucket/a/b/").unwrap();
    assert_eq!(store.url(), "s3://bucket/a/b");
    assert_eq!(
        store.at("step-1/x").to_str(),
        Some("s3://bucket/a/b/step-1/x")
    );
    assert!(!store.is_local());
    for wrong in ["", "ftp://a/b", "file://a", "s3://", "s3:///a", "s3://a//b"] {
        let error = Store::open(wrong).unwrap_err().to_string();
        assert!(error.contains("s3://bucket/prefix"), "{error}");
    }
}

#[test]
fn a_checkpoint_that_cannot_fit_is_not_begun() {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path().join("not/there").to_str().unwrap()).unwrap();
    let error = store.ensure_room(u64::MAX).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    store.ensure_room(1).unwrap();
}
