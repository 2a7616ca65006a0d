//! What steps that were run again came to, beside what the run logged.

use std::collections::BTreeMap;

use serde::Serialize;
use supra_proto::v1::StepMetrics;
use supra_recipes::schema::Precision;

use super::rerun::{Answer, Micro, Number, Step};
use crate::cli::checkpoints::Checkpoint;
use crate::cli::format;
use crate::ledger;

/// The part of `supra replay --json` that is about running the step again.
#[derive(Debug, Serialize)]
pub struct Rerun {
    /// Directory, step, generation and workers of the checkpoint that it began with.
    pub checkpoint: String,
    pub from_step: u64,
    pub generation: u64,
    pub world: u32,
    pub device: String,
    /// What keeps the bits from being those of the run; empty when they have to be.
    pub differences: Vec<String>,
    /// By how much of the greater one two numbers may differ; 0 when not by a bit.
    pub bound: f64,
    /// The worst of all steps.
    pub verdict: Agreement,
    /// All steps behind the checkpoint.
    pub steps: Vec<Compared>,
    /// Of the last step, highest loss first.
    pub micro_batches: Vec<MicroBatch>,
}

/// How well a step agrees with what the run logged, from the best that can be said to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Agreement {
    /// It was fed the same; the run keeps nothing else of this step.
    Fed,
    /// Every number is the same to the bit.
    Bits,
    /// Every number is within the bound.
    Close,
    /// One is not, or something else was fed.
    Different,
}

/// One step, again and as it was logged.
#[derive(Debug, Serialize)]
pub struct Compared {
    pub step: u64,
    pub agreement: Agreement,
    /// What was fed, hexadecimal: now, and by the ledger.
    pub digest: String,
    pub logged_digest: String,
    pub skipped: bool,
    pub loss: Pair,
    pub grad_norm: Pair,
    pub learning_rate: Pair,
}

/// A number, now and as it was logged; `null` when not finite, or not kept.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pair {
    pub now: f64,
    pub logged: Option<f64>,
}

/// A micro-batch of the last step.
#[derive(Debug, Serialize)]
pub struct MicroBatch {
    pub first_sample: u64,
    pub samples: u64,
    pub targets: u64,
    /// Mean over the targets; `null` when it is not finite.
    pub loss: Option<f64>,
    /// How its samples begin, for those of highest loss where there is a tokenizer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub begins: Vec<Beginning>,
}

/// How a sample begins.
#[derive(Debug, Serialize)]
pub struct Beginning {
    pub sample: u64,
    /// Whether a document begins with it, rather than goes on.
    pub begins_document: bool,
    pub text: String,
}

/// A step that stands in the ledger.
#[derive(Clone, Debug, PartialEq)]
pub struct Standing {
    pub generation: u64,
    pub first_sample: u64,
    pub samples: u64,
    pub digest: ledger::Hash,
    pub skipped: bool,
}

/// By how much of the greater one loss and gradient norm may differ where bits cannot be the same: sums of fp32 products are
/// formed in another order, or of bf16 ones, whose last place is 2^-8.
fn bound(precision: Precision) -> f64 {
    match precision {
        Precision::Fp32 => 1e-3,
        Precision::Bf16 => 5e-2,
    }
}

