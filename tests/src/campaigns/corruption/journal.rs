//! Whether a journal that was damaged is taken for what it was.

use std::fs;
use std::path::Path;

use supra_coordinator::audit::{Options, Outcome, audit};
use supra_coordinator::journal::{Journal, JournalError, Reader};
use supra_coordinator::ledger::{Body, Open, Record, Step, Tail};
use supra_coordinator::machine::{Fact, Run, RunNumber, State, Workers};

use super::Verdict;
use crate::failure::{Failure, Result};

/// Records of a run that are read: all of them.
const RECORDS: usize = 1 << 20;
/// Steps of the journal that is long enough for a snapshot.
const LONG: u64 = 4200;

/// Everything that a journal held.
#[derive(Clone, Debug, PartialEq)]
struct Content {
    state: State,
    /// Of each run.
    ledgers: Vec<Vec<Record>>,
}

/// What a sound journal holds, and what it holds with one more fact.
pub struct Known {
    before: Content,
    after: Content,
}

impl Known {
    /// The journal in `directory`, which is left with one more fact.
    ///
    /// # Errors
    /// It is not sound.
    pub fn of(directory: &Path) -> Result<Known> {
        let content = || {
            let (journal, state) = Journal::open(directory)?;
            let content = Content::read(directory, state)?;
            journal.append(vec![later()])?;
            content.ok_or_else(|| Failure::new("the ledger of a sound journal cannot be read"))
        };
        let before = content()?;
        Ok(Known {
            before,
            after: content()?,
        })
    }

    /// What a coordinator and an audit make of the journal in `directory`.
    pub fn compare(&self, directory: &Path) -> Verdict {
        let (journal, content) = match open(directory) {
            Ok(opened) => opened,
            Err(_) => return Verdict::Found,
        };
        let Some(content) = content else {
            return Verdict::Found;
        };
        if content != self.before {
            let runs = content.state.runs().iter().zip(&content.ledgers);
            let broken = runs.into_iter().any(|(run, ledger)| is_broken(run, ledger));
            return match broken {
                true => Verdict::Found,
                false => Verdict::Taken("another state, and the audit agrees".to_owned()),
            };
        }
        // Nothing that was written has changed. Will what is written from here on be there, too?
        if journal.append(vec![later()]).is_err() {
            return Verdict::Found;
        }
        drop(journal);
        match open(directory) {
            Err(_) | Ok((_, None)) => Verdict::Found,
            Ok((_, Some(content))) if content == self.after => Verdict::Harmless,
            Ok(_) => Verdict::Taken("another state after the next fact".to_owned()),
        }
    }
}

impl Content {
    /// None when a record cannot be read, which an audit says.
    fn read(directory: &Path, state: State) -> std::result::Result<Option<Content>, JournalError> {
        let reader = Reader::open(directory)?;
        let mut ledgers = Vec::new();
        for run in state.runs() {
            let records = reader.ledger(run.number, 0, RECORDS)?;
            match records.into_iter().collect() {
                Ok(records) => ledgers.push(records),
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(Content { state, ledgers }))
    }
}

fn open(directory: &Path) -> std::result::Result<(Journal, Option<Content>), JournalError> {
    let (journal, state) = Journal::open(directory)?;
    Ok((journal, Content::read(directory, state)?))
}

/// As `supra audit --state` audits it.
fn is_broken(run: &Run, ledger: &[Record]) -> bool {
    let options = Options {
        head: Some(run.ledger.head),
        recipe_hash: Some(*blake3::hash(run.recipe.as_bytes()).as_bytes()),
        ..Options::default()
    };
    audit(ledger.iter().cloned(), options).verdict == Outcome::Broken
}

/// A fact that may come at any time.
fn later() -> Fact {
    Fact::PutAside {
        worker: "w0".to_owned(),
        instance: "1".to_owned(),
        reason: "drained by a user".to_owned(),
        at: 1,
    }
}

/// Writes a journal that has a snapshot.
///
/// # Errors
/// It cannot be written.
pub fn write_long(directory: &Path) -> Result<()> {
    const RECIPE: &str = "name: long\n";
    const RUN: RunNumber = 1;
    fs::create_dir_all(directory)?;
    let mut facts = vec![Fact::Submitted {
        run: RUN,
        id: "long-1".to_owned(),
        name: "long".to_owned(),
        recipe: RECIPE.to_owned(),
        checkpoint_root: "/checkpoints".into(),
        keep: 3,
        keep_every: 0,
        strict: false,
        budget_tokens: 8 * 4 * LONG,
        workers: Workers {
            min: 1,
            max: 1,
            grace: std::time::Duration::from_secs(1),
        },
        at: 1,
    }];
    let open = Body::Open(Open {
        run: "long-1".to_owned(),
        recipe_hash: *blake3::hash(RECIPE.as_bytes()).as_bytes(),
        manifest_hash: [2; 32],
        windows: 100,
        sequence_length: 8,
        batch_samples: 4,
        samples: 4 * LONG,
        steps: LONG,
    });
    let step = |step: u64| {
        Body::Step(Step {
            generation: 1,
            step,
            first_sample: 4 * (step - 1),
            samples: 4,
            digest: *blake3::hash(&step.to_le_bytes()).as_bytes(),
            skipped: false,
        })
    };
    let mut tail = Tail::default();
    for body in [open].into_iter().chain((1..=LONG).map(step)) {
        let record = tail.next(body);
        tail.advance(&record);
        facts.push(Fact::Recorded { run: RUN, record });
    }
    let last = facts.split_off(facts.len() - 20);
    // Committed apart: the snapshot comes with the first, and some facts come behind it.
    for facts in [facts, last] {
        Journal::open(directory)?.0.append(facts)?;
    }
    Ok(())
}
