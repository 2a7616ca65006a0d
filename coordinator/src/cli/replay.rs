//! `supra replay`: rebuilds the exact batch of a step from ledger, recipe and data, and compares it with what was fed.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use supra_data::{Passage, Source, TextTokenizer, passages};
use supra_recipes::{Digest, Recipe};

use super::connect::{Connect, TokenFile};
use super::failure::{Exit, Failure, chain};
use super::format::{self, Table};
use super::ledger::{self, Entry, Offline};
use super::out;
use super::runs::{Json, Which};
use super::samples::Samples;
use crate::ledger::{Body, Open};

/// Arguments of `supra replay`.
#[derive(Args, Debug)]
pub struct Replay {
    #[command(flatten)]
    which: Which,
    /// Step to rebuild, counted from 1
    #[arg(long, value_name = "STEP")]
    step: u64,
    /// Show the first N samples as text
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    text: usize,
    /// Where the training data is [default: where the recipe says]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the tokenizer is [default: beside the recipe's base model]
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
    /// Read recipe and journal from this state directory instead of asking a coordinator: changes nothing, and works
    /// whether or not a coordinator runs there
    #[arg(long, value_name = "DIR", required_unless_present = "recipe")]
    state: Option<PathBuf>,
    /// The run's recipe, to ask a coordinator for the ledger
    #[arg(long, value_name = "RECIPE", conflicts_with = "state")]
    recipe: Option<PathBuf>,
    /// Address of the coordinator [default: http://127.0.0.1:7070]
    #[arg(
        long,
        value_name = "URL",
        env = "SUPRA_COORDINATOR",
        help_heading = "Coordinator"
    )]
    coordinator: Option<String>,
    #[command(flatten)]
    token: TokenFile,
}

/// What the ledger says about a step.
#[derive(Debug, Default)]
struct Account {
    open: Option<Open>,
    attempts: Vec<Attempt>,
    unreadable: Option<String>,
}

/// One time that the step was applied.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Attempt {
    /// Record of the ledger.
    record: u64,
    generation: u64,
    first_sample: u64,
    samples: u64,
    /// What was fed, hexadecimal.
    digest: String,
    skipped: bool,
    /// Why it was voided; `null` when it stands.
    voided: Option<String>,
}

impl Account {
    fn push(&mut self, step: u64, entry: Entry) {
        let record = match entry {
            Ok(record) => record,
            Err(error) => {
                self.unreadable.get_or_insert(error.to_string());
                return;
            }
        };
        match record.body {
            Body::Open(open) => self.open = Some(open),
            Body::Step(applied) if applied.step == step => self.attempts.push(Attempt {
                record: record.index,
                generation: applied.generation,
                first_sample: applied.first_sample,
                samples: applied.samples,
                digest: format::hex(&applied.digest),
                skipped: applied.skipped,
                voided: None,
            }),
            Body::Void {
                after_step, reason, ..
            } if after_step < step => {
                for attempt in &mut self.attempts {
                    attempt.voided.get_or_insert_with(|| reason.clone());
                }
            }
            _ => {}
        }
    }
}

/// The answer; its JSON is that of `supra replay --json`.
#[derive(Debug, Serialize)]
struct Batch {
    run: String,
    step: u64,
    verdict: Verdict,
    /// Sum of the digests of the rebuilt samples, hexadecimal.
    digest: String,
    /// In the order of the ledger.
    attempts: Vec<Attempt>,
    /// In the plan's order. Ranks take contiguous parts of it.
    samples: Vec<Sample>,
}

/// Is the rebuilt batch what was fed?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// In every attempt.
    Same,
    /// Not in all of them.
    Different,
    /// The step was not applied yet.
    Untrained,
}

#[derive(Debug, Serialize)]
struct Sample {
    number: u64,
    /// Window of the packed stream.
    window: u64,
    /// Where its tokens lie.
    sources: Vec<Source>,
    /// Its documents, for those that `--text` asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    passages: Option<Vec<Passage>>,
}

/// Rebuilds the batch and prints it; ends with 4 when it is not what was fed.
///
/// # Errors
/// An unreachable coordinator, an unreadable journal, an unknown run, a step outside its plan, or data that is not the
/// run's.
pub async fn run(command: Replay) -> Result<Exit, Failure> {
    let (run, recipe, account) = match &command.state {
        Some(state) => offline(state, &command)?,
        None => online(&command).await?,
    };
    if let Some(error) = account.unreadable {
        return Err(Failure::Told {
            exit: Exit::Broken,
            message: format!("the ledger of run {run} is damaged: {error}."),
        });
    }
    let data = command.data.as_ref().unwrap_or(&recipe.data.train);
    let mut samples = Samples::open(&recipe, data)?;
    if let Some(open) = &account.open {
        same_ground(&samples, open)?;
    }
    let steps = samples.plan().steps;
    if !(1..=steps).contains(&command.step) {
        return Err(Failure::input(format!(
            "there is no step {}: run {run} has steps 1 to {steps}.",
            command.step
        )));
    }
    let tokenizer = match command.text {
        0 => None,
        _ => Some(tokenizer(&command, &recipe, &samples)?),
    };
    let batch = rebuild(&command, run, account.attempts, &mut samples, tokenizer)?;
    let exit = match batch.verdict {
        Verdict::Same | Verdict::Untrained => Exit::Done,
        Verdict::Different => Exit::Broken,
    };
    let printed = if command.json.json {
        out::json(&batch)
    } else {
        out::text(&render(&batch))
    };
    match printed {
        // The verdict stands whether or not somebody reads it.
        Ok(()) | Err(Failure::Closed) => Ok(exit),
        Err(other) => Err(other),
    }
}

