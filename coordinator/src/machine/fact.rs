//! Decided facts: what the journal keeps.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::state::{Checkpoint, RunNumber, Workers};
use super::verify::Logged;
use crate::chaos;
use crate::gates::Gates;
use crate::ledger::{Body, Hash, Record, hex32};

/// Something that was decided. Replaying facts applies them and decides nothing, so a newer build reads an older
/// journal; for the same reason a variant or field, once written, keeps its meaning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fact", rename_all = "snake_case")]
pub enum Fact {
    /// A recipe was accepted and queued.
    Submitted {
        /// Number of the new run.
        run: RunNumber,
        /// Its id.
        id: String,
        /// The recipe's name.
        name: String,
        /// The resolved recipe as YAML.
        recipe: String,
        /// Directory of the checkpoints, absolute, or their URL.
        checkpoint_root: PathBuf,
        /// Published checkpoints that are kept.
        keep: u32,
        /// Of each multiple of so many tokens, the first checkpoint at or after it is kept, too; 0 = of none, as in journals that
        /// are older.
        #[serde(default)]
        keep_every: u64,
        /// A damaged checkpoint stops the run.
        #[serde(default)]
        strict: bool,
        /// Tokens of the whole samples of the budget.
        budget_tokens: u64,
        /// Workers that a generation needs, and may have.
        workers: Workers,
        /// Milliseconds since the Unix epoch.
        at: u64,
    },
    /// A run whose coordinator is gone was rebuilt from a checkpoint: the records of its ledger came before this, and the
    /// checkpoint comes after it.
    Adopted {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
        /// Hash of the state in it, as its manifest states it.
        #[serde(with = "hex32")]
        replica_hash: Hash,
        /// Its generations have greater numbers from here on: the coordinator that is gone may have given those up to this one.
        generation: u64,
        /// Milliseconds since the Unix epoch.
        at: u64,
    },
    /// A stopped run was queued again.
    Queued {
        /// Run.
        run: RunNumber,
        /// From here on, a damaged checkpoint stops it.
        #[serde(default)]
        strict: bool,
        /// Milliseconds since the Unix epoch.
        at: u64,
    },
    /// A stop with a checkpoint was asked for.
    StopAsked {
        /// Run.
        run: RunNumber,
        /// By whom or why.
        reason: String,
    },
    /// A generation got its members.
    Formed {
        /// Run.
        run: RunNumber,
        /// Number of the generation.
        generation: u64,
        /// Names of its workers, in rank order.
        members: Vec<String>,
        /// Step that it starts from: that of the newest checkpoint, or of what its workers still hold.
        from_step: u64,
        /// What has to be the same for another generation to give the same bits; zero in journals that are older.
        #[serde(default, with = "hex32")]
        circumstances: Hash,
    },
    /// A generation that outlived its coordinator goes on: all its workers are back.
    TakenUp {
        /// Run.
        run: RunNumber,
        /// Number of the generation.
        generation: u64,
        /// Milliseconds since the Unix epoch.
        at: u64,
    },
    /// A generation is over, but its run is not: it is void, or its members regroup.
    Broke {
        /// Run.
        run: RunNumber,
        /// Number of the generation.
        generation: u64,
        /// Last applied step at that moment.
        step: u64,
        /// It counts towards giving up.
        counts: bool,
        /// Rank, worker, phase and cause in one line.
        cause: String,
    },
    /// A ledger record. Stored in a table of its own.
    #[serde(skip)]
    Recorded {
        /// Run.
        run: RunNumber,
        /// The record.
        record: Record,
    },
    /// What one of the first steps after the newest checkpoint came to.
    Logged {
        /// Run.
        run: RunNumber,
        /// What it came to; it takes the place of an earlier result, and of those of later steps.
        result: Logged,
    },
    /// The linearisation gates of a state were measured. (The held-out loss is a record of the ledger.)
    Gated {
        /// Run.
        run: RunNumber,
        /// What they show.
        gates: Gates,
    },
    /// Rank 0 has written a checkpoint of an applied step.
    Written {
        /// Run.
        run: RunNumber,
        /// The checkpoint, unpublished.
        checkpoint: Checkpoint,
    },
    /// A checkpoint's manifest has its final name.
    Published {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
    },
    /// All of a published checkpoint was read again and is what was written: older ones may go.
    Verified {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
    },
    /// A checkpoint is not what was written: nothing starts from it from here on.
    Damaged {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
        /// File and cause, in one line.
        problem: String,
    },
    /// A user has a checkpoint kept under a name, or drops that.
    Named {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
        /// The name; empty = it has none from here on.
        name: String,
    },
    /// A checkpoint is not needed any more: nothing starts from it from here on.
    Retired {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
    },
    /// The directory of a retired checkpoint is gone.
    Deleted {
        /// Run.
        run: RunNumber,
        /// Which checkpoint.
        path: String,
    },
    /// A run whose checkpoints the coordinator asks for has trained on: what the interval follows from.
    Trained {
        /// Run.
        run: RunNumber,
        /// Since the last such fact or the beginning of its generation, milliseconds.
        trained_ms: u64,
        /// Workers that trained.
        world: u32,
        /// For how long training stood still for the checkpoint that was just written, milliseconds; none when none was.
        cost_ms: Option<u64>,
    },
    /// A run with `chaos` trains for the first time.
    ChaosBegun {
        /// Run.
        run: RunNumber,
        /// Faults that it is to endure.
        faults: u32,
    },
    /// A worker is to be broken on purpose.
    FaultOrdered {
        /// Run.
        run: RunNumber,
        /// What and whom.
        fault: chaos::Fault,
    },
    /// The run has recovered from the last fault that was ordered.
    FaultSurvived {
        /// Run.
        run: RunNumber,
        /// Longest time without an applied step since, milliseconds.
        stood_still_ms: u64,
    },
    /// A run with `chaos` has ended, and how it stood it is known.
    ChaosMarked {
        /// Run.
        run: RunNumber,
        /// How.
        mark: chaos::Mark,
    },
    /// A run is over, for good or until it is resumed.
    Ended {
        /// Run.
        run: RunNumber,
        /// How.
        outcome: Outcome,
        /// Why, in one line; empty when it finished.
        reason: String,
        /// Milliseconds since the Unix epoch.
        at: u64,
        /// It failed since a checkpoint is damaged and it is strict.
        #[serde(default)]
        broken: bool,
    },
    /// No generation takes a worker any more, until its supervisor is started anew.
    PutAside {
        /// Name of the worker.
        worker: String,
        /// Of its supervisor.
        instance: String,
        /// Why, in one line.
        reason: String,
        /// Milliseconds since the Unix epoch.
        at: u64,
    },
    /// A worker that was aside is as good as any other: its supervisor was started anew.
    TakenBack {
        /// Name of the worker.
        worker: String,
        /// Milliseconds since the Unix epoch.
        at: u64,
    },
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The budget is spent.
    Finished,
    /// Stopped on request.
    Cancelled,
    /// Gave up.
    Failed,
}

