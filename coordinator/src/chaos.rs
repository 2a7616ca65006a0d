//! The faults that a run inflicts on its own workers, as its recipe's `chaos` says: which ones, what became of them, and the
//! mark in the end. Plain functions of what was ordered; who orders, and when, stands in `machine/chaos.rs`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use supra_proto::v1;
use supra_recipes::schema::{Chaos, ChaosKind};

use crate::interval::time;

/// For how long a worker stands still or is drained, shortest and longest, milliseconds. Silence is noticed after 10 s.
const STOPPED_MS: (f64, f64) = (500.0, 15_000.0);
const DRAINED_MS: (f64, f64) = (1000.0, 10_000.0);

/// What happens to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Draw {
    pub kind: ChaosKind,
    pub rank: usize,
    /// For how long, where it lasts.
    pub lasts_ms: u64,
}

/// Fault `number` of a recipe, for a generation of `world` ranks; none when nothing that the recipe names can happen to
/// it. The same seed draws the same again.
pub(crate) fn draw(chaos: &Chaos, number: u32, world: usize) -> Option<Draw> {
    let possible = |kind: &&ChaosKind| **kind != ChaosKind::Reset || world > 1;
    let kinds: Vec<ChaosKind> = chaos.kinds.iter().filter(possible).copied().collect();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&chaos.seed.to_le_bytes());
    hasher.update(&number.to_le_bytes());
    let mut bytes = hasher.finalize_xof();
    let mut uniform = || {
        let mut word = [0; 8];
        bytes.fill(&mut word);
        // 53 bits are what fits a double exactly: below 1, always.
        (u64::from_le_bytes(word) >> 11) as f64 / (1u64 << 53) as f64
    };
    let kind = *kinds.get((uniform() * kinds.len() as f64) as usize)?;
    let rank = (uniform() * world as f64) as usize;
    // Short and long ones are equally likely: the logarithm is uniform.
    let mut lasts =
        |(shortest, longest): (f64, f64)| (shortest * (longest / shortest).powf(uniform())) as u64;
    let lasts_ms = match kind {
        ChaosKind::Stop => lasts(STOPPED_MS),
        ChaosKind::Drain => lasts(DRAINED_MS),
        ChaosKind::Kill | ChaosKind::Disconnect | ChaosKind::Reset => 0,
    };
    Some(Draw {
        kind,
        rank,
        lasts_ms,
    })
}

/// A fault that was ordered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What happened.
    pub kind: ChaosKind,
    /// Name of the worker that it happened to.
    pub worker: String,
    /// Generation that trained then.
    pub generation: u64,
    /// Last applied step.
    pub step: u64,
    /// For how long it lasted by itself, milliseconds; 0 where that has no meaning.
    pub lasts_ms: u64,
    /// Longest time without an applied step from then until the run had recovered, milliseconds; `null` when it has not.
    pub stood_still_ms: Option<u64>,
}

impl Fault {
    /// `kill of b`.
    pub(crate) fn what(&self) -> String {
        format!("{} of {}", self.kind, self.worker)
    }

    pub(crate) fn lasts(&self) -> Duration {
        Duration::from_millis(self.lasts_ms)
    }
}

/// The mark of a run that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Every fault was survived, and every sample trained exactly once.
    pub passed: bool,
    /// Why not; empty when passed.
    pub why: String,
}

/// All that a run with `chaos` goes through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ordeal {
    /// Faults that its recipe asks for.
    pub of: u32,
    /// Those that were ordered, in order.
    pub faults: Vec<Fault>,
    /// Once the run has ended.
    pub mark: Option<Mark>,
}

impl Ordeal {
    /// An ordeal of so many faults, before the first.
    pub(crate) fn new(of: u32) -> Ordeal {
        Ordeal {
            of,
            faults: Vec::new(),
            mark: None,
        }
    }

    /// The last fault, while the run has not recovered from it.
    pub(crate) fn open(&self) -> Option<&Fault> {
        let last = self.faults.last();
        last.filter(|fault| fault.stood_still_ms.is_none())
    }

    /// The run has recovered from the last fault.
    pub(crate) fn survived(&mut self, stood_still_ms: u64) {
        if let Some(fault) = self.faults.last_mut() {
            fault.stood_still_ms = Some(stood_still_ms);
        }
    }

    /// The mark of a run that has spent its budget, by the audit of its ledger.
    pub(crate) fn judge(&self, audited: Result<(), String>) -> Mark {
        let (ordered, of) = (self.faults.len(), self.of);
        let why = match audited {
            Err(broken) => format!("the audit of the ledger says: {broken}"),
            Ok(()) if (ordered as u64) < u64::from(of) => format!(
                "only {ordered} of {of} faults fitted into the run; give it more tokens, or a shorter `chaos.every`"
            ),
            Ok(()) => String::new(),
        };
        Mark {
            passed: why.is_empty(),
            why,
        }
    }

