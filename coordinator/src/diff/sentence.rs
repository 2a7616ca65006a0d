//! The verdict in one sentence: up to where two runs are the same, and what explains the first step that differs.

use super::steps::Stepped;
use super::{Cause, First, Kind, Quantity, Side};

/// Causes that the sentence names.
const NAMED: usize = 3;

/// The sentence.
pub(super) fn of(a: &Side, b: &Side, stepped: &Stepped, causes: &[Cause]) -> String {
    let acting = causes.iter().filter(|cause| cause.since.is_some()).count();
    if stepped.steps == 0 {
        let who = match (a.steps.is_empty(), b.steps.is_empty()) {
            (true, true) => "neither run has",
            (true, false) => "A has not",
            _ => "B has not",
        };
        return match acting {
            0 => format!(
                "no step to compare: {who} trained yet; nothing that changes numbers differs"
            ),
            _ => format!(
                "no step to compare: {who} trained yet; {}",
                listed(
                    causes
                        .iter()
                        .filter(|cause| cause.since.is_some())
                        .collect()
                )
            ),
        };
    }
    let what = if stepped.compared > 0 {
        "the same bits"
    } else {
        "the same samples (losses are not kept of both)"
    };
    match stepped.first.first() {
        None => match (a.steps.len() as u64, b.steps.len() as u64) {
            (left, right) if left == right => format!("{what} in all {left} steps"),
            (left, right) if left < right => {
                format!("{what} up to step {left}, where A ends; B has {right}")
            }
            (left, right) => format!("{what} up to step {right}, where B ends; A has {left}"),
        },
        Some(first) => {
            let begin = match stepped.last_common {
                0 => String::new(),
                last => format!("{what} up to step {last}; then "),
            };
            let parts = parts(&stepped.first, first.step);
            let why = explain(first.step, causes);
            format!("{begin}step {} differs in {parts}: {why}", first.step)
        }
    }
}

/// The quantities that differ at a step.
fn parts(first: &[First], step: u64) -> String {
    let names: Vec<&str> = first
        .iter()
        .filter(|first| first.step == step)
        .map(|first| match first.quantity {
            Quantity::Samples => "samples",
            Quantity::Skipped => "whether it was skipped",
            Quantity::Loss => "loss",
            Quantity::GradNorm => "gradient norm",
            Quantity::LearningRate => "learning rate",
        })
        .collect();
    match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, before)) => format!("{} and {last}", before.join(", ")),
        None => String::new(),
    }
}

/// What explains that a step differs: the newest change before it, else everything that acts from the beginning.
fn explain(step: u64, causes: &[Cause]) -> String {
    // A skip is how a step differs, not why.
    let acts = |cause: &&Cause| {
        cause.since.is_some_and(|since| since <= step)
            && !(cause.kind == Kind::Skips && cause.since == Some(step))
    };
    let newest = causes
        .iter()
        .filter(acts)
        .filter_map(|cause| cause.since)
        .max();
    match newest {
        None => "nothing that is known explains it".to_owned(),
        Some(newest) => {
            let named = causes.iter().filter(acts);
            listed(named.filter(|cause| cause.since == Some(newest)).collect())
        }
    }
}

fn listed(causes: Vec<&Cause>) -> String {
    let named: Vec<String> = causes.iter().take(NAMED).map(|cause| told(cause)).collect();
    let more = causes.len().saturating_sub(NAMED);
    let mut text = named.join("; ");
    if more > 0 {
        text.push_str(&format!("; and {more} more"));
    }
    text
}

fn told(cause: &Cause) -> String {
    let value = |value: &Option<String>| match value {
        None => "none".to_owned(),
        Some(value) => short(value),
    };
    let (a, b) = (value(&cause.a), value(&cause.b));
    let since = match cause.since {
        Some(since) if since > 1 => format!(" since step {since}"),
        _ => String::new(),
    };
    format!("{} {a} in A, {b} in B{since}", cause.what)
}

/// The first digits of a hash, which are enough for people.
pub fn short(value: &str) -> String {
    let hash = |word: &str| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    let words: Vec<&str> = value
        .split(' ')
        .map(|word| if hash(word) { &word[..12] } else { word })
        .collect();
    words.join(" ")
}
