//! `metrics.csv`: what is kept of the numbers of steps. Decimal digits that lead back to the same bits; nothing stands for what
//! is not a number.

use std::collections::BTreeMap;
use std::fmt::Write;

use supra_proto::v1::StepMetrics;

use super::{Capsule, CapsuleError, METRICS};

const HEADER: &str = "step,generation,tokens,loss,grad_norm,learning_rate,skipped,seconds,data_seconds,exposed_comm_ms,heldout_loss";

/// What a step came to; not a number where that is what it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    /// Generation that trained it.
    pub generation: u64,
    /// Mean loss per target.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub learning_rate: f64,
}

/// The text of the member.
pub(super) fn csv(rows: &[StepMetrics]) -> Vec<u8> {
    let mut text = format!("{HEADER}\n");
    for row in rows {
        // Writing to a String cannot fail.
        let _ = write!(text, "{},{},{}", row.step, row.generation, row.tokens);
        for number in [row.loss, row.grad_norm, row.learning_rate] {
            let _ = write!(text, ",{}", cell(number));
        }
        let _ = write!(text, ",{}", u8::from(row.skipped));
        for number in [row.seconds, row.data_seconds, row.exposed_comm_ms] {
            let _ = write!(text, ",{}", cell(number));
        }
        let _ = write!(text, ",{}", row.heldout_loss.map_or(String::new(), cell));
        text.push('\n');
    }
    text.into_bytes()
}

fn cell(number: f64) -> String {
    if number.is_nan() {
        String::new()
    } else {
        number.to_string()
    }
}

impl Capsule {
    /// What steps came to, by their numbers.
    ///
    /// # Errors
    /// A line that is none of such a table.
    pub fn metrics(&self) -> Result<BTreeMap<u64, Numbers>, CapsuleError> {
        let damaged = |number: usize| CapsuleError::Damaged {
            path: METRICS.into(),
            problem: format!("line {number} is no step"),
        };
        let text = self.member(METRICS).unwrap_or_default();
        let text = str::from_utf8(text).map_err(|_| damaged(1))?;
        let lines = text.lines().enumerate().skip(1);
        lines
            .map(|(number, line)| row(line).ok_or_else(|| damaged(number + 1)))
            .collect()
    }
}

fn row(line: &str) -> Option<(u64, Numbers)> {
    let mut cells = line.split(',');
    let step = cells.next()?.parse().ok()?;
    let generation = cells.next()?.parse().ok()?;
    let _tokens = cells.next()?;
    let mut number = || {
        let cell = cells.next()?;
        if cell.is_empty() {
            return Some(f64::NAN);
        }
        cell.parse().ok()
    };
    let numbers = Numbers {
        generation,
        loss: number()?,
        grad_norm: number()?,
        learning_rate: number()?,
    };
    Some((step, numbers))
}
