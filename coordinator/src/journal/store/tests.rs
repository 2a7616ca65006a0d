//! What the tables keep, through restarts, cuts and damage.

use std::time::Duration;

use super::*;
use crate::journal::{Journal, StateLock};
use crate::ledger::Step;
use crate::machine::{Outcome, Workers};

mod damage;
mod power_loss;

fn submitted(run: RunNumber) -> Fact {
    Fact::Submitted {
        run,
        id: format!("run-{run}"),
        name: "run".into(),
        recipe: "name: run\n".into(),
        checkpoint_root: "/checkpoints".into(),
        keep: 3,
        keep_every: 0,
        strict: false,
        budget_tokens: 1000,
        workers: Workers {
            min: 1,
            max: 2,
            grace: Duration::from_secs(1),
        },
        at: 5,
    }
}

/// `count` facts that apply steps to run 1, after the state's last.
fn steps(state: &mut State, count: u64) -> Vec<Fact> {
    let facts = (0..count).map(|_| {
        let run = state.run(1).unwrap();
        let step = run.step + 1;
        let body = Body::Step(Step {
            generation: 1,
            step,
            first_sample: 0,
            samples: 4,
            digest: [1; 32],
            skipped: step == 7,
        });
        let fact = Fact::Recorded {
            run: 1,
            record: run.ledger.next(body),
        };
        state.apply(&fact);
        fact
    });
    facts.collect()
}

fn apply(state: &mut State, facts: &[Fact]) {
    facts.iter().for_each(|fact| state.apply(fact));
}

#[test]
fn what_was_committed_is_replayed() {
    let directory = tempfile::tempdir().unwrap();
    let mut expected = State::default();
    let mut store = Store::open(directory.path()).unwrap();
    for run in 1..=2 {
        expected.apply(&submitted(run));
        store.commit(&[submitted(run)]).unwrap();
    }
    store.commit(&steps(&mut expected, 10)).unwrap();
    let ended = Fact::Ended {
        run: 2,
        outcome: Outcome::Failed,
        reason: "no data".into(),
        at: 9,
        broken: false,
    };
    apply(&mut expected, std::slice::from_ref(&ended));
    store.commit(&[ended]).unwrap();
    drop(store);
    assert_eq!(Store::open(directory.path()).unwrap().state(), &expected);
    let reader = Reader::open(directory.path()).unwrap();
    assert_eq!(reader.state().unwrap(), expected);
    let whole = reader.ledger(1, 0, 100).unwrap();
    assert_eq!(whole.len(), 10);
    let second_half = reader.ledger(1, 5, 100).unwrap();
    assert_eq!(second_half[0].as_ref().unwrap(), whole[5].as_ref().unwrap());
}

#[test]
fn a_snapshot_and_its_tail_give_the_same_state_as_everything() {
    let directory = tempfile::tempdir().unwrap();
    let mut expected = State::default();
    let mut store = Store::open(directory.path()).unwrap();
    expected.apply(&submitted(1));
    store.commit(&[submitted(1)]).unwrap();
    for _ in 0..5 {
        store.commit(&steps(&mut expected, 1000)).unwrap();
    }
    assert!(store.snapshot_seq > 0);
    store.commit(&[submitted(2)]).unwrap();
    expected.apply(&submitted(2));
    drop(store);
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.state(), &expected);
    store
        .connection
        .execute("DELETE FROM snapshot", [])
        .unwrap();
    drop(store);
    assert_eq!(Store::open(directory.path()).unwrap().state(), &expected);
}

#[test]
fn damage_is_said_and_not_trained_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut state = State::default();
    state.apply(&submitted(1));
    let mut store = Store::open(directory.path()).unwrap();
    store.commit(&[submitted(1)]).unwrap();
    store.commit(&steps(&mut state, 3)).unwrap();
    store
        .connection
        .execute("UPDATE ledger SET body = x'00' WHERE idx = 1", [])
        .unwrap();
    drop(store);
    let error = Store::open(directory.path()).unwrap_err().to_string();
    assert!(
        error.contains("journal.db is damaged: ledger record 1"),
        "{error}"
    );
    let records = Reader::open(directory.path())
        .unwrap()
        .ledger(1, 0, 10)
        .unwrap();
    assert!(records[0].is_ok() && records[1].is_err() && records[2].is_ok());
}

