//! Faults that a run inflicts on its own workers, to show on this very cluster that it survives them.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bounds;
use super::period::Period;

/// What can be done to a worker.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ChaosKind {
    /// Its computing process dies by SIGKILL; its supervisor starts another.
    Kill,
    /// Its computing process stands still (SIGSTOP) for a while.
    Stop,
    /// It drops its connection to the coordinator.
    Disconnect,
    /// It closes its connections to the other ranks. Left out while there is only one rank.
    Reset,
    /// It is drained, and may come back after a while.
    Drain,
}

impl ChaosKind {
    /// All of them.
    pub const ALL: [ChaosKind; 5] = [
        ChaosKind::Kill,
        ChaosKind::Stop,
        ChaosKind::Disconnect,
        ChaosKind::Reset,
        ChaosKind::Drain,
    ];
}

impl fmt::Display for ChaosKind {
    /// As recipes spell it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ChaosKind::Kill => "kill",
            ChaosKind::Stop => "stop",
            ChaosKind::Disconnect => "disconnect",
            ChaosKind::Reset => "reset",
            ChaosKind::Drain => "drain",
        })
    }
}

/// Faults that the coordinator orders while the run trains. The run ends with a mark: all of them survived, and every sample
/// trained exactly once, or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Chaos {
    /// How many.
    #[serde(deserialize_with = "bounds::counting")]
    #[schemars(range(min = 1))]
    pub faults: u32,
    /// Time from one to the next, and longer where the run has not recovered from the one before.
    pub every: Period,
    /// What they are drawn from, with equal chances; one that stands here twice comes twice as often.
    #[schemars(length(min = 1))]
    pub kinds: Vec<ChaosKind>,
    /// Seed of the draw: which kind, which rank, and for how long where it lasts.
    pub seed: u64,
}

impl Default for Chaos {
    fn default() -> Self {
        Chaos {
            faults: 20,
            every: Period::seconds(30),
            kinds: ChaosKind::ALL.to_vec(),
            seed: 1,
        }
    }
}

impl Chaos {
    /// One line for whoever is about to start the run.
    pub fn warning(&self) -> String {
        let mut kinds = self.kinds.clone();
        kinds.sort_unstable();
        kinds.dedup();
        let kinds: Vec<String> = kinds.iter().map(ChaosKind::to_string).collect();
        format!(
            "this run breaks its own workers on purpose: {} faults, one every {} ({})",
            self.faults,
            self.every,
            kinds.join(", ")
        )
    }
}
