//! `supra audit --state`: a proof without a coordinator.

use std::fs;
use std::path::Path;

use supra_coordinator::journal::Journal;
use supra_coordinator::ledger::{Body, Open, Step, Tail};
use supra_coordinator::machine::{Fact, Workers};

use crate::support::{Output, run};

/// The recipe of the run, as the journal keeps it.
const RECIPE: &str = "name: small\n";

/// A journal of a run with two of its three steps.
fn journal(state: &Path) {
    let submitted = Fact::Submitted {
        run: 1,
        id: "small-1".to_owned(),
        name: "small".to_owned(),
        recipe: RECIPE.to_owned(),
        checkpoint_root: state.join("checkpoints"),
        keep: 3,
        keep_every: 0,
        strict: false,
        budget_tokens: 80,
        workers: Workers {
            min: 1,
            max: 1,
            grace: std::time::Duration::from_secs(1),
        },
        at: 1,
    };
    let open = Body::Open(Open {
        run: "small-1".to_owned(),
        recipe_hash: *blake3::hash(RECIPE.as_bytes()).as_bytes(),
        manifest_hash: [2; 32],
        windows: 100,
        sequence_length: 8,
        batch_samples: 4,
        samples: 10,
        steps: 3,
    });
    let step = |step: u64| {
        let first_sample = 4 * (step - 1);
        let digest = [7; 32];
        Body::Step(Step {
            generation: 1,
            step,
            first_sample,
            samples: 4,
            digest,
            skipped: false,
        })
    };
    let mut tail = Tail::default();
    let records = [open, step(1), step(2)].map(|body| {
        let record = tail.next(body);
        tail.advance(&record);
        Fact::Recorded { run: 1, record }
    });
    let (journal, _) = Journal::open(state).expect("a journal");
    journal
        .append([vec![submitted], records.to_vec()].concat())
        .expect("appended");
}

fn audit(state: &Path, more: &[&str]) -> Output {
    let state = state.to_str().expect("UTF-8");
    run(&[&["audit", "--state", state], more].concat())
}

#[test]
fn a_sound_ledger_is_proved() {
    let state = tempfile::tempdir().unwrap();
    journal(state.path());
    for run in ["", "small-1", "sma"] {
        let answer = audit(state.path(), &[run]).expect_code(0);
        let verdict = "OK: run small-1 trained 64 of 80 tokens so far, every sample exactly once.";
        assert!(answer.stdout.starts_with(verdict), "{}", answer.stdout);
    }
    let json = audit(state.path(), &["--json"]).expect_code(0).stdout;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["verdict"], &json["steps"], &json["finished"]),
        (&"ok".into(), &2.into(), &false.into())
    );
}

#[test]
fn a_changed_ledger_ends_with_four() {
    for change in [
        "UPDATE ledger SET hash = zeroblob(32) WHERE idx = 1",
        "UPDATE ledger SET body = (SELECT body FROM ledger WHERE idx = 1) WHERE idx = 2",
        "DELETE FROM ledger WHERE idx = 1",
    ] {
        let state = tempfile::tempdir().unwrap();
        journal(state.path());
        let database = rusqlite::Connection::open(state.path().join("journal.db")).unwrap();
        assert_eq!(database.execute(change, []).unwrap(), 1);
        drop(database);
        let answer = audit(state.path(), &[]).expect_code(4);
        assert_ne!(
            format!("{}{}", answer.stdout, answer.stderr),
            "",
            "{change}"
        );
    }
}

#[test]
fn a_ledger_that_lost_its_end_is_found_by_a_checkpoint() {
    let state = tempfile::tempdir().unwrap();
    journal(state.path());
    let database = rusqlite::Connection::open(state.path().join("journal.db")).unwrap();
    let head: Vec<u8> = database
        .query_row("SELECT hash FROM ledger WHERE idx = 2", [], |row| {
            row.get(0)
        })
        .unwrap();
    let checkpoint = |name: &str, manifest: serde_json::Value| {
        let directory = state.path().join("checkpoints").join(name);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
    };
    let head = supra_coordinator::ledger::hex(&head);
    checkpoint(
        "step-2",
        serde_json::json!({ "run": "small-1", "generation": 1, "step": 2, "ledger_head": head }),
    );
    // These say nothing: another run's, one of an older build, and one that is damaged.
    checkpoint(
        "other",
        serde_json::json!({ "run": "other-1", "ledger_head": "0".repeat(64) }),
    );
    checkpoint("older", serde_json::json!({ "run": "small-1" }));
    checkpoint("damaged", serde_json::json!("half"));
    let answer = audit(state.path(), &[]).expect_code(0);
    assert!(
        answer.stdout.contains("1 remember this ledger"),
        "{}",
        answer.stdout
    );

    // Sound in itself, but for what the checkpoint remembers.
    database
        .execute("DELETE FROM ledger WHERE idx = 2", [])
        .unwrap();
    drop(database);
    let answer = audit(state.path(), &[]).expect_code(4);
    for word in ["step-2/manifest.json", "records are missing at the end"] {
        assert!(answer.stdout.contains(word), "{}", answer.stdout);
    }
}