#[test]
fn a_fact_that_only_a_later_version_knows_is_no_damage_and_not_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).unwrap();
    store.commit(&[submitted(1)]).unwrap();
    let foretold = r#"{"fact":"foretold","worker":"b"}"#;
    store
        .connection
        .execute(
            "INSERT INTO facts (seq, run, fact, sum) VALUES (2, 0, ?1, ?2)",
            params![foretold, sum::of_fact(2, 0, foretold)],
        )
        .unwrap();
    drop(store);
    let error = Store::open(directory.path()).unwrap_err().to_string();
    assert!(
        error.contains("newer version (fact 2: unknown variant `foretold`")
            && error.contains("install that version"),
        "{error}"
    );
}

#[test]
fn who_is_aside_is_replayed_and_a_state_that_is_older_knows_of_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).unwrap();
    let put = |worker: &str| Fact::PutAside {
        worker: worker.into(),
        instance: format!("{worker}-1"),
        reason: "drained by a user".into(),
        at: 5,
    };
    let back = Fact::TakenBack {
        worker: "a".into(),
        at: 6,
    };
    store.commit(&[put("a"), put("b"), back]).unwrap();
    drop(store);
    let store = Store::open(directory.path()).unwrap();
    let state = store.state();
    assert_eq!(
        state.aside.keys().collect::<Vec<_>>(),
        ["b"],
        "facts of no run beside those of runs"
    );
    assert_eq!(state.aside["b"].reason, "drained by a user");
    let older: State = serde_json::from_str(r#"{"runs":[],"queue":[]}"#).unwrap();
    assert_eq!(older, State::default());
}

#[test]
fn files_that_are_no_journal_and_newer_ones_are_named() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(
        directory.path().join("journal.db"),
        "not a database, but long enough to look at".repeat(50),
    )
    .unwrap();
    let error = Store::open(directory.path()).unwrap_err().to_string();
    assert!(
        error.contains("journal.db") && error.contains("not a database"),
        "{error}"
    );

    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    store
        .connection
        .pragma_update(None, "user_version", 99)
        .unwrap();
    drop(store);
    let error = Store::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("newer version (format 99"), "{error}");
    assert!(Reader::open(&directory.path().join("none")).is_err());
}

#[test]
fn a_full_disk_says_so_and_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).unwrap();
    store.commit(&[submitted(1)]).unwrap();
    let pages: i64 = store
        .connection
        .pragma_query_value(None, "page_count", |row| row.get(0))
        .unwrap();
    store
        .connection
        .pragma_update(None, "max_page_count", pages)
        .unwrap();
    let mut state = store.state().clone();
    let error = store
        .commit(&steps(&mut state, 1000))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("full") && error.contains("free space"),
        "{error}"
    );
    drop(store);
    assert_eq!(
        Store::open(directory.path()).unwrap().state().runs().len(),
        1
    );
}

#[test]
fn a_second_coordinator_is_turned_away() {
    let directory = tempfile::tempdir().unwrap();
    let lock = StateLock::take(directory.path()).unwrap();
    let error = StateLock::take(directory.path()).unwrap_err().to_string();
    assert!(
        error.contains("another coordinator (process ") && error.contains("--state"),
        "{error}"
    );
    drop(lock);
    StateLock::take(directory.path()).unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(
        StateLock::take(&file.join("below"))
            .unwrap_err()
            .to_string()
            .contains("--state")
    );
}

#[tokio::test]
async fn synced_facts_are_on_disk_and_the_rest_follows_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, mut state) = Journal::open(directory.path()).unwrap();
    journal.append(vec![submitted(1)]).unwrap();
    journal.sync().await.unwrap();
    assert_eq!(
        Reader::open(directory.path())
            .unwrap()
            .state()
            .unwrap()
            .runs()
            .len(),
        1
    );
    state.apply(&submitted(1));
    journal.append(steps(&mut state, 3)).unwrap();
    journal.check().unwrap();
    drop(journal);
    assert_eq!(
        Reader::open(directory.path()).unwrap().state().unwrap(),
        state
    );
}

#[test]
fn workers_of_a_journal_without_grace_have_that_of_its_time() {
    let workers: Workers = serde_json::from_str(r#"{"min":1,"max":2}"#).unwrap();
    assert_eq!(workers.grace, Duration::from_secs(1));
}
