//! The accounts of all runs' time: fed by the owner, noted in the telemetry, shown in statuses and receipts.

use std::collections::{BTreeMap, BTreeSet};

use supra_proto::v1::{RunStatus, StepMetrics};

use crate::goodput::{Account, Doing};
use crate::machine::{Fact, Run, RunNumber};
use crate::telemetry::{Telemetry, TelemetryReader};

/// Time between two notes of a run that only trains, milliseconds: what a coordinator that dies forgets at most.
const NOTE_EVERY_MS: u64 = 5000;

/// The account of every run that has one.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    of: BTreeMap<RunNumber, Account>,
    /// Run that was last seen to do something.
    busy: Option<RunNumber>,
    /// Runs about which something was decided since their last note.
    changed: BTreeSet<RunNumber>,
    noted_unix_ms: u64,
}

impl Accounts {
    /// Goes on from what the last coordinator noted. A run that ended before there were accounts has none: where its time
    /// went, nobody knows.
    ///
    /// # Errors
    /// SQLite cannot read the notes.
    pub fn resumed(runs: &[Run], reader: &TelemetryReader, at: u64) -> rusqlite::Result<Accounts> {
        let mut accounts = Accounts::default();
        for run in runs {
            let note = reader.account(run.number)?;
            let noted = note.and_then(|note| serde_json::from_str(&note).ok());
            let unnoted = || {
                (!run.ended() || run.generation == 0)
                    .then(|| Account::unnoted(run.submitted_unix_ms, run.alive))
            };
            if let Some(mut account) = noted.or_else(unnoted) {
                account.resumed(at);
                accounts.of.insert(run.number, account);
            }
        }
        Ok(accounts)
    }

    pub fn of(&self, run: RunNumber) -> Option<&Account> {
        self.of.get(&run)
    }

    pub fn decided(&mut self, fact: &Fact, at: u64) {
        let run = fact.run();
        if let Fact::Submitted { at, .. } = fact {
            self.of.insert(run, Account::new(*at));
        }
        if let Some(account) = self.of.get_mut(&run) {
            account.decided(fact, at);
            if fact.urgent() {
                self.changed.insert(run);
            }
        }
    }

    pub fn measured(&mut self, run: RunNumber, metrics: &StepMetrics, at: u64) {
        if let Some(account) = self.of.get_mut(&run) {
            account.measured(metrics, at);
        }
    }

    pub fn stood_still(&mut self, run: RunNumber, seconds: f64, at: u64) {
        if let Some(account) = self.of.get_mut(&run) {
            account.stood_still(seconds, at);
        }
    }

    /// What the one run that has the workers does; all others idle.
    pub fn seen(&mut self, pulse: Option<(RunNumber, Doing)>, at: u64) {
        let (run, doing) = pulse.unzip();
        if let Some(account) = self
            .busy
            .filter(|busy| run != Some(*busy))
            .and_then(|busy| self.of.get_mut(&busy))
        {
            account.seen(Doing::Idle, at);
        }
        if let Some(account) = run.and_then(|run| self.of.get_mut(&run)) {
            account.seen(doing.unwrap_or_default(), at);
        }
        self.busy = run;
    }

    pub fn show(&self, run: RunNumber, status: &mut RunStatus, at: u64) {
        status.goodput = self.of(run).map(|account| account.parts(at).into());
    }

    /// Notes what was decided, and now and then what only went on.
    pub fn note(&mut self, telemetry: &Telemetry, at: u64) {
        if at.saturating_sub(self.noted_unix_ms) >= NOTE_EVERY_MS {
            self.noted_unix_ms = at;
            self.changed.extend(self.busy);
        }
        for run in std::mem::take(&mut self.changed) {
            if let Some(account) = self.of.get(&run) {
                let json = serde_json::to_string(account).expect(
                    "invariant: an account has only text, numbers and keys that are numbers",
                );
                telemetry.account(run, json);
            }
        }
    }
}
