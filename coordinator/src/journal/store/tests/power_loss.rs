//! Files as a power loss may leave them: cut or torn anywhere, they reopen as what was committed up to there.
//!
//! SQLite writes a commit to the log as frames, one page each; the last one of a commit says so. The database itself is only
//! written from a log that is on the disk, and the log is only begun anew when the database is on the disk.

use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;

const LOG_HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// Random places beside those that matter by themselves.
const RANDOM: usize = 25;

/// The files of a journal.
#[derive(Clone)]
struct Files {
    database: Vec<u8>,
    log: Vec<u8>,
}

impl Files {
    fn read(directory: &Path) -> Files {
        let read = |name: &str| fs::read(directory.join(name)).unwrap();
        Files {
            database: read("journal.db"),
            log: read("journal.db-wal"),
        }
    }

    /// What a coordinator finds that starts with them.
    fn reopened(&self) -> State {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("journal.db"), &self.database).unwrap();
        fs::write(directory.path().join("journal.db-wal"), &self.log).unwrap();
        Store::open(directory.path()).unwrap().state().clone()
    }

    fn page(&self) -> usize {
        u32::from_be_bytes(self.log[8..12].try_into().unwrap()) as usize
    }

    /// The ends of the log's frames, and whether a commit ends there. Frames of an earlier round are none.
    fn frames(&self) -> Vec<(usize, bool)> {
        let salt = &self.log[16..24];
        let frames = self.log[LOG_HEADER..].chunks_exact(FRAME_HEADER + self.page());
        let valid = frames.take_while(|frame| frame[8..16] == *salt);
        let ends = valid.enumerate().map(|(number, frame)| {
            let end = LOG_HEADER + (number + 1) * frame.len();
            (end, frame[4..8] != [0; 4])
        });
        ends.collect()
    }

    /// Commits whose frames are all at the beginning of another log, too.
    fn commits_in(&self, log: &[u8]) -> usize {
        let same = self
            .log
            .iter()
            .zip(log)
            .take_while(|(left, right)| left == right);
        let same = same.count();
        let frames = self.frames();
        let whole = frames.iter().filter(|(end, last)| *last && *end <= same);
        whole.count()
    }

    /// Every frame's boundaries and their neighbours, those of the headers, and random places of the log.
    fn places(&self, random: &mut StdRng) -> Vec<usize> {
        let mut places = vec![0, 1, LOG_HEADER - 1, LOG_HEADER, LOG_HEADER + FRAME_HEADER];
        for (end, _) in self.frames() {
            places.extend([end - 1, end, end + 1, end + FRAME_HEADER]);
        }
        places.retain(|place| *place <= self.log.len());
        places.extend((0..RANDOM).map(|_| random.random_range(0..self.log.len())));
        places
    }
}

/// A journal and the state behind each of its commits, the first of which makes the tables.
struct Written {
    directory: tempfile::TempDir,
    store: Store,
    states: Vec<State>,
}

impl Written {
    fn new() -> Written {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let mut written = Written {
            directory,
            store,
            states: vec![State::default()],
        };
        written.commit(vec![submitted(1)]);
        written
    }

    fn commit(&mut self, facts: Vec<Fact>) {
        self.store.commit(&facts).unwrap();
        self.states.push(self.store.state().clone());
    }

    /// Commits of one step and of so many that they take several pages.
    fn train(&mut self, commits: usize) {
        for number in 0..commits {
            let count = if number % 3 == 2 { 150 } else { 1 };
            let facts = steps(&mut self.store.state().clone(), count);
            self.commit(facts);
        }
    }

    fn files(&self) -> Files {
        Files::read(self.directory.path())
    }

    /// Brings the log into the database. The log stays as it is until the next commit begins it anew.
    fn checkpoint(&self) {
        let connection = &self.store.connection;
        let busy: i64 = connection
            .query_row("PRAGMA wal_checkpoint(FULL)", [], |row| row.get(0))
            .unwrap();
        assert_eq!(busy, 0);
    }
}

/// The first `cut` bytes of `new`, and what `old` has behind them; a hole between the two.
fn torn(new: &[u8], old: &[u8], cut: usize) -> Vec<u8> {
    let mut torn = new[..cut.min(new.len())].to_vec();
    torn.resize(cut, 0);
    torn.extend(old.iter().skip(cut));
    torn
}

#[test]
fn a_log_that_is_cut_or_torn_anywhere_reopens_as_a_prefix() {
    let mut random = StdRng::seed_from_u64(4);
    let mut written = Written::new();
    written.train(9);
    let files = written.files();
    let frames = files.frames();
    assert!(frames.len() > written.states.len(), "commits of many pages");
    assert_eq!(
        files.commits_in(&files.log),
        written.states.len(),
        "a commit for the tables, and one for each state but the first"
    );
    for cut in files.places(&mut random) {
        let rest = files.log.len() - cut;
        let garbage: Vec<u8> = (0..rest).map(|_| random.random()).collect();
        for tail in [Vec::new(), vec![0; rest], garbage] {
            let torn = Files {
                log: [&files.log[..cut], &tail].concat(),
                ..files.clone()
            };
            // Of no commit at all the state is that of a new journal.
            let whole = files.commits_in(&torn.log).saturating_sub(1);
            assert!(
                torn.reopened() == written.states[whole],
                "cut at {cut}, {} bytes behind",
                tail.len()
            );
        }
    }
}

#[test]
fn a_log_that_was_begun_anew_and_cut_anywhere_reopens_as_a_prefix() {
    let mut random = StdRng::seed_from_u64(5);
    let mut written = Written::new();
    written.train(9);
    written.checkpoint();
    let (old, before) = (written.files(), written.states.len() - 1);
    written.train(4);
    let new = written.files();
    assert!(new.frames().len() < old.frames().len(), "old ones behind");
    assert_eq!(new.database, old.database);
    for cut in new.places(&mut random) {
        let torn = Files {
            log: torn(&new.log, &old.log, cut),
            ..new.clone()
        };
        let whole = before + new.commits_in(&torn.log);
        assert!(torn.reopened() == written.states[whole], "cut at {cut}");
    }
}

#[test]
fn a_database_that_was_written_in_part_is_made_whole_from_the_log() {
    let mut random = StdRng::seed_from_u64(6);
    let mut written = Written::new();
    written.train(9);
    let before = written.files();
    written.checkpoint();
    let after = written.files();
    assert!(after.database.len() > before.database.len() && after.log == before.log);
    let last = written.states.last().unwrap();
    let pages = (0..=after.database.len()).step_by(after.page());
    let others = (0..RANDOM).map(|_| random.random_range(0..after.database.len()));
    for cut in pages.chain(others.collect::<Vec<_>>()) {
        // Pages may reach the disk in any order: the first ones, or all but those.
        for (new, old) in [
            (&after.database, &before.database),
            (&before.database, &after.database),
        ] {
            let torn = Files {
                database: torn(new, old, cut),
                ..after.clone()
            };
            assert!(torn.reopened() == *last, "written up to {cut}");
        }
    }
}