/// Compares what the worker answers with the steps that stand (`standing` begins with step 1) and the metrics that are kept
/// of some of them.
pub fn compare(
    from: &Checkpoint,
    answer: Answer,
    standing: &[Standing],
    metrics: &BTreeMap<u64, StepMetrics>,
    precision: Precision,
) -> Rerun {
    let mut differences = answer.differences;
    differences.extend(other_generations(
        answer.generation,
        &answer.steps,
        standing,
    ));
    let bound = if differences.is_empty() {
        0.0
    } else {
        bound(precision)
    };
    let steps: Vec<Compared> = answer
        .steps
        .iter()
        .filter_map(|now| {
            let then = standing.get(usize::try_from(now.step).ok()?.checked_sub(1)?)?;
            let logged = metrics
                .get(&now.step)
                .filter(|logged| logged.generation == then.generation);
            Some(compared(now, then, logged, bound))
        })
        .collect();
    let worst = steps.iter().map(|step| step.agreement).max();
    let mut micro_batches: Vec<MicroBatch> =
        answer.micro_batches.into_iter().map(micro_batch).collect();
    // What is not a number is the first to look at.
    let height = |micro: &MicroBatch| micro.loss.unwrap_or(f64::INFINITY);
    micro_batches.sort_by(|a, b| height(b).total_cmp(&height(a)));
    Rerun {
        checkpoint: from.path.display().to_string(),
        from_step: answer.from_step,
        generation: answer.generation,
        world: answer.world,
        device: answer.device,
        differences,
        bound,
        verdict: worst.unwrap_or(Agreement::Different),
        steps,
        micro_batches,
    }
}

/// Steps of another generation than the checkpoint's may have been trained in circumstances that it does not know.
fn other_generations(known: u64, steps: &[Step], standing: &[Standing]) -> Option<String> {
    let of = |step: &&Step| standing.get(step.step.saturating_sub(1) as usize);
    let first = steps
        .iter()
        .find(|step| of(step).is_some_and(|then| then.generation != known))?;
    let generation = of(&first)?.generation;
    Some(format!(
        "step {} is of generation {generation}, the checkpoint of generation {known}, which may have had other workers",
        format::grouped(first.step)
    ))
}

fn compared(now: &Step, then: &Standing, logged: Option<&StepMetrics>, bound: f64) -> Compared {
    let pair = |number: Number, of: fn(&StepMetrics) -> f64| Pair {
        now: number.0,
        logged: logged.map(of),
    };
    let loss = pair(now.loss, |logged| logged.loss);
    let grad_norm = pair(now.grad_norm, |logged| logged.grad_norm);
    let learning_rate = pair(now.learning_rate, |logged| logged.learning_rate);
    let logged_digest = format::hex(&then.digest);
    let fed = now.digest == logged_digest
        && (now.first_sample, now.samples, now.skipped)
            == (then.first_sample, then.samples, then.skipped);
    let agreement = if fed {
        [loss, grad_norm, learning_rate]
            .iter()
            .map(|pair| pair.agreement(bound))
            .max()
            .unwrap_or(Agreement::Fed)
    } else {
        Agreement::Different
    };
    Compared {
        step: now.step,
        agreement,
        digest: now.digest.clone(),
        logged_digest,
        skipped: now.skipped,
        loss,
        grad_norm,
        learning_rate,
    }
}

impl Pair {
    fn agreement(self, bound: f64) -> Agreement {
        let Pair {
            now,
            logged: Some(then),
        } = self
        else {
            return Agreement::Fed;
        };
        // The store keeps no bits of what is not a number.
        if now.to_bits() == then.to_bits() || (now.is_nan() && then.is_nan()) {
            Agreement::Bits
        } else if (now - then).abs() <= bound * now.abs().max(then.abs()) {
            Agreement::Close
        } else {
            Agreement::Different
        }
    }
}

