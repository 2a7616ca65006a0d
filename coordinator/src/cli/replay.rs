//! `supra replay`: rebuilds the exact batch of a step from ledger, recipe and data, and compares it with what was fed; with a
//! checkpoint it runs the step again, and compares what that comes to with what was logged.

mod compare;
mod known;
mod rerun;
mod show;
mod start;

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use supra_data::{Passage, Source, TextTokenizer, passages};
use supra_recipes::{Digest, Recipe};

use super::connect::TokenFile;
use super::failure::{Exit, Failure, chain};
use super::format;
use super::out;
use super::runs::{Json, Which};
use super::samples::Samples;
use crate::ledger::Open;
use compare::{Agreement, Beginning, Rerun};
use known::{Attempt, Known};
use rerun::Compute;
use start::Start;

/// Micro-batches of highest loss whose text is shown.
const SPIKES: usize = 5;

/// Characters of each of their samples.
const BEGINNING: usize = 160;

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
    /// Also train the step again, and compare with what was logged: from the newest checkpoint before it, from that of
    /// step N (--rerun=N), or from the one in a directory or at a URL (--rerun=DIR). Writes nothing
    #[arg(
        long,
        value_name = "CHECKPOINT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = start::NEWEST
    )]
    rerun: Option<Start>,
    #[command(flatten)]
    compute: Compute,
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
    /// The step run again, with `--rerun`.
    #[serde(skip_serializing_if = "Option::is_none")]
    rerun: Option<Rerun>,
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

/// Rebuilds the batch and prints it; ends with 4 when it is not what was fed, or when the step run again does not come to
/// what was logged.
///
/// # Errors
/// An unreachable coordinator, an unreadable journal, an unknown run, a step outside its plan, data that is not the run's, or
/// no checkpoint to run the step from.
pub async fn run(command: Replay) -> Result<Exit, Failure> {
    let known = match &command.state {
        Some(state) => known::offline(state, &command)?,
        None => known::online(&command).await?,
    };
    let Known {
        run,
        recipe,
        account,
        ..
    } = &known;
    if let Some(error) = &account.unreadable {
        return Err(Failure::Told {
            exit: Exit::Broken,
            message: format!("the ledger of run {run} is damaged: {error}."),
        });
    }
    let data = command.data.as_ref().unwrap_or(&recipe.data.train);
    let mut samples = Samples::open(recipe, data)?;
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
    let from = match &command.rerun {
        None => None,
        Some(start) => Some(known.start(start, command.step)?),
    };
    let wanted = command.text > 0 || command.tokenizer.is_some();
    let tokenizer = match tokenizer(&command, recipe, &samples) {
        Ok(tokenizer) if wanted || command.rerun.is_some() => Some(tokenizer),
        Err(error) if wanted => return Err(error),
        Ok(_) | Err(_) => None,
    };
    let mut batch = rebuild(&command, &known, &mut samples, tokenizer.as_ref())?;
    if let Some(from) = from {
        let compute = &command.compute;
        let answer = match rerun::run(&from, command.step, data, compute).await? {
            Ok(answer) => answer,
            Err(exit) => return Ok(exit),
        };
        let (standing, precision) = (&account.standing, recipe.model.precision);
        let mut rerun = compare::compare(&from, answer, standing, &known.metrics, precision);
        if let Some(tokenizer) = &tokenizer {
            begin(&mut rerun, &mut samples, tokenizer)?;
        }
        batch.rerun = Some(rerun);
    }
    let different = batch.verdict == Verdict::Different
        || batch
            .rerun
            .as_ref()
            .is_some_and(|rerun| rerun.verdict == Agreement::Different);
    let exit = if different { Exit::Broken } else { Exit::Done };
    let printed = if command.json.json {
        out::json(&batch)
    } else {
        out::text(&show::batch(&batch))
    };
    match printed {
        // The verdict stands whether or not somebody reads it.
        Ok(()) | Err(Failure::Closed) => Ok(exit),
        Err(other) => Err(other),
    }
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
    known: &Known,
    samples: &mut Samples,
    tokenizer: Option<&TextTokenizer>,
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
        let shown = tokenizer.filter(|_| listed.len() < command.text);
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
    let attempts = known.account.attempts.clone();
    let verdict = match attempts.as_slice() {
        [] => Verdict::Untrained,
        all if all.iter().all(same) => Verdict::Same,
        _ => Verdict::Different,
    };
    Ok(Batch {
        run: known.run.clone(),
        step: command.step,
        verdict,
        digest,
        attempts,
        samples: listed,
        rerun: None,
    })
}

/// Adds how the samples of the micro-batches of highest loss begin.
fn begin(
    rerun: &mut Rerun,
    samples: &mut Samples,
    tokenizer: &TextTokenizer,
) -> Result<(), Failure> {
    for micro in rerun.micro_batches.iter_mut().take(SPIKES) {
        for number in micro.first_sample..micro.first_sample + micro.samples {
            let sample = samples.sample(number).map_err(Failure::input)?;
            let tokens = &sample.tokens[..sample.tokens.len().min(BEGINNING)];
            let text = tokenizer
                .decode(tokens)
                .map_err(|error| Failure::input(chain(&error)))?;
            micro.begins.push(Beginning {
                sample: number,
                begins_document: sample.starts.first() == Some(&0),
                text: text.chars().take(BEGINNING).collect(),
            });
        }
    }
    Ok(())
}
