//! `supra checkpoints`: lists, verifies, keeps and prunes.

use clap::{Args, Subcommand};
use supra_proto::v1::{self, KeepCheckpointRequest, PruneCheckpointsRequest};

use super::verify::verify;
use crate::cli::connect::Connect;
use crate::cli::failure::{Exit, Failure};
use crate::cli::format::{self, Table};
use crate::cli::runs::{Json, Which};
use crate::cli::{json, out};

/// List a run's checkpoints, oldest first, or verify them
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Checkpoints {
    #[command(subcommand)]
    task: Option<Task>,
    #[command(flatten)]
    which: Which,
    /// Steps of the checkpoints to verify [default: all]
    #[arg(value_name = "STEP", requires = "verify")]
    steps: Vec<u64>,
    /// Read every file of them again on this machine, and compare with what was written; ends with 4 when one is damaged
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// What is to be done.
#[derive(Subcommand, Debug)]
enum Task {
    Prune(Prune),
    Keep(Keep),
    DropName(DropName),
}

/// Show which checkpoints may be deleted; with --yes, delete them
///
/// Damaged ones go, and all but the newest, those with a name, and those without a newer one that is verified.
#[derive(Args, Debug)]
struct Prune {
    #[command(flatten)]
    which: Which,
    /// How many of the newest stay, at least 1 [default: the recipe's checkpoint.keep]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Delete them
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// Give a checkpoint a name: it is kept until the name is dropped
#[derive(Args, Debug)]
struct Keep {
    /// Step of the checkpoint
    #[arg(value_name = "STEP")]
    step: u64,
    /// Letters, digits, '.', '_' and '-'
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// Drop the name of a checkpoint: it is deleted when nothing else keeps it
#[derive(Args, Debug)]
struct DropName {
    /// The name
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// `supra checkpoints`.
///
/// # Errors
/// An unreachable coordinator, an unknown run, step or name.
pub async fn run(command: Checkpoints) -> Result<Exit, Failure> {
    match command.task {
        Some(Task::Prune(prune)) => return prune.run().await,
        Some(Task::Keep(keep)) => return keep.run().await,
        Some(Task::DropName(drop)) => return drop.run().await,
        None => {}
    }
    let mut client = command.connect.client().await?;
    let all = client.checkpoints(&command.which.run).await?;
    if command.verify {
        return verify(&wanted(all, &command.steps)?, command.json);
    }
    show(&all, command.json)?;
    Ok(Exit::Done)
}

/// The published checkpoints of `steps`, or all.
fn wanted(all: Vec<v1::Checkpoint>, steps: &[u64]) -> Result<Vec<v1::Checkpoint>, Failure> {
    let published = all.into_iter().filter(|known| known.published);
    let named = |known: &v1::Checkpoint| steps.is_empty() || steps.contains(&known.step);
    let wanted: Vec<v1::Checkpoint> = published.filter(named).collect();
    let missing = |step: &&u64| !wanted.iter().any(|known| known.step == **step);
    match steps.iter().find(missing) {
        None => Ok(wanted),
        Some(step) => Err(Failure::input(format!(
            "the run has no published checkpoint of step {}; `supra checkpoints` lists them.",
            format::grouped(*step)
        ))),
    }
}

impl Prune {
    async fn run(self) -> Result<Exit, Failure> {
        let request = PruneCheckpointsRequest {
            run: self.which.run,
            keep: self.keep,
            delete: self.yes,
        };
        let gone = self
            .connect
            .client()
            .await?
            .prune_checkpoints(request)
            .await?;
        if self.json.json {
            out::json(&gone.iter().map(json::Checkpoint::from).collect::<Vec<_>>())?;
            return Ok(Exit::Done);
        }
        if gone.is_empty() {
            out::line("No checkpoint may be deleted.")?;
            return Ok(Exit::Done);
        }
        out::text(&table(&gone))?;
        let bytes = format::bytes(gone.iter().map(|known| known.bytes).sum());
        let count = format::counted(gone.len() as u64, "checkpoint");
        out::line(&if self.yes {
            format!("{count} deleted, {bytes}.")
        } else {
            format!("{count} would be deleted, {bytes}. Nothing is deleted without --yes.")
        })?;
        Ok(Exit::Done)
    }
}

impl Keep {
    async fn run(self) -> Result<Exit, Failure> {
        let request = KeepCheckpointRequest {
            run: self.which.run,
            step: self.step,
            name: self.name,
        };
        let mut client = self.connect.client().await?;
        show(&client.keep_checkpoint(request).await?, self.json)?;
        Ok(Exit::Done)
    }
}

impl DropName {
    async fn run(self) -> Result<Exit, Failure> {
        let mut client = self.connect.client().await?;
        let all = client
            .drop_checkpoint_name(&self.which.run, &self.name)
            .await?;
        show(&all, self.json)?;
        Ok(Exit::Done)
    }
}

fn show(checkpoints: &[v1::Checkpoint], json: Json) -> Result<(), Failure> {
    if json.json {
        let all = checkpoints.iter().map(json::Checkpoint::from);
        out::json(&all.collect::<Vec<_>>())
    } else if checkpoints.is_empty() {
        out::line("No checkpoints yet.")
    } else {
        out::text(&table(checkpoints))
    }
}

/// All of them, a line each, and below what is wrong with the damaged ones.
fn table(checkpoints: &[v1::Checkpoint]) -> String {
    let now = jiff::Timestamp::now().as_millisecond();
    let mut table = Table::new(&[
        ">STEP", ">TOKENS", ">AGE", ">SIZE", ">WORLD", "STATE", "NAME", "KEPT", "PATH",
    ]);
    let or_none = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
    for known in checkpoints {
        let state = match known {
            _ if !known.damaged.is_empty() => "damaged",
            _ if known.verified => "verified",
            _ if known.published => "published",
            _ => "pending",
        };
        let written = i64::try_from(known.written_unix_ms).unwrap_or(i64::MAX);
        let age = match written {
            0 => "-".to_owned(),
            _ => format::duration(now.saturating_sub(written).max(0) as f64 / 1000.0),
        };
        table.row([
            format::grouped(known.step),
            format::short(known.tokens as f64),
            age,
            format::bytes(known.bytes),
            match known.world {
                0 => "-".to_owned(),
                world => world.to_string(),
            },
            state.to_owned(),
            or_none(&known.name),
            or_none(&known.kept),
            known.path.clone(),
        ]);
    }
    let mut text = table.render();
    for known in checkpoints.iter().filter(|known| !known.damaged.is_empty()) {
        let step = format::grouped(known.step);
        text.push_str(&format!("step {step} is damaged: {}\n", known.damaged));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        checkpoints: Checkpoints,
    }

    fn parse(words: &[&str]) -> Checkpoints {
        Line::parse_from([&["checkpoints"], words].concat()).checkpoints
    }

    #[test]
    fn runs_steps_and_tasks_are_told_apart() {
        let listed = parse(&["run-1"]);
        assert!(listed.task.is_none() && !listed.verify && listed.which.run == "run-1");
        let verified = parse(&["--verify", "run-1", "4", "8"]);
        assert_eq!((verified.verify, verified.steps), (true, vec![4, 8]));
        let Some(Task::Keep(keep)) = parse(&["keep", "8", "best"]).task else {
            panic!("keep is a task");
        };
        assert_eq!(
            (keep.step, keep.name.as_str(), keep.which.run.as_str()),
            (8, "best", "")
        );
        let Some(Task::Prune(prune)) = parse(&["prune", "run-1", "--keep", "2"]).task else {
            panic!("prune is a task");
        };
        assert_eq!((prune.keep, prune.yes), (Some(2), false));
        assert!(Line::try_parse_from(["checkpoints", "run-1", "8"]).is_err());
    }

    #[test]
    fn a_damaged_checkpoint_is_listed_with_what_is_wrong() {
        let damaged = v1::Checkpoint {
            step: 8,
            damaged: "/c/step-8/model: the file is missing".to_owned(),
            ..v1::Checkpoint::default()
        };
        let text = table(&[damaged]);
        assert!(
            text.ends_with("step 8 is damaged: /c/step-8/model: the file is missing\n"),
            "{text}"
        );
        let error = wanted(Vec::new(), &[8]).unwrap_err().to_string();
        assert!(
            error.contains("no published checkpoint of step 8"),
            "{error}"
        );
    }
}
