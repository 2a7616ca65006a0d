//! `supra replay` for people.

use super::compare::{Agreement, Compared, MicroBatch, Pair, Rerun};
use super::{Batch, SPIKES, Verdict};
use crate::cli::format::{self, Table};

/// Steps before the last one that are listed, beside those that differ.
const LISTED: usize = 10;

/// The batch for people: the verdict, the attempts, the samples, and their text where it was asked for.
pub fn batch(batch: &Batch) -> String {
    let (step, run) = (format::grouped(batch.step), &batch.run);
    let mut text = match batch.verdict {
        Verdict::Same => {
            format!("OK: the data gives exactly what run {run} was fed in step {step}.\n")
        }
        Verdict::Different => {
            format!("DIFFERENT: the data does not give what run {run} was fed in step {step}.\n")
        }
        Verdict::Untrained => {
            format!("Run {run} has not trained step {step}; it will be fed this.\n")
        }
    };
    text.push_str(&format!("  digest of the data  {}\n", batch.digest));
    for attempt in &batch.attempts {
        let skipped = if attempt.skipped { ", skipped" } else { "" };
        let end = match &attempt.voided {
            None => "stands".to_owned(),
            Some(reason) => format!("voided: {reason}"),
        };
        text.push_str(&format!(
            "  record {} of generation {}{skipped}  {}  {end}\n",
            attempt.record, attempt.generation, attempt.digest
        ));
    }
    let mut table = Table::new(&[">SAMPLE", ">WINDOW", "FROM"]);
    for sample in &batch.samples {
        let from: Vec<String> = sample
            .sources
            .iter()
            .map(|source| format!("{} row group {}", source.file, source.row_group))
            .collect();
        table.row([
            format::grouped(sample.number),
            format::grouped(sample.window),
            from.join(", "),
        ]);
    }
    text.push_str(&table.render());
    for sample in &batch.samples {
        for passage in sample.passages.iter().flatten() {
            let what = if passage.begins_document {
                "a document begins"
            } else {
                "a document goes on"
            };
            let (number, position) = (format::grouped(sample.number), passage.position);
            text.push_str(&format!(
                "--- sample {number}, position {position}: {what}\n"
            ));
            text.push_str(passage.text.as_deref().unwrap_or_default());
            text.push('\n');
        }
    }
    if let Some(rerun) = &batch.rerun {
        text.push_str(&again(batch, rerun));
    }
    text
}

/// The step run again: the verdict, the circumstances, the steps, and the micro-batches of highest loss.
fn again(batch: &Batch, rerun: &Rerun) -> String {
    let mut text = verdict(batch, rerun);
    text.push_str(&format!("  checkpoint  {}\n", rerun.checkpoint));
    text.push_str(&format!("  device      {}\n", rerun.device));
    for difference in &rerun.differences {
        text.push_str(&format!("  not as then {difference}\n"));
    }
    text.push_str(&steps(rerun));
    let shown = rerun.micro_batches.len().min(SPIKES);
    text.push_str(&format!(
        "Micro-batches of step {} of highest loss, {shown} of {}:\n",
        format::grouped(batch.step),
        format::grouped(rerun.micro_batches.len() as u64)
    ));
    let mut table = Table::new(&[">LOSS", ">TARGETS", "SAMPLES"]);
    for micro in &rerun.micro_batches[..shown] {
        table.row([
            format::metric(micro.loss.unwrap_or(f64::NAN)),
            format::grouped(micro.targets),
            samples(micro),
        ]);
    }
    text.push_str(&table.render());
    for begin in rerun.micro_batches[..shown]
        .iter()
        .flat_map(|micro| &micro.begins)
    {
        let how = if begin.begins_document {
            "begins a document"
        } else {
            "goes on"
        };
        let sample = format::grouped(begin.sample);
        text.push_str(&format!("--- sample {sample} {how}\n{}\n", begin.text));
    }
    text
}

fn verdict(batch: &Batch, rerun: &Rerun) -> String {
    let (first, last) = (rerun.from_step + 1, batch.step);
    let which = if first == last {
        format!("step {}", format::grouped(last))
    } else {
        format!(
            "steps {} to {}",
            format::grouped(first),
            format::grouped(last)
        )
    };
    let said = match rerun.verdict {
        Agreement::Bits => {
            "SAME BITS: loss, gradient norm and learning rate are those that were logged".to_owned()
        }
        Agreement::Close => format!(
            "CLOSE: loss, gradient norm and learning rate are within {} of those that were logged",
            rerun.bound
        ),
        Agreement::Fed => "FED THE SAME: loss and gradient norm are not kept any more".to_owned(),
        Agreement::Different => {
            "DIFFERENT: this did not come to what was logged, see below".to_owned()
        }
    };
    format!("Ran {which} again.\n{said}.\n")
}

/// The last steps, and all that differ.
fn steps(rerun: &Rerun) -> String {
    let mut table = Table::new(&[
        ">STEP",
        "FED",
        ">LOSS",
        ">LOGGED",
        ">GRAD NORM",
        ">LOGGED",
        ">LEARNING RATE",
        "AGREES",
    ]);
    let tail = rerun.steps.len().saturating_sub(LISTED);
    for (place, step) in rerun.steps.iter().enumerate() {
        if place >= tail || step.agreement == Agreement::Different {
            table.row(row(step));
        }
    }
    table.render()
}

fn row(step: &Compared) -> [String; 8] {
    let fed = if step.digest == step.logged_digest {
        "the same"
    } else {
        "something else"
    };
    let agrees = match step.agreement {
        Agreement::Fed => "not kept",
        Agreement::Bits => "to the bit",
        Agreement::Close => "closely",
        Agreement::Different => "no",
    };
    let logged = |pair: Pair| pair.logged.map_or_else(|| "-".to_owned(), exact);
    [
        format::grouped(step.step),
        fed.to_owned(),
        exact(step.loss.now),
        logged(step.loss),
        exact(step.grad_norm.now),
        logged(step.grad_norm),
        format::learning_rate(step.learning_rate.now),
        agrees.to_owned(),
    ]
}

/// More digits than elsewhere: people compare.
fn exact(value: f64) -> String {
    format!("{value:.9}")
}

fn samples(micro: &MicroBatch) -> String {
    match micro.samples {
        1 => format::grouped(micro.first_sample),
        more => format!(
            "{} to {}",
            format::grouped(micro.first_sample),
            format::grouped(micro.first_sample + more - 1)
        ),
    }
}
