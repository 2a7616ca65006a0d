//! What a coordinator remembers.

use std::fs;

use supra_coordinator::audit::{Options, audit};
use supra_coordinator::journal::Reader;
use supra_coordinator::ledger::{Body, Record, Tail};
use supra_coordinator::machine::{Fact, State};
use supra_proto::v1::LedgerRecord;

use crate::scratch::scratch;

/// Records of a run that are read.
const RECORDS: usize = 1000;

/// The database of a journal.
pub fn journal(data: &[u8]) {
    scratch(|directory| {
        fs::write(directory.join("journal.db"), data).expect("our directory");
        let Ok(reader) = Reader::open(directory) else {
            return;
        };
        let _ = reader.check_end();
        let runs = reader.state().map_or(1, |state| state.runs().len() as u32);
        for run in 1..=runs.min(3) {
            let records = reader.ledger(run, 0, RECORDS).into_iter().flatten();
            let _ = audit(records.flatten(), Options::default());
        }
    });
}

/// Facts as the journal keeps them, one a line. What was read and applied can be written and read again.
pub fn facts(data: &[u8]) {
    let mut state = State::default();
    for line in data.split(|byte| *byte == b'\n') {
        let Ok(fact) = serde_json::from_slice::<Fact>(line) else {
            continue;
        };
        let text = serde_json::to_vec(&fact).expect("facts have only string keys");
        let again: Fact = serde_json::from_slice(&text).expect("written by us");
        assert_eq!(again, fact);
        state.apply(&fact);
    }
    for run in state.runs() {
        let _ = (run.recovery_step(), run.tokens(), run.trained_by(run.step));
    }
    let text = serde_json::to_vec(&state).expect("states have only string keys");
    let again: State = serde_json::from_slice(&text).expect("written by us");
    assert_eq!(again, state);
}

/// Bodies of ledger records, each behind a byte that says its length: there is one way to write each, none is lost on the
/// wire, and the audit of any ledger comes to a verdict.
pub fn ledger(data: &[u8]) {
    let (mut tail, mut state, mut records) = (Tail::default(), State::default(), Vec::new());
    let mut rest = data;
    while let Some((length, bytes)) = rest.split_first() {
        let (bytes, behind) = bytes.split_at(bytes.len().min(usize::from(*length)));
        rest = behind;
        let Some(body) = Body::decode(bytes) else {
            continue;
        };
        assert_eq!(body.encode(), bytes);
        let record = tail.next(body);
        tail.advance(&record);
        let wire = LedgerRecord::from(&record);
        assert_eq!(Record::try_from(wire).expect("written by us"), record);
        state.apply(&Fact::Recorded {
            run: 1,
            record: record.clone(),
        });
        records.push(record);
    }
    let verdict = audit(records, Options::default());
    assert_eq!(verdict.head, supra_coordinator::ledger::hex(&tail.head));
}
