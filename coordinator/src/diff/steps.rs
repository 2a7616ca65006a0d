//! What two runs came to, step by step.

use serde::Serialize;

use super::Side;
use crate::ledger::hex;

/// What is compared of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// What was fed: the digest in the ledger.
    Samples,
    /// Whether the update was skipped.
    Skipped,
    /// Mean loss per target.
    Loss,
    /// Norm of the gradient before clipping.
    GradNorm,
    /// Learning rate.
    LearningRate,
}

/// The first step at which a quantity differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct First {
    /// What differs.
    pub quantity: Quantity,
    /// Where.
    pub step: u64,
    /// How it is in either run, in decimal digits that lead back to the same bits.
    pub a: String,
    /// In the second run.
    pub b: String,
}

/// The steps of two runs, compared.
#[derive(Debug, Default)]
pub(super) struct Stepped {
    /// Steps that both have.
    pub steps: u64,
    /// Those of them whose numbers both have kept.
    pub compared: u64,
    /// Last step up to which nothing that was compared differs.
    pub last_common: u64,
    /// In the order of steps.
    pub first: Vec<First>,
}

/// Compares every step that both have.
pub(super) fn compare(a: &Side, b: &Side) -> Stepped {
    let mut found = Stepped {
        steps: a.steps.len().min(b.steps.len()) as u64,
        ..Stepped::default()
    };
    for step in 1..=found.steps {
        let pairs = pairs(a, b, step);
        found.compared += u64::from(pairs.iter().any(|(what, ..)| *what == Quantity::Loss));
        for (quantity, left, right) in pairs {
            let known = found.first.iter().any(|first| first.quantity == quantity);
            if left != right && !known {
                found.first.push(First {
                    quantity,
                    step,
                    a: left,
                    b: right,
                });
            }
        }
        if found.first.is_empty() {
            found.last_common = step;
        }
    }
    found
}

/// What both runs know of a step, as text: equal texts are equal bits.
fn pairs(a: &Side, b: &Side, step: u64) -> Vec<(Quantity, String, String)> {
    let mut pairs = Vec::with_capacity(5);
    if let (Some(a), Some(b)) = (a.step(step), b.step(step)) {
        pairs.push((Quantity::Samples, hex(&a.digest), hex(&b.digest)));
        pairs.push((
            Quantity::Skipped,
            a.skipped.to_string(),
            b.skipped.to_string(),
        ));
    }
    if let (Some(a), Some(b)) = (a.numbers(step), b.numbers(step)) {
        for (quantity, a, b) in [
            (Quantity::Loss, a.loss, b.loss),
            (Quantity::GradNorm, a.grad_norm, b.grad_norm),
            (Quantity::LearningRate, a.learning_rate, b.learning_rate),
        ] {
            pairs.push((quantity, a.to_string(), b.to_string()));
        }
    }
    pairs
}
