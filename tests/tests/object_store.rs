//! Checkpoints in an object store, with a real server on the other side.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use supra_checkpoint::store::{Access, PATIENCE};
use supra_checkpoint::{PENDING, PUBLISHED, Store};
use supra_proto::v1::RunState;
use supra_tests::proxy::{Mode, Proxy};
use supra_tests::{Result, TinyRecipe, ledger};

use crate::s3_server::{BUCKET, S3Server};
use crate::{LIMIT, Stage};

/// A little more than two parts of an upload.
const LARGE: usize = (33 << 20) + 7;

fn access(server: &S3Server, proxy: Option<&Proxy>, patience: Duration) -> Access {
    let address = proxy.map_or(server.address(), Proxy::address);
    Access {
        variables: server.variables(address),
        patience,
    }
}

fn open(access: &Access) -> Result<Store> {
    Ok(Store::open_with(&format!("s3://{BUCKET}/runs"), access)?)
}

fn put(store: &Store, name: &str, bytes: &[u8]) -> Result<()> {
    let mut file = store.create(name)?;
    file.write_all(bytes)?;
    assert_eq!(file.finish()?.bytes, bytes.len() as u64);
    Ok(())
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

#[test]
fn a_bucket_does_what_a_directory_does() -> Result<()> {
    let server = S3Server::start()?;
    let store = open(&access(&server, None, PATIENCE))?;
    let bytes: Vec<u8> = (0..LARGE).map(|at| (at % 251) as u8).collect();
    put(&store, "step-1/large", &bytes)?;
    put(&store, "step-1/small", b"small")?;
    assert_eq!(store.list("")?, ["step-1"]);
    assert_eq!(store.list("step-1")?, ["large", "small"]);
    assert_eq!(store.size("step-1/large")?, LARGE as u64);
    assert!(store.read_all("step-1/large")? == bytes);
    let (from, to) = ((16 << 20) - 3, (32 << 20) + 5);
    let read = store.read("step-1/large", from as u64..to as u64)?;
    assert!(read == bytes[from..to], "ranges over the borders of parts");
    let refused = store
        .create("step-1/large")
        .err()
        .map(|error| error.to_string());
    assert!(refused.is_some_and(|error| error.contains("never overwritten")));
    for range in [3..9, 7..9] {
        let short = store.read("step-1/small", range).unwrap_err().to_string();
        assert!(short.contains("ends before byte 9"), "{short}");
    }
    let missing = store.read_all("step-1/none").unwrap_err().to_string();
    let named = "s3://checkpoints/runs/step-1/none: the file is missing";
    assert!(missing.contains(named), "{missing}");

    // Published once, whoever repeats it; another manifest never takes its place.
    put(&store, &format!("step-1/{PENDING}"), b"{}")?;
    assert!(store.publish("step-1", [7; 32]).is_err());
    assert!(!store.exists(&format!("step-1/{PUBLISHED}"))?);
    store.publish("step-1", hash(b"{}"))?;
    store.publish("step-1", hash(b"{}"))?;
    put(&store, &format!("step-1/{PENDING}"), b"[]")?;
    let late = store
        .publish("step-1", hash(b"[]"))
        .unwrap_err()
        .to_string();
    assert!(late.contains("not the journalled one"), "{late}");
    assert_eq!(store.read_all(&format!("step-1/{PUBLISHED}"))?, b"{}");

    store.remove_dir("step-1")?;
    store.remove_dir("step-1")?;
    assert_eq!(server.objects()?, [""; 0]);
    Ok(())
}

#[test]
fn an_upload_that_breaks_off_between_two_parts_leaves_nothing_to_read() -> Result<()> {
    let server = S3Server::start()?;
    let proxy = Proxy::start(server.address())?;
    let store = open(&access(&server, Some(&proxy), Duration::from_secs(1)))?;
    let mut file = store.create("step-1/large")?;
    file.write_all(&vec![7; 20 << 20])?;
    proxy.set(Mode::Cut);
    let rest = file.write_all(&vec![7; 20 << 20]);
    assert!(rest.and_then(|()| file.finish().map(drop)).is_err());
    proxy.set(Mode::Pass);
    assert!(!store.exists("step-1/large")?);
    assert_eq!(store.list("step-1")?, [""; 0]);
    Ok(())
}

#[test]
fn a_server_that_refuses_is_silent_or_absent_is_named_in_bounded_time() -> Result<()> {
    let server = S3Server::start()?;
    let proxy = Proxy::start(server.address())?;
    let patience = Duration::from_millis(1500);
    let told = |store: &Store, words: &[&str]| {
        let begun = Instant::now();
        let error = store.replace("a", b"a").unwrap_err().to_string();
        for word in words.iter().chain(&["s3://", "/runs/a"]) {
            assert!(error.contains(word), "{word:?} is not said, only: {error}");
        }
        let took = begun.elapsed();
        assert!(took < 4 * patience, "{took:?} for {error}");
    };
    let store = open(&access(&server, Some(&proxy), patience))?;
    store.replace("a", b"a")?;
    proxy.set(Mode::Silent);
    told(&store, &["did not answer within"]);
    proxy.set(Mode::Reset);
    told(&store, &["cannot write"]);

    let mut wrong = access(&server, None, patience);
    wrong.variables[1].1 = "wrong".to_owned();
    told(&open(&wrong)?, &["AWS_SECRET_ACCESS_KEY"]);
    let mut encrypted = access(&server, None, patience);
    encrypted.variables[4].1 = "false".to_owned();
    told(&open(&encrypted)?, &["AWS_ALLOW_HTTP"]);
    let none = Store::open_with("s3://no-such-bucket/runs", &access(&server, None, patience))?;
    let error = none.list("").unwrap_err().to_string();
    assert!(error.contains("s3://no-such-bucket/runs"), "{error}");
    assert!(error.contains("Create the bucket"), "{error}");

    Ok(())
}

#[test]
fn a_run_whose_checkpoints_are_in_a_bucket_is_killed_and_goes_on_from_there() -> Result<()> {
    let server = S3Server::start()?;
    let mut stage = Stage::new()?;
    for (name, value) in server.variables(server.address()) {
        stage.programs = stage.programs.with(&name, Path::new(&value));
    }
    let mut cluster = stage.cluster("cluster", 1)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        workers: (1, 1),
        checkpoint: Some(format!(
            "{{ every_tokens: 4096, keep: 2, to: s3://{BUCKET}/runs }}"
        )),
        ..TinyRecipe::default()
    };
    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait(&run, "in the middle", LIMIT, |status| status.step >= 30)?;
    cluster.remove_worker("w0")?;
    cluster.coordinator()?.kill_tree()?;
    cluster.start_coordinator()?;
    cluster.start_worker("w0")?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(
        (end.state(), end.tokens),
        (RunState::Finished, recipe.tokens())
    );
    ledger::expect_exactly_once(&cluster.ledger(&run)?, recipe.samples())?;
    let audit = cluster.supra_json(&["audit", &run, "--files"])?;
    assert!(
        audit["files"].as_u64() >= Some(8),
        "two checkpoints: {audit}"
    );
    let capsule = stage.directory.path().join("capsule");
    let packed = cluster.supra_json(&["capsule", &run, "--out", &capsule.to_string_lossy()])?;
    assert_eq!(packed["missing"], serde_json::json!({}), "{packed}");
    let manifests = capsule.join("checkpoints").read_dir()?.count();
    assert_eq!(manifests, 2, "{packed}");

    let objects = server.objects()?;
    let named = |suffix: &str| objects.iter().filter(|name| name.ends_with(suffix)).count();
    assert_eq!(named("receipt.json"), 1, "{objects:?}");
    assert_eq!(
        named(PUBLISHED),
        2,
        "the older ones are deleted: {objects:?}"
    );

    let last = cluster.last_checkpoint(&run)?;
    let out = stage.directory.path().join("exported");
    let mut export = stage.programs.worker();
    export.arg("export").arg("--checkpoint").arg(&last);
    export.arg("--out").arg(&out);
    supra_tests::process::run(export, LIMIT)?.expect_code(0)?;
    assert!(out.join("model.safetensors").exists());
    Ok(())
}
