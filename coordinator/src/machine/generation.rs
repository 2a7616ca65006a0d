//! The generation in hand: volatile, since its members say again what a coordinator that restarts has forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use supra_proto::v1::{CheckpointWritten, Formed, Held, LeftReason, StepReport};
use supra_recipes::plan::Plan;
use supra_recipes::schema::Chaos;

use super::agreement::Said;
use super::evaluations::Measured;
use super::pacing::Pacing;
use super::snapshots::Told;
use super::state::RunNumber;
use super::worker::Conn;

/// Steps that a rank may report ahead of the slowest one. Ranks train in step, but one stream may be delayed while
/// another is not; this only bounds what is kept in memory.
pub(crate) const MAX_AHEAD: u64 = 4096;

/// Which workers train which run.
#[derive(Debug)]
pub(crate) struct Generation {
    pub run: RunNumber,
    pub number: u64,
    /// In rank order.
    pub members: Vec<Member>,
    /// Rank by stream: every message asks for it.
    pub ranks: BTreeMap<Conn, usize>,
    pub stage: Stage,
    /// Step that it starts from.
    pub from_step: u64,
    /// State in the memory of workers that it starts from; none = a checkpoint, or the base.
    pub from_held: Option<Held>,
    /// The checkpoint that its assignments name; none = the base. Only while it forms is it read.
    pub restores: Option<String>,
    /// Known once all have formed.
    pub plan: Option<Plan>,
    /// What it leaves in memory when it regroups is all of the state: every rank has that, or they take snapshots of it.
    pub whole: bool,
    /// Steps after a checkpoint whose results are logged.
    pub verify_steps: u64,
    /// What its ranks have told of snapshots.
    pub snapshots: Told,
    /// Why its members were asked to regroup, once they were.
    pub regroup: Option<String>,
    /// How its checkpoints are asked for; none when the recipe says when they are due, and before all have formed.
    pub pacing: Option<Pacing>,
    /// Faults that it is to endure; known once all have formed.
    pub chaos: Option<Chaos>,
    /// Reports on steps that not all ranks have reported yet, by rank.
    pub reports: BTreeMap<u64, BTreeMap<usize, StepReport>>,
    /// Newest step that ranks reported again when the coordinator had been away.
    pub repeated: u64,
    /// `eval.target_loss` of the recipe; known once all have formed.
    pub target_loss: Option<f64>,
    /// What was measured of states that the ledger does not account for yet, by step.
    pub measured: Measured,
    /// Steps whose checkpoints wait for the ledger's head.
    pub begun: BTreeSet<u64>,
    /// Checkpoints of steps that are not applied yet.
    pub held: Vec<CheckpointWritten>,
}

/// How far a generation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not every rank has formed.
    Forming,
    /// Steps are applied.
    Training,
    /// The coordinator was started again, at `since`, and not all members are back, which may take so long.
    Away { since: Duration, limit: Duration },
    /// Over: waiting for the members to leave, since then.
    Leaving { since: Duration, limit: Duration },
}

impl Stage {
    /// Ranks may not be far ahead of what is applied. Nothing is while the generation is only listened to; what ranks have to
    /// say again is bounded by the time that the coordinator was away.
    pub fn counts(self) -> bool {
        matches!(self, Stage::Forming | Stage::Training)
    }
}

/// One rank.
#[derive(Debug)]
pub(crate) struct Member {
    /// [`NO_CONN`](super::worker::NO_CONN) while it is not back from the time without a coordinator.
    pub conn: Conn,
    pub name: String,
    pub formed: Option<Formed>,
    /// How it left, when it did.
    pub left: Option<LeftReason>,
    /// Its stream is gone.
    pub lost: bool,
}

impl Member {
    /// It has nothing to do with the generation any more.
    pub fn gone(&self) -> bool {
        self.lost || self.left.is_some()
    }
}

impl Generation {
    /// Rank of the worker on this stream.
    pub fn rank(&self, conn: Conn) -> Option<usize> {
        self.ranks.get(&conn).copied()
    }

    /// It is over.
    pub fn leaving(&self) -> bool {
        matches!(self.stage, Stage::Leaving { .. })
    }

    /// All members have left or are lost.
    pub fn empty(&self) -> bool {
        self.members.iter().all(Member::gone)
    }

    /// What every rank said when it had formed; none until all have.
    pub fn all_formed(&self) -> Option<Vec<Said<'_, Formed>>> {
        self.members
            .iter()
            .enumerate()
            .map(|(rank, member)| Some((rank, member.name.as_str(), member.formed.as_ref()?)))
            .collect()
    }

    /// All members have left for this reason.
    pub fn all_left(&self, reason: LeftReason) -> bool {
        let mut members = self.members.iter();
        members.all(|member| member.left == Some(reason))
    }

    /// Notes a report; a repeat changes nothing.
    pub fn note(&mut self, rank: usize, report: StepReport) {
        let reports = self.reports.entry(report.step).or_default();
        reports.entry(rank).or_insert(report);
    }

    /// The reports on `step` that there are.
    pub fn reported(&self, step: u64) -> Vec<Said<'_, StepReport>> {
        let reports = self.reports.get(&step).into_iter().flatten();
        reports
            .map(|(rank, report)| (*rank, self.members[*rank].name.as_str(), report))
            .collect()
    }

    /// All ranks have reported `step`. Every report asks: their number says it without looking at each.
    pub fn complete(&self, step: u64) -> bool {
        let reports = self.reports.get(&step);
        reports.is_some_and(|reports| reports.len() == self.members.len())
    }
}