#[test]
fn a_ledger_that_lost_its_end_is_found_by_an_exported_model() {
    let state = tempfile::tempdir().unwrap();
    journal(state.path());
    let model = tempfile::tempdir().unwrap();
    let export = model.path().to_str().unwrap();
    let origin = |run: &str, head: &str| {
        let text =
            serde_json::json!({ "run": run, "generation": 1, "step": 2, "ledger_head": head });
        fs::write(model.path().join("supra_origin.json"), text.to_string()).unwrap();
    };
    let answer = audit(state.path(), &["--export", export]).expect_code(2);
    assert!(
        answer.stderr.contains("supra_origin.json"),
        "{}",
        answer.stderr
    );
    origin("small-1", "");
    audit(state.path(), &["--export", export]).expect_code(2);
    origin("other-1", &"0".repeat(64));
    let answer = audit(state.path(), &["--export", export]).expect_code(2);
    assert!(answer.stderr.contains("run other-1"), "{}", answer.stderr);

    let database = rusqlite::Connection::open(state.path().join("journal.db")).unwrap();
    let last = "SELECT hash FROM ledger WHERE idx = 2";
    let head: Vec<u8> = database.query_row(last, [], |row| row.get(0)).unwrap();
    origin("small-1", &supra_coordinator::ledger::hex(&head));
    audit(state.path(), &["--export", export]).expect_code(0);
    database
        .execute("DELETE FROM ledger WHERE idx = 2", [])
        .unwrap();
    drop(database);
    let answer = audit(state.path(), &["--export", export]).expect_code(4);
    for word in ["supra_origin.json", "records are missing at the end"] {
        assert!(answer.stdout.contains(word), "{}", answer.stdout);
    }
}

#[test]
fn receipt_and_exported_model_are_proved_by_their_hashes() {
    let state = tempfile::tempdir().unwrap();
    journal(state.path());
    let head: Vec<u8> = rusqlite::Connection::open(state.path().join("journal.db"))
        .unwrap()
        .query_row("SELECT hash FROM ledger WHERE idx = 2", [], |row| {
            row.get(0)
        })
        .unwrap();
    let root = state.path().join("checkpoints");
    fs::create_dir(&root).unwrap();
    let receipt = |head: &[u8]| {
        let head = supra_coordinator::ledger::hex(head);
        let said = serde_json::json!({ "format": 2, "run": "small-1", "ledger_head": head });
        let sealed = supra_checkpoint::seal::seal(&said);
        fs::write(root.join("receipt.json"), &sealed).unwrap();
        sealed
    };
    receipt(&[7; 32]);
    let answer = audit(state.path(), &[]).expect_code(4);
    assert!(
        answer.stdout.contains("receipt.json remembers"),
        "{}",
        answer.stdout
    );
    let mut sealed = receipt(&head);
    audit(state.path(), &[]).expect_code(0);
    sealed[20] ^= 1;
    fs::write(root.join("receipt.json"), &sealed).unwrap();
    let answer = audit(state.path(), &[]).expect_code(4);
    assert!(
        answer.stdout.contains("receipt.json: it is damaged"),
        "{}",
        answer.stdout
    );
    fs::remove_file(root.join("receipt.json")).unwrap();

    let model = tempfile::tempdir().unwrap();
    let head = supra_coordinator::ledger::hex(&head);
    let origin =
        serde_json::json!({ "run": "small-1", "generation": 1, "step": 2, "ledger_head": head });
    fs::write(model.path().join("supra_origin.json"), origin.to_string()).unwrap();
    fs::write(model.path().join("model.safetensors"), "weights").unwrap();
    let sums = supra_checkpoint::sums::of(model.path()).unwrap();
    fs::write(model.path().join(supra_checkpoint::sums::SUMS), sums).unwrap();
    let export = ["--export", model.path().to_str().unwrap(), "--files"];
    audit(state.path(), &export).expect_code(0);
    fs::write(model.path().join("model.safetensors"), "weighty").unwrap();
    let answer = audit(state.path(), &export).expect_code(4);
    assert!(
        answer.stdout.contains("model.safetensors was altered"),
        "{}",
        answer.stdout
    );
}

#[test]
fn a_journal_that_is_none_ends_with_four() {
    let state = tempfile::tempdir().unwrap();
    fs::write(
        state.path().join("journal.db"),
        "not a database, but long enough to look like one".repeat(100),
    )
    .unwrap();
    let answer = audit(state.path(), &[]).expect_code(4);
    assert!(answer.stderr.contains("journal.db"), "{}", answer.stderr);
}

#[test]
fn a_directory_or_run_that_is_not_there_is_bad_input() {
    let state = tempfile::tempdir().unwrap();
    let answer = audit(state.path(), &[]).expect_code(2);
    assert!(
        answer.stderr.contains("there is no journal"),
        "{}",
        answer.stderr
    );
    audit(&state.path().join("nowhere"), &[]).expect_code(2);
    journal(state.path());
    let answer = audit(state.path(), &["other"]).expect_code(2);
    assert!(answer.stderr.contains("no run other"), "{}", answer.stderr);
}
