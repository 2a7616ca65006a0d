//! Commands that ask a coordinator about runs: submit, runs, status, watch, logs, cancel, resume, workers.

use std::path::{Path, PathBuf};

use clap::Args;
use supra_proto::Client;
use supra_proto::v1::{RunState, RunStatus, SubmitRequest};
use supra_recipes::Recipe;

use super::connect::Connect;
use super::failure::{Exit, Failure};
use super::progress::{self, Progress};
use super::{adopt, describe, format, json, out};

/// Machine-readable output.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Json {
    /// Print JSON, as documented in docs/cli.md
    #[arg(long)]
    pub json: bool,
}

/// Which run is meant.
#[derive(Args, Clone, Debug)]
pub struct Which {
    /// Id of the run or a unique beginning of it [default: the newest run]
    #[arg(value_name = "RUN", default_value = "", hide_default_value = true)]
    pub run: String,
}

/// What is done about a damaged checkpoint.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct Strict {
    /// When a checkpoint is damaged, do not start from an older one: the run fails, naming file and cause, with exit code
    /// 4. Holds until the run is resumed again
    #[arg(long)]
    pub strict: bool,
}

/// Queue a recipe
#[derive(Args, Debug)]
pub struct Submit {
    /// Recipe to run (YAML)
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Then follow the run to its end, as `supra watch` does
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// List all runs, newest first
#[derive(Args, Debug)]
pub struct Runs {
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// Show one run
#[derive(Args, Debug)]
pub struct OfRun {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// Show a run's log lines
#[derive(Args, Debug)]
pub struct Logs {
    #[command(flatten)]
    which: Which,
    /// Go on with new lines until the run ends
    #[arg(long, short)]
    follow: bool,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// Ask a run for a checkpoint and a stop
#[derive(Args, Debug)]
pub struct Cancel {
    #[command(flatten)]
    which: Which,
    /// Wait until the run has stopped
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// Queue a stopped run again: it goes on from its last checkpoint with the very next sample
#[derive(Args, Debug)]
pub struct Resume {
    #[command(flatten)]
    which: Which,
    /// Rebuild a run that the coordinator does not know, since the head node that had its journal is gone: from the
    /// checkpoint at URL (a path, s3://, gs://), or the newest one that is whole in the folder of a run's checkpoints there.
    /// The coordinator reads all of it first, and checks files and ledger. Make sure that the old coordinator never comes
    /// back
    #[arg(long, value_name = "URL", conflicts_with = "run")]
    adopt: Option<String>,
    #[command(flatten)]
    strict: Strict,
    /// Then follow the run to its end, as `supra watch` does
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// What to send for a recipe file. The recipe is checked here first, so that a mistake is told even
/// when no coordinator runs.
///
/// # Errors
/// The rendered report of what is wrong with the recipe.
pub fn submission(path: &Path) -> Result<(Recipe, SubmitRequest), Failure> {
    let recipe = Recipe::load(path).map_err(|error| Failure::input(error.to_string()))?;
    let read = || -> std::io::Result<SubmitRequest> {
        let directory = std::path::absolute(path)?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default();
        Ok(SubmitRequest {
            recipe: std::fs::read_to_string(path)?,
            file_name: path.display().to_string(),
            base_directory: directory.display().to_string(),
            strict: false,
        })
    };
    let request = read()
        .map_err(|error| Failure::input(format!("cannot read {}: {error}.", path.display())))?;
    Ok((recipe, request))
}

/// `supra submit`.
///
/// # Errors
/// A bad recipe, or a coordinator that does not take it.
pub async fn submit(command: Submit) -> Result<Exit, Failure> {
    let (recipe, request) = submission(&command.recipe)?;
    let mut client = command.connect.client().await?;
    let run = client.submit(request).await?;
    if let Some(chaos) = &recipe.chaos {
        out::complain(&format!("note: {}", chaos.warning()));
    }
    if command.watch {
        return follow(&mut client, &run, command.json.json).await;
    }
    if command.json.json {
        out::json(&serde_json::json!({ "run": run }))?;
    } else {
        out::line(&format!(
            "Queued as run {run}. `supra watch {run}` follows it."
        ))?;
    }
    Ok(Exit::Done)
}

/// `supra runs`.
///
/// # Errors
/// An unreachable coordinator.
pub async fn runs(command: Runs) -> Result<Exit, Failure> {
    let runs = command.connect.client().await?.list().await?;
    if command.json.json {
        out::json(&runs.iter().map(json::Run::from).collect::<Vec<_>>())?;
    } else if runs.is_empty() {
        out::line("No runs yet. `supra submit RECIPE` queues one.")?;
    } else {
        out::text(&describe::runs(&runs))?;
    }
    Ok(Exit::Done)
}

/// `supra status`.
///
/// # Errors
/// An unreachable coordinator or an unknown run.
pub async fn status(command: OfRun) -> Result<Exit, Failure> {
    let status = command
        .connect
        .client()
        .await?
        .status(&command.which.run)
        .await?;
    show(&status, command.json)?;
    Ok(Exit::Done)
}

/// `supra watch`.
///
/// # Errors
/// An unreachable coordinator or an unknown run.
pub async fn watch(command: OfRun) -> Result<Exit, Failure> {
    let mut client = command.connect.client().await?;
    follow(&mut client, &command.which.run, command.json.json).await
}

/// `supra logs`.
///
/// # Errors
/// An unreachable coordinator or an unknown run.
pub async fn logs(command: Logs) -> Result<Exit, Failure> {
    let mut client = command.connect.client().await?;
    let mut entries = client.logs(&command.which.run, command.follow).await?;
    while let Some(entry) = entries.next().await? {
        if command.json.json {
            out::json_line(&json::LogEntry::from(&entry))?;
        } else {
            out::line(&describe::log_line(&entry))?;
        }
    }
    Ok(Exit::Done)
}

/// `supra cancel`.
///
/// # Errors
/// An unreachable coordinator, an unknown run, or one that has ended.
pub async fn cancel(command: Cancel) -> Result<Exit, Failure> {
    let mut client = command.connect.client().await?;
    let mut status = client.cancel(&command.which.run).await?;
    if command.wait {
        let mut changes = client.watch(&status.run).await?;
        while let Some(change) = changes.next().await? {
            status = change;
        }
    }
    if command.json.json {
        out::json(&json::Run::from(&status))?;
    } else if progress::ended(&status) {
        out::text(&progress::ending(&status))?;
        out::text(&resume_hint(&status))?;
    } else {
        out::line(&format!(
            "Run {} stops after a checkpoint. `supra status {0}` shows when it has.",
            status.run
        ))?;
    }
    Ok(Exit::Done)
}

/// `supra resume`.
///
/// # Errors
/// An unreachable coordinator, an unknown run, or one that cannot be resumed.
pub async fn resume(command: Resume) -> Result<Exit, Failure> {
    let mut client = command.connect.client().await?;
    let strict = command.strict.strict;
    let adopted = match &command.adopt {
        Some(url) => Some(adopt::adopt(&mut client, url, strict).await?),
        None => None,
    };
    let status = match &adopted {
        Some(answer) => answer.run.clone().unwrap_or_default(),
        None => client.resume(&command.which.run, strict).await?,
    };
    if command.watch {
        return follow(&mut client, &status.run, command.json.json).await;
    }
    if command.json.json {
        out::json(&json::Run::from(&status))?;
    } else if let Some(answer) = &adopted {
        out::line(&adopt::render(answer))?;
    } else {
        let from = status.checkpoint.as_ref().map_or_else(
            || "from the beginning".to_owned(),
            |checkpoint| format!("after step {}", format::grouped(checkpoint.step)),
        );
        out::line(&format!(
            "Run {} is queued again and goes on {from}. `supra watch {0}` follows it.",
            status.run
        ))?;
    }
    Ok(Exit::Done)
}

/// `supra workers`.
///
/// # Errors
/// An unreachable coordinator.
pub async fn workers(command: Runs) -> Result<Exit, Failure> {
    let workers = command.connect.client().await?.workers().await?;
    if command.json.json {
        out::json(&workers.iter().map(json::Worker::from).collect::<Vec<_>>())?;
        return Ok(Exit::Done);
    }
    if workers.is_empty() {
        out::line("No workers yet. `supra-worker run --coordinator URL` attaches one.")?;
        return Ok(Exit::Done);
    }
    out::text(&describe::workers(&workers))?;
    Ok(Exit::Done)
}

/// Shows a run until it ends; gives the exit code of its end. Ctrl-C leaves the run alone.
async fn follow(client: &mut Client, run: &str, json: bool) -> Result<Exit, Failure> {
    let mut display = Progress::new(json);
    let mut changes = client.watch(run).await?;
    let mut last: Option<RunStatus> = None;
    loop {
        let change = tokio::select! {
            change = changes.next() => change,
            _ = tokio::signal::ctrl_c() => {
                display.leave();
                let run = last.map_or_else(|| run.to_owned(), |status| status.run);
                out::complain(&format!("Run {run} goes on. `supra cancel {run}` stops it."));
                return Ok(Exit::Interrupted);
            }
        };
        match change {
            Ok(Some(status)) => {
                display.show(&status)?;
                last = Some(status);
            }
            Ok(None) => break,
            Err(error) => {
                display.leave();
                return Err(error.into());
            }
        }
    }
    let Some(status) = last.filter(progress::ended) else {
        display.leave();
        return Err(Failure::unreachable(
            "the coordinator ended while the run was still going. It goes on when the coordinator is started again.",
        ));
    };
    display.end(&status)?;
    if !json {
        out::text(&resume_hint(&status))?;
    }
    Ok(progress::exit(&status))
}

fn resume_hint(status: &RunStatus) -> String {
    match status.state() {
        RunState::Finished => String::new(),
        _ => format!("`supra resume {}` goes on from there.\n", status.run),
    }
}

fn show(status: &RunStatus, json: Json) -> Result<(), Failure> {
    if json.json {
        out::json(&json::Run::from(status))
    } else {
        out::text(&describe::facts(status))
    }
}
