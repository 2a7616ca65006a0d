//! `supra diff`: explains why two runs differ.

use std::path::Path;

use clap::Args;

use super::capsule::Source;
use super::failure::{Exit, Failure};
use super::format::{self, Table};
use super::out;
use super::runs::Json;
use crate::capsule::Capsule;
use crate::diff::{self, Cause, Difference, Quantity, Side, Stretch, Summary, Verdict, short};

/// Generations of a run that are listed.
const SHOWN: usize = 4;

/// Arguments of `supra diff`.
#[derive(Args, Debug)]
pub struct Diff {
    /// A run (its id or a unique beginning of it), or the capsule of one (a file or a directory that `supra capsule` made)
    #[arg(value_name = "RUN|CAPSULE")]
    a: String,
    /// The run, or capsule, to compare with
    #[arg(value_name = "RUN|CAPSULE")]
    b: String,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    source: Source,
}

/// Compares two runs and prints why they differ; ends with 4 when they do, and with 1 when no step was trained by both.
///
/// # Errors
/// An unreachable coordinator, an unreadable journal, an unknown run, or a capsule that is damaged.
pub async fn run(command: Diff) -> Result<Exit, Failure> {
    let a = command.side(&command.a).await?;
    let b = command.side(&command.b).await?;
    let difference = diff::compare(&a, &b);
    let exit = match difference.verdict {
        Verdict::Same => Exit::Done,
        Verdict::Different => Exit::Broken,
        Verdict::Untrained => Exit::Failed,
    };
    let printed = if command.json.json {
        out::json(&difference)
    } else {
        out::text(&render(&difference))
    };
    match printed {
        // The verdict stands whether or not somebody reads it.
        Ok(()) | Err(Failure::Closed) => Ok(exit),
        Err(other) => Err(other),
    }
}

impl Diff {
    /// One of the two: a capsule where a file or directory has this name, else a run.
    async fn side(&self, name: &str) -> Result<Side, Failure> {
        let path = Path::new(name);
        let capsule = if path.exists() {
            Capsule::read(path)?
        } else if name.contains('/') || name.ends_with(".zst") {
            return Err(Failure::input(format!(
                "there is no capsule {name}. Pack one with `supra capsule RUN --out {name}`, or give the id of a run."
            )));
        } else {
            self.source.capsule(name).await?
        };
        Ok(Side::of(&capsule)?)
    }
}

/// The verdict for people: one sentence, the two runs, where they part, and what differs in what they were made from.
fn render(difference: &Difference) -> String {
    let sentence = &difference.sentence;
    let mut letters = sentence.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    let mut text = format!("{}{}.\n\n", first.unwrap_or_default(), letters.as_str());
    for (letter, side) in [("A", &difference.a), ("B", &difference.b)] {
        text.push_str(&format!("  {letter}  {}: {}\n", side.run, trained(side)));
    }
    if !difference.first.is_empty() {
        let mut table = Table::new(&["  FIRST DIFFERENCE", ">STEP", "A", "B"]);
        for first in &difference.first {
            let name = match first.quantity {
                Quantity::Samples => "samples",
                Quantity::Skipped => "skipped",
                Quantity::Loss => "loss",
                Quantity::GradNorm => "gradient norm",
                Quantity::LearningRate => "learning rate",
            };
            table.row([
                format!("  {name}"),
                format::grouped(first.step),
                short(&first.a),
                short(&first.b),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if !difference.causes.is_empty() {
        let mut table = Table::new(&["  MADE FROM", "WHAT", "A", "B", "ACTS"]);
        for cause in &difference.causes {
            table.row(row(cause));
        }
        text.push('\n');
        text.push_str(&table.render());
    }
    if !difference.unknown.is_empty() {
        text.push('\n');
    }
    for unknown in &difference.unknown {
        text.push_str(&format!("  not compared: {unknown}\n"));
    }
    text
}

fn row(cause: &Cause) -> [String; 5] {
    let value = |value: &Option<String>| value.as_deref().map_or("-".to_owned(), short);
    let acts = match cause.since {
        None => "on no number".to_owned(),
        Some(step) => format!("from step {}", format::grouped(step)),
    };
    [
        format!("  {}", cause.kind.name()),
        cause.what.clone(),
        value(&cause.a),
        value(&cause.b),
        acts,
    ]
}

/// How many steps a run trained, and on how many workers.
fn trained(side: &Summary) -> String {
    let workers = |stretch: &Stretch| match stretch.world {
        None => "workers that nobody knows any more".to_owned(),
        Some(world) => format::counted(world, "worker"),
    };
    let stretches = &side.generations;
    let from = stretches.len().saturating_sub(SHOWN);
    let mut shown: Vec<String> = stretches[from..]
        .iter()
        .map(|stretch| {
            let (first, last) = (stretch.first_step, stretch.last_step);
            let (first, last) = (format::grouped(first), format::grouped(last));
            format!("steps {first} to {last} on {}", workers(stretch))
        })
        .collect();
    if from > 0 {
        shown.insert(
            0,
            format!("{} before", format::counted(from as u64, "generation")),
        );
    }
    match shown.is_empty() {
        true => "no step trained".to_owned(),
        false => format!(
            "{}: {}",
            format::counted(side.steps, "step"),
            shown.join(", ")
        ),
    }
}