fn micro_batch(micro: Micro) -> MicroBatch {
    MicroBatch {
        first_sample: micro.first_sample,
        samples: micro.samples,
        targets: micro.targets,
        loss: micro.loss,
        begins: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from() -> Checkpoint {
        Checkpoint {
            step: 1,
            path: "c".into(),
            manifest_hash: [0; 32],
        }
    }

    fn standing(generation: u64) -> Standing {
        Standing {
            generation,
            first_sample: 4,
            samples: 4,
            digest: [7; 32],
            skipped: false,
        }
    }

    /// Step 2 with this loss.
    fn answer(loss: f64, differences: &[&str]) -> Answer {
        Answer {
            from_step: 1,
            generation: 1,
            world: 1,
            device: "cpu".to_owned(),
            differences: differences.iter().map(|&text| text.to_owned()).collect(),
            steps: vec![Step {
                step: 2,
                first_sample: 4,
                samples: 4,
                digest: "07".repeat(32),
                skipped: false,
                loss: Number(loss),
                grad_norm: Number(1.0),
                learning_rate: Number(0.5),
            }],
            micro_batches: [Some(1.0), None, Some(3.0)]
                .map(|loss| Micro {
                    first_sample: 4,
                    samples: 2,
                    targets: 9,
                    loss,
                })
                .into(),
        }
    }

    fn logged(generation: u64, loss: f64) -> BTreeMap<u64, StepMetrics> {
        let metrics = StepMetrics {
            step: 2,
            generation,
            loss,
            grad_norm: 1.0,
            learning_rate: 0.5,
            ..StepMetrics::default()
        };
        [(2, metrics)].into()
    }

    fn verdict(answer: Answer, then: Standing, metrics: &BTreeMap<u64, StepMetrics>) -> Agreement {
        let standing = [standing(1), then];
        compare(&from(), answer, &standing, metrics, Precision::Fp32).verdict
    }

    #[test]
    fn in_the_same_circumstances_one_bit_is_a_difference() {
        let next = f64::from_bits(2.0_f64.to_bits() + 1);
        let of = |loss| verdict(answer(loss, &[]), standing(1), &logged(1, 2.0));
        assert_eq!(of(2.0), Agreement::Bits);
        assert_eq!(of(next), Agreement::Different);
    }

    #[test]
    fn in_others_there_is_a_bound() {
        let of = |loss| verdict(answer(loss, &["threads"]), standing(1), &logged(1, 2.0));
        assert_eq!(of(2.0), Agreement::Bits);
        assert_eq!(of(2.001), Agreement::Close);
        assert_eq!(of(2.1), Agreement::Different);
        // Another generation may have had other workers.
        let text = compare(
            &from(),
            answer(2.001, &[]),
            &[standing(1), standing(2)],
            &logged(2, 2.0),
            Precision::Fp32,
        );
        assert_eq!(text.verdict, Agreement::Close);
        assert!(
            text.differences[0].contains("step 2 is of generation 2"),
            "{text:?}"
        );
    }

    #[test]
    fn what_is_not_a_number_agrees_with_itself_only() {
        let of = |now, then| verdict(answer(now, &[]), standing(1), &logged(1, then));
        assert_eq!(of(f64::NAN, f64::NAN), Agreement::Bits);
        assert_eq!(of(f64::NAN, 2.0), Agreement::Different);
        assert_eq!(of(2.0, f64::NAN), Agreement::Different);
    }

    #[test]
    fn other_samples_are_a_difference_whatever_they_came_to() {
        let other = Standing {
            digest: [8; 32],
            ..standing(1)
        };
        assert_eq!(
            verdict(answer(2.0, &[]), other, &logged(1, 2.0)),
            Agreement::Different
        );
        let skipped = Standing {
            skipped: true,
            ..standing(1)
        };
        assert_eq!(
            verdict(answer(2.0, &[]), skipped, &logged(1, 2.0)),
            Agreement::Different
        );
    }

    #[test]
    fn a_step_whose_metrics_were_thinned_away_is_compared_by_what_it_was_fed() {
        assert_eq!(
            verdict(answer(2.0, &[]), standing(1), &BTreeMap::new()),
            Agreement::Fed
        );
        // Those of an attempt that was voided say nothing about the one that stands.
        assert_eq!(
            verdict(answer(2.0, &[]), standing(2), &logged(1, 9.0)),
            Agreement::Fed
        );
    }

    #[test]
    fn the_highest_loss_comes_first() {
        let rerun = compare(
            &from(),
            answer(2.0, &[]),
            &[standing(1), standing(1)],
            &logged(1, 2.0),
            Precision::Fp32,
        );
        let losses: Vec<_> = rerun.micro_batches.iter().map(|micro| micro.loss).collect();
        assert_eq!(losses, [None, Some(3.0), Some(1.0)]);
    }
}
