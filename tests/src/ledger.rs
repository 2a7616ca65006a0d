//! The promise "every sample exactly once", checked from the ledger without any code of the programs.

use std::collections::{BTreeMap, BTreeSet};

use supra_proto::v1::LedgerRecord;
use supra_proto::v1::ledger_record::Body;

use crate::failure::{Failure, Result};

/// Fails unless the steps that were not voided are exactly `0..samples`, each once and in order, and
/// the chain of hashes has no gap.
pub fn expect_exactly_once(records: &[LedgerRecord], samples: u64) -> Result<()> {
    let wrong = |text: String| Err(Failure::new(format!("the ledger is wrong: {text}")));
    let mut kept: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let mut head = vec![0; 32];
    for (index, record) in (0..).zip(records) {
        if record.index != index || record.previous != head {
            return wrong(format!(
                "record {} does not follow its predecessor",
                record.index
            ));
        }
        head.clone_from(&record.hash);
        match &record.body {
            Some(Body::Step(step)) => {
                let before = kept.insert(step.step, (step.first_sample, step.samples));
                if before.is_some() {
                    return wrong(format!("step {} was applied twice", step.step));
                }
            }
            Some(Body::Void(void)) => drop(kept.split_off(&(void.after_step + 1))),
            Some(Body::Close(close)) if close.samples != samples => {
                return wrong(format!(
                    "closed after {} of {samples} samples",
                    close.samples
                ));
            }
            _ => {}
        }
    }
    let mut next = 0;
    for (step, (first, count)) in kept {
        if first != next {
            return wrong(format!(
                "step {step} begins at sample {first} instead of {next}"
            ));
        }
        next = first + count;
    }
    if next == samples {
        Ok(())
    } else {
        wrong(format!("{next} of {samples} samples"))
    }
}

/// How the steps that were not voided cover the samples of the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coverage {
    /// Samples that none of them trained.
    pub lost: u64,
    /// Samples that were trained though an earlier one of them had done so.
    pub repeated: u64,
}

/// Counts what [`expect_exactly_once`] would complain about.
pub fn coverage(records: &[LedgerRecord], samples: u64) -> Coverage {
    let mut steps = Vec::new();
    for record in records {
        match &record.body {
            Some(Body::Step(step)) => steps.push((step.first_sample, step.samples, step.step)),
            Some(Body::Void(void)) => steps.retain(|(_, _, step)| *step <= void.after_step),
            _ => {}
        }
    }
    steps.sort_unstable();
    let (mut next, mut lost, mut repeated) = (0, 0, 0);
    for (first, count, _) in steps {
        let end = first + count;
        lost += first.saturating_sub(next);
        repeated += next.min(end).saturating_sub(first);
        next = next.max(end);
    }
    lost += samples.saturating_sub(next);
    Coverage { lost, repeated }
}

/// Of each void: the last step applied before it, and the last that stays.
pub fn voids(records: &[LedgerRecord]) -> Vec<(u64, u64)> {
    let mut last = 0;
    let mut voids = Vec::new();
    for record in records {
        match &record.body {
            Some(Body::Step(step)) => last = step.step,
            Some(Body::Void(void)) => voids.push((last, void.after_step)),
            _ => {}
        }
    }
    voids
}

/// The generations in which the steps were trained that were not voided.
pub fn generations(records: &[LedgerRecord]) -> BTreeSet<u64> {
    let mut kept = BTreeMap::new();
    for record in records {
        match &record.body {
            Some(Body::Step(step)) => drop(kept.insert(step.step, step.generation)),
            Some(Body::Void(void)) => drop(kept.split_off(&(void.after_step + 1))),
            _ => {}
        }
    }
    kept.into_values().collect()
}

#[cfg(test)]
mod tests {
    use supra_proto::v1::{LedgerStep, LedgerVoid};

    use super::*;

    fn chain(bodies: Vec<Body>) -> Vec<LedgerRecord> {
        let link = |index: u64| {
            if index == 0 {
                vec![0; 32]
            } else {
                vec![index as u8; 32]
            }
        };
        let record = |(index, body)| LedgerRecord {
            index,
            previous: link(index),
            hash: link(index + 1),
            body: Some(body),
        };
        (0..).zip(bodies).map(record).collect()
    }

    fn step(step: u64, first_sample: u64) -> Body {
        Body::Step(LedgerStep {
            step,
            first_sample,
            samples: 4,
            ..LedgerStep::default()
        })
    }

    #[test]
    fn a_voided_step_counts_only_once_repeated() {
        let void = Body::Void(LedgerVoid {
            after_step: 1,
            ..LedgerVoid::default()
        });
        let records = chain(vec![step(1, 0), step(2, 4), void.clone(), step(2, 4)]);
        expect_exactly_once(&records, 8).expect("exactly once");
        expect_exactly_once(&chain(vec![step(1, 0), step(2, 4), void]), 8)
            .expect_err("one is lost");
        expect_exactly_once(&chain(vec![step(1, 0), step(2, 4), step(2, 4)]), 8)
            .expect_err("twice");
        expect_exactly_once(&chain(vec![step(1, 0), step(2, 5)]), 9).expect_err("a hole");
    }

    #[test]
    fn lost_and_repeated_samples_are_counted() {
        let void = Body::Void(LedgerVoid {
            after_step: 1,
            ..LedgerVoid::default()
        });
        let count = |bodies, samples| {
            let Coverage { lost, repeated } = coverage(&chain(bodies), samples);
            (lost, repeated)
        };
        let again = vec![step(1, 0), step(2, 4), void.clone(), step(2, 4)];
        assert_eq!(count(again, 8), (0, 0));
        assert_eq!(count(vec![step(1, 0), step(2, 4), void], 8), (4, 0));
        assert_eq!(count(vec![step(1, 0), step(2, 3), step(3, 9)], 13), (2, 1));
        assert_eq!(count(vec![step(1, 0), step(2, 0)], 8), (4, 4));
    }

    #[test]
    fn generations_whose_steps_were_all_voided_do_not_count() {
        let in_generation = |generation, step| {
            Body::Step(LedgerStep {
                generation,
                step,
                ..LedgerStep::default()
            })
        };
        let void = Body::Void(LedgerVoid {
            after_step: 1,
            ..LedgerVoid::default()
        });
        let steps = vec![
            in_generation(1, 1),
            in_generation(2, 2),
            void,
            in_generation(4, 2),
        ];
        assert_eq!(generations(&chain(steps)), BTreeSet::from([1, 4]));
    }
}