    fn recovered(&self) -> impl Iterator<Item = u64> + '_ {
        let faults = self.faults.iter();
        faults.filter_map(|fault| fault.stood_still_ms)
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let ordered = self.faults.len();
        match &self.mark {
            Some(Mark { passed: true, .. }) => format!(
                "passed: {ordered} faults survived{}, every sample trained exactly once{}",
                self.by_kind(),
                self.stood_still(),
            ),
            Some(Mark { why, .. }) => {
                let of = self.of;
                format!("failed: {why} ({ordered} of {of} faults{})", self.by_kind())
            }
            None => format!("{ordered} of {} faults ordered{}", self.of, self.by_kind()),
        }
    }

    /// `: 8 kill, 3 stop`; nothing before the first.
    fn by_kind(&self) -> String {
        let mut kinds: BTreeMap<ChaosKind, usize> = BTreeMap::new();
        for fault in &self.faults {
            *kinds.entry(fault.kind).or_default() += 1;
        }
        let counts = kinds.iter().map(|(kind, count)| format!("{count} {kind}"));
        let counts: Vec<String> = counts.collect();
        match counts.as_slice() {
            [] => String::new(),
            counts => format!(": {}", counts.join(", ")),
        }
    }

    fn stood_still(&self) -> String {
        let mut times: Vec<u64> = self.recovered().collect();
        times.sort_unstable();
        let seconds = |ms: u64| time(ms as f64 / 1e3);
        match (times.get(times.len() / 2), times.last()) {
            (Some(median), Some(longest)) => format!(
                "; training stood still for {} in the median, {} at most",
                seconds(*median),
                seconds(*longest)
            ),
            _ => String::new(),
        }
    }
}

impl From<&Ordeal> for v1::Chaos {
    fn from(ordeal: &Ordeal) -> v1::Chaos {
        let mark = match &ordeal.mark {
            None => v1::ChaosMark::Unspecified,
            Some(mark) if mark.passed => v1::ChaosMark::Passed,
            Some(_) => v1::ChaosMark::Failed,
        };
        v1::Chaos {
            faults: ordeal.of,
            ordered: ordeal.faults.len() as u32,
            survived: ordeal.recovered().count() as u32,
            mark: mark.into(),
            text: ordeal.line(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suffered(kinds: &[(ChaosKind, u64)], of: u32) -> Ordeal {
        let mut ordeal = Ordeal::new(of);
        for (kind, stood_still_ms) in kinds {
            ordeal.faults.push(Fault {
                kind: *kind,
                worker: "b".into(),
                generation: 1,
                step: 4,
                lasts_ms: 0,
                stood_still_ms: None,
            });
            ordeal.survived(*stood_still_ms);
        }
        ordeal
    }

    #[test]
    fn a_seed_draws_the_same_again_every_kind_and_every_rank() {
        let chaos = Chaos::default();
        let all: Vec<Draw> = (1..=200).filter_map(|n| draw(&chaos, n, 4)).collect();
        assert_eq!(all.len(), 200);
        assert_eq!(draw(&chaos, 7, 4), Some(all[6]));
        for kind in ChaosKind::ALL {
            let of_kind = all.iter().filter(|draw| draw.kind == kind);
            let lasts: Vec<u64> = of_kind.map(|draw| draw.lasts_ms).collect();
            assert!(lasts.len() > 20, "{kind}: {}", lasts.len());
            let bounds = match kind {
                ChaosKind::Stop => 500..=15_000,
                ChaosKind::Drain => 1000..=10_000,
                _ => 0..=0,
            };
            assert!(lasts.iter().all(|lasts| bounds.contains(lasts)), "{kind}");
        }
        assert!((0..4).all(|rank| all.iter().any(|draw| draw.rank == rank)));
        let other = Chaos { seed: 2, ..chaos };
        assert_ne!(draw(&other, 1, 4), Some(all[0]));
    }

    #[test]
    fn a_lone_rank_has_no_connections_to_reset() {
        let mut chaos = Chaos {
            kinds: vec![ChaosKind::Reset, ChaosKind::Kill],
            ..Chaos::default()
        };
        let alone = |number| draw(&chaos, number, 1).map(|draw| draw.kind);
        assert!((1..50).all(|number| alone(number) == Some(ChaosKind::Kill)));
        chaos.kinds = vec![ChaosKind::Reset];
        assert_eq!(draw(&chaos, 1, 1), None);
    }

    #[test]
    fn the_mark_counts_the_faults_and_says_for_how_long_training_stood_still() {
        let kinds = [
            (ChaosKind::Kill, 400),
            (ChaosKind::Stop, 9000),
            (ChaosKind::Kill, 600),
        ];
        let mut ordeal = suffered(&kinds, 3);
        assert_eq!(ordeal.line(), "3 of 3 faults ordered: 2 kill, 1 stop");
        ordeal.mark = Some(ordeal.judge(Ok(())));
        assert_eq!(
            ordeal.line(),
            "passed: 3 faults survived: 2 kill, 1 stop, every sample trained exactly once; \
             training stood still for 0.6 s in the median, 9.0 s at most"
        );
    }

    #[test]
    fn a_broken_ledger_and_faults_that_did_not_fit_fail() {
        let mut ordeal = suffered(&[(ChaosKind::Drain, 50)], 2);
        let mark = ordeal.judge(Err("record 7: step 3 again".into()));
        assert!(!mark.passed && mark.why.contains("step 3 again"));
        ordeal.mark = Some(ordeal.judge(Ok(())));
        assert_eq!(
            ordeal.line(),
            "failed: only 1 of 2 faults fitted into the run; give it more tokens, or a shorter `chaos.every` (1 of 2 faults: 1 drain)"
        );
    }
}
