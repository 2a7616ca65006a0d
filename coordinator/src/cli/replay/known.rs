//! What is known about a step and its run: from the coordinator, or from a state directory.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use supra_proto::v1::StepMetrics;
use supra_recipes::Recipe;

use super::Replay;
use super::compare::Standing;
use super::start::{self, Start};
use crate::cli::checkpoints::{self, Checkpoint};
use crate::cli::connect::Connect;
use crate::cli::failure::Failure;
use crate::cli::format;
use crate::cli::ledger::{self, Entry, Offline};
use crate::ledger::{Body, Hash, Open};
use crate::machine::Run;
use crate::telemetry::{self, TelemetryReader};

/// The run, as far as it is known where we ask.
pub struct Known {
    pub run: String,
    pub recipe: Recipe,
    pub account: Account,
    /// Published checkpoints, oldest first.
    checkpoints: Vec<Checkpoint>,
    /// What is kept of loss and gradient norm, by step.
    pub metrics: BTreeMap<u64, StepMetrics>,
}

/// What the ledger says about a step.
#[derive(Debug, Default)]
pub struct Account {
    pub open: Option<Open>,
    pub attempts: Vec<Attempt>,
    /// The steps from the first to this one, as far as they stand.
    pub standing: Vec<Standing>,
    /// Step and manifest hash of every checkpoint that was durable.
    durable: Vec<(u64, Hash)>,
    pub unreadable: Option<String>,
}

/// One time that the step was applied.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Attempt {
    /// Record of the ledger.
    pub record: u64,
    pub generation: u64,
    pub first_sample: u64,
    pub samples: u64,
    /// What was fed, hexadecimal.
    pub digest: String,
    pub skipped: bool,
    /// Why it was voided; `null` when it stands.
    pub voided: Option<String>,
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
            Body::Step(applied) if applied.step <= step => {
                if applied.step == step {
                    self.attempts.push(Attempt {
                        record: record.index,
                        generation: applied.generation,
                        first_sample: applied.first_sample,
                        samples: applied.samples,
                        digest: format::hex(&applied.digest),
                        skipped: applied.skipped,
                        voided: None,
                    });
                }
                self.standing.push(Standing {
                    generation: applied.generation,
                    first_sample: applied.first_sample,
                    samples: applied.samples,
                    digest: applied.digest,
                    skipped: applied.skipped,
                });
            }
            Body::Void {
                after_step, reason, ..
            } if after_step < step => {
                for attempt in &mut self.attempts {
                    attempt.voided.get_or_insert_with(|| reason.clone());
                }
                self.standing.truncate(after_step as usize);
            }
            Body::Durable {
                step,
                manifest_hash,
                ..
            } => self.durable.push((step, manifest_hash)),
            _ => {}
        }
    }
}

impl Known {
    /// The checkpoint from which `step` is run again.
    pub fn start(&self, start: &Start, step: u64) -> Result<Checkpoint, Failure> {
        if (self.account.standing.len() as u64) < step {
            return Err(Failure::input(format!(
                "run {} has not trained step {step}: there is nothing to run again.",
                self.run
            )));
        }
        start::choose(
            start,
            step,
            &self.run,
            &self.checkpoints,
            &self.account.durable,
        )
    }
}

fn by_step(metrics: Vec<StepMetrics>) -> BTreeMap<u64, StepMetrics> {
    metrics.into_iter().map(|step| (step.step, step)).collect()
}

/// From the journal of a state directory, and the metrics beside it.
pub fn offline(state: &Path, command: &Replay) -> Result<Known, Failure> {
    let ledger = Offline::open(state, &command.which.run)?;
    let recipe = Recipe::parse(&ledger.run.recipe, &ledger.run.id)
        .map_err(|error| Failure::input(error.to_string()))?;
    let mut account = Account::default();
    ledger.each(|entry| account.push(command.step, entry))?;
    let metrics = match &command.rerun {
        None => Vec::new(),
        Some(_) => logged(state, &ledger.run)?,
    };
    Ok(Known {
        checkpoints: checkpoints::of_run(&ledger.run),
        metrics: by_step(metrics),
        run: ledger.run.id,
        recipe,
        account,
    })
}

/// What the state directory keeps of the steps of a run; nothing where only the journal was saved.
fn logged(state: &Path, run: &Run) -> Result<Vec<StepMetrics>, Failure> {
    if !telemetry::file(state).exists() {
        return Ok(Vec::new());
    }
    TelemetryReader::open(state)
        .and_then(|reader| reader.metrics(run.number))
        .map_err(|error| {
            Failure::failed(format!(
                "cannot read {}: {error}.",
                telemetry::file(state).display()
            ))
        })
}

/// From a coordinator, with the recipe that the command names.
pub async fn online(command: &Replay) -> Result<Known, Failure> {
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
    let (mut named, mut metrics) = (Vec::new(), Vec::new());
    if command.rerun.is_some() {
        named = client.checkpoints(&status.run).await?;
        metrics = client.metrics(&status.run).await?.all().await?;
    }
    let mut account = Account::default();
    ledger::each(&mut client, &status, |entry| {
        account.push(command.step, entry);
    })
    .await?;
    Ok(Known {
        run: status.run,
        recipe,
        account,
        checkpoints: checkpoints::of_answer(named),
        metrics: by_step(metrics),
    })
}