fn offline(state: &Path, command: &Replay) -> Result<(String, Recipe, Account), Failure> {
    let ledger = Offline::open(state, &command.which.run)?;
    let recipe = Recipe::parse(&ledger.run.recipe, &ledger.run.id)
        .map_err(|error| Failure::input(error.to_string()))?;
    let mut account = Account::default();
    ledger.each(|entry| account.push(command.step, entry))?;
    Ok((ledger.run.id, recipe, account))
}

async fn online(command: &Replay) -> Result<(String, Recipe, Account), Failure> {
    // clap asks for one of the two.
    let path = command
        .recipe
        .as_ref()
        .ok_or_else(|| Failure::input("name the --state of a coordinator or a --recipe."))?;
    let recipe = Recipe::load(path).map_err(|error| Failure::input(error.to_string()))?;
    let connect = Connect {
        coordinator: command.coordinator.clone(),
        state: None,
        token: command.token.clone(),
    };
    let mut client = connect.client().await?;
    let status = client.status(&command.which.run).await?;
    let mut account = Account::default();
    ledger::each(&mut client, &status, |entry| {
        account.push(command.step, entry);
    })
    .await?;
    Ok((status.run, recipe, account))
}

/// The data and the recipe are those that the run opened its ledger with.
fn same_ground(samples: &Samples, open: &Open) -> Result<(), Failure> {
    let manifest = samples.manifest();
    if manifest.hash() != open.manifest_hash {
        return Err(Failure::input(format!(
            "{} is not the dataset of run {}: its hash is {}, the ledger says {}. Give the run's with --data.",
            manifest.path().display(),
            open.run,
            format::hex(&manifest.hash()),
            format::hex(&open.manifest_hash)
        )));
    }
    let plan = samples.plan();
    let found = [plan.sequence_length, plan.batch_samples, plan.samples];
    let said = [open.sequence_length, open.batch_samples, open.samples];
    if found != said {
        return Err(Failure::input(format!(
            "the recipe is not that of run {}: it plans {} samples of {} tokens, {} a step; the ledger says {} of {}, {} a step. \
             Give the run's recipe.",
            open.run, found[2], found[0], found[1], said[2], said[0], said[1]
        )));
    }
    Ok(())
}

fn tokenizer(
    command: &Replay,
    recipe: &Recipe,
    samples: &Samples,
) -> Result<TextTokenizer, Failure> {
    let path = command.tokenizer.as_deref().or(recipe.base.directory());
    let path = path.ok_or_else(|| {
        Failure::input(
            "the recipe names no base model on this disk: give its tokenizer with --tokenizer DIR.",
        )
    })?;
    TextTokenizer::load_for(path, samples.manifest()).map_err(|error| Failure::input(chain(&error)))
}

fn rebuild(
    command: &Replay,
    run: String,
    attempts: Vec<Attempt>,
    samples: &mut Samples,
    tokenizer: Option<TextTokenizer>,
) -> Result<Batch, Failure> {
    let range = samples.plan().step_samples(command.step);
    let (first, count) = (range.start, range.end - range.start);
    let mut sum = Digest::ZERO;
    let mut listed = Vec::new();
    for number in range {
        let sample = samples.sample(number).map_err(Failure::input)?;
        sum += Digest::of_sample(number, &sample.tokens);
        let window = samples.plan().window(number);
        let start = window * samples.plan().sequence_length;
        let shown = tokenizer.as_ref().filter(|_| listed.len() < command.text);
        let cut = shown
            .map(|tokenizer| passages(&sample.tokens, &sample.starts, Some(tokenizer)))
            .transpose()
            .map_err(|error| Failure::input(chain(&error)))?;
        listed.push(Sample {
            number,
            window,
            sources: samples
                .manifest()
                .sources(start..start + sample.tokens.len() as u64),
            passages: cut,
        });
    }
    let digest = format::hex(sum.as_bytes());
    let same = |attempt: &Attempt| {
        attempt.digest == digest && (attempt.first_sample, attempt.samples) == (first, count)
    };
    let verdict = match attempts.as_slice() {
        [] => Verdict::Untrained,
        all if all.iter().all(same) => Verdict::Same,
        _ => Verdict::Different,
    };
    Ok(Batch {
        run,
        step: command.step,
        verdict,
        digest,
        attempts,
        samples: listed,
    })
}

/// The batch for people: the verdict, the attempts, the samples, and their text where it was asked for.
fn render(batch: &Batch) -> String {
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
    text
}