impl Fact {
    /// The run that it speaks of; 0 when it speaks of none.
    pub fn run(&self) -> RunNumber {
        match self {
            Fact::Submitted { run, .. }
            | Fact::Adopted { run, .. }
            | Fact::Queued { run, .. }
            | Fact::StopAsked { run, .. }
            | Fact::Formed { run, .. }
            | Fact::TakenUp { run, .. }
            | Fact::Broke { run, .. }
            | Fact::Recorded { run, .. }
            | Fact::Logged { run, .. }
            | Fact::Gated { run, .. }
            | Fact::Written { run, .. }
            | Fact::Published { run, .. }
            | Fact::Verified { run, .. }
            | Fact::Damaged { run, .. }
            | Fact::Named { run, .. }
            | Fact::Retired { run, .. }
            | Fact::Deleted { run, .. }
            | Fact::Trained { run, .. }
            | Fact::ChaosBegun { run, .. }
            | Fact::FaultOrdered { run, .. }
            | Fact::FaultSurvived { run, .. }
            | Fact::ChaosMarked { run, .. }
            | Fact::Ended { run, .. } => *run,
            Fact::PutAside { .. } | Fact::TakenBack { .. } => 0,
        }
    }

    /// It has to be on disk before anyone is told. Only applied steps, what they came to, and what was measured behind them may
    /// follow later: nobody acts on them, and a lost one is trained or said again.
    pub fn urgent(&self) -> bool {
        match self {
            Fact::Recorded { record, .. } => {
                !matches!(record.body, Body::Step(_) | Body::Evaluated(_))
            }
            Fact::Logged { .. } | Fact::Gated { .. } => false,
            _ => true,
        }
    }
}
