//! What was changed on disk since it was written.

use std::fs;

use super::*;

/// A journal of a run with so many steps, closed; and its state.
fn written(count: u64) -> (tempfile::TempDir, State) {
    let directory = tempfile::tempdir().unwrap();
    let mut state = State::default();
    state.apply(&submitted(1));
    let mut store = Store::open(directory.path()).unwrap();
    store.commit(&[submitted(1)]).unwrap();
    store.commit(&steps(&mut state, count)).unwrap();
    (directory, state)
}

fn change(directory: &Path, statement: &str) {
    let connection = Connection::open(file(directory)).unwrap();
    connection.execute_batch(statement).unwrap();
}

#[test]
fn a_fact_that_was_altered_is_found() {
    for statement in [
        "UPDATE facts SET fact = replace(fact, '1000', '1001')",
        "UPDATE facts SET run = 2",
        "UPDATE facts SET sum = NULL",
    ] {
        let (directory, _) = written(3);
        change(directory.path(), statement);
        let error = Store::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("fact 1 was altered"), "{error}");
    }
}

#[test]
fn a_snapshot_that_was_altered_is_passed_over() {
    let (directory, state) = written(SNAPSHOT_EVERY + 1);
    let step = state.run(1).unwrap().step;
    change(
        directory.path(),
        &format!("UPDATE snapshot SET state = replace(state, '\"step\":{step}', '\"step\":1')"),
    );
    let store = Store::open(directory.path()).unwrap();
    assert_eq!(store.state(), &state);
}

#[test]
fn an_end_that_was_on_disk_and_is_gone_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).unwrap();
    store.commit(&[submitted(1)]).unwrap();
    // As a kill leaves it: the log is not in the database yet.
    let killed = tempfile::tempdir().unwrap();
    for name in ["journal.db", "journal.db-wal", "journal.head"] {
        fs::copy(directory.path().join(name), killed.path().join(name)).unwrap();
    }
    let log = killed.path().join("journal.db-wal");
    let mut bytes = fs::read(&log).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&log, bytes).unwrap();
    let error = Store::open(killed.path()).unwrap_err().to_string();
    assert!(
        error.contains("lost its end: its last fact is 0, and fact 1") && error.contains("remove"),
        "{error}"
    );
    assert!(Reader::open(killed.path()).unwrap().check_end().is_err());
    fs::remove_file(killed.path().join("journal.head")).unwrap();
    assert_eq!(
        Store::open(killed.path()).unwrap().state(),
        &State::default()
    );
}

#[test]
fn a_head_that_was_altered_is_found_and_one_that_was_only_begun_is_none() {
    let (directory, state) = written(3);
    let head = directory.path().join("journal.head");
    let whole = fs::read(&head).unwrap();
    for place in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        fs::write(&head, &bytes).unwrap();
        let error = Store::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("journal.head is damaged"), "{error}");
    }
    for begun in [Vec::new(), vec![0; whole.len()]] {
        fs::write(&head, begun).unwrap();
        assert_eq!(Store::open(directory.path()).unwrap().state(), &state);
        assert_eq!(fs::read(&head).unwrap(), whole);
    }
}

#[test]
fn a_journal_of_a_build_without_hashes_gets_them() {
    let (directory, state) = written(SNAPSHOT_EVERY + 1);
    change(
        directory.path(),
        "ALTER TABLE facts DROP COLUMN sum; ALTER TABLE snapshot DROP COLUMN sum; PRAGMA user_version = 1;",
    );
    assert_eq!(
        Reader::open(directory.path()).unwrap().state().unwrap(),
        state
    );
    drop(Store::open(directory.path()).unwrap());
    // What a snapshot stands for is not read.
    change(
        directory.path(),
        "DELETE FROM snapshot; UPDATE facts SET run = 2",
    );
    let error = Store::open(directory.path()).unwrap_err().to_string();
    assert!(error.contains("fact 1 was altered"), "{error}");
}

#[test]
fn a_page_whose_free_space_is_wrong_is_found_before_anything_is_written_into_it() {
    let (directory, _) = written(3);
    let path = file(directory.path());
    let mut bytes = fs::read(&path).unwrap();
    // Page 2 is the root of `facts`: bytes 1 and 2 of it say where its first hole is, and it has none.
    assert_eq!(bytes[4097..4099], [0, 0]);
    bytes[4098] ^= 0x40;
    fs::write(&path, bytes).unwrap();
    let error = Store::open(directory.path()).unwrap_err();
    assert!(matches!(error, JournalError::Damaged { .. }), "{error}");
}
