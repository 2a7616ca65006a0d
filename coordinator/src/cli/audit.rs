//! `supra audit`: proves from the ledger that every sample of the budget was trained exactly once.

use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Args;
use supra_checkpoint::examine::Care;
use supra_recipes::Recipe;

use super::checkpoints::{self, Checkpoint};
use super::connect::{Connect, TokenFile};
use super::failure::{Exit, Failure};
use super::format::{self, Table};
use super::heads;
use super::ledger::{self, Entry, Offline};
use super::out;
use super::runs::{Json, Which};
use super::samples::Samples;
use crate::audit::{Auditor, Manifest, Options, Outcome, Recompute, Remembered, Verdict};
use crate::capsule::{self, Capsule};
use crate::ledger::Hash;

/// Arguments of `supra audit`.
#[derive(Args, Debug)]
pub struct Audit {
    #[command(flatten)]
    which: Which,
    /// Also read the training data of RECIPE again and compare it with what was fed: slow, reads
    /// every sample
    #[arg(long, value_name = "RECIPE")]
    data: Option<PathBuf>,
    /// Also hash every file of the published checkpoints, and of the model of --export, and compare with
    /// what was written: slow, reads all of them
    #[arg(long)]
    files: bool,
    /// Also look for what an exported model remembers of the ledger
    #[arg(long, value_name = "DIR")]
    export: Option<PathBuf>,
    /// Audit the ledger in a capsule that `supra capsule` has made, against the recipe and the checkpoints' manifests in it
    #[arg(long, value_name = "FILE.tar.zst|DIR", conflicts_with_all = ["run", "state", "files", "export"])]
    capsule: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
    /// Read the journal of this state directory instead of asking a coordinator: changes nothing,
    /// and works whether or not a coordinator runs there
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
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

/// Reads the ledger, audits it and prints the verdict; ends with 4 when it is broken.
///
/// # Errors
/// An unreachable coordinator, an unreadable journal, or an unknown run.
pub async fn run(command: Audit) -> Result<Exit, Failure> {
    let open = |path: &Path| {
        let recipe = Recipe::load(path).map_err(|error| Failure::input(error.to_string()))?;
        Samples::open(&recipe, &recipe.data.train)
    };
    let mut data = command.data.as_deref().map(open).transpose()?;
    let mut recompute = data
        .as_mut()
        .map(|data| |samples: Range<u64>| data.digest(samples));
    let recompute = recompute
        .as_mut()
        .map(|function| function as &mut Recompute<'_>);
    let verdict = match (&command.capsule, &command.state) {
        (Some(path), _) => packed(path, recompute)?,
        (None, Some(state)) => offline(state, &command, recompute)?,
        (None, None) => online(&command, recompute).await?,
    };
    let exit = if verdict.verdict == Outcome::Ok {
        Exit::Done
    } else {
        Exit::Broken
    };
    let printed = if command.json.json {
        out::json(&verdict)
    } else {
        out::text(&render(&verdict))
    };
    match printed {
        // The verdict stands whether or not somebody reads it.
        Ok(()) | Err(Failure::Closed) => Ok(exit),
        Err(other) => Err(other),
    }
}

/// Audits what the coordinator streams, up to the head that it names: a ledger without that head
/// has lost its tail, and what a live run adds meanwhile is left for the next audit.
async fn online<'a>(
    command: &Audit,
    recompute: Option<&'a mut Recompute<'a>>,
) -> Result<Verdict, Failure> {
    let coordinator = command.coordinator.clone();
    let connect = Connect {
        coordinator,
        state: None,
        token: command.token.clone(),
    };
    let mut client = connect.client().await?;
    let run = client.status(&command.which.run).await?.run;
    let named = client.checkpoints(&run).await?;
    let damaged = checkpoints::damaged_of_answer(&named);
    let first = named.first().map(|known| PathBuf::from(&known.path));
    let root = first.as_deref().and_then(Path::parent);
    let known = checkpoints::of_answer(named);
    let mut witnesses = command.witnesses(&run, root.unwrap_or(Path::new("")), &known, &damaged)?;
    // After the checkpoints were read: what a live run adds meanwhile is left for the next audit.
    witnesses.forget_retired(&checkpoints::of_answer(client.checkpoints(&run).await?));
    let status = client.status(&run).await?;
    let mut auditor = Auditor::new(Options {
        head: ledger::head(&status),
        recompute,
        ..witnesses.options()
    });
    ledger::each(&mut client, &status, |entry| push(&mut auditor, entry)).await?;
    Ok(auditor.finish())
}

/// Audits what the journal of a state directory holds.
fn offline<'a>(
    state: &Path,
    command: &Audit,
    recompute: Option<&'a mut Recompute<'a>>,
) -> Result<Verdict, Failure> {
    let mut ledger = Offline::open(state, &command.which.run)?;
    let (run, root) = (&ledger.run.id, &ledger.run.checkpoint_root);
    let damaged = checkpoints::damaged_of_run(&ledger.run);
    let known = checkpoints::of_run(&ledger.run);
    let mut witnesses = command.witnesses(run, root, &known, &damaged)?;
    // After the checkpoints were read: what a live coordinator publishes meanwhile is left for the next audit.
    ledger.refresh()?;
    witnesses.forget_retired(&checkpoints::of_run(&ledger.run));
    let mut options = witnesses.options();
    options.files.0.extend(ledger.lost_end()?);
    let mut auditor = Auditor::new(Options {
        head: ledger.head(),
        recipe_hash: Some(*blake3::hash(ledger.run.recipe.as_bytes()).as_bytes()),
        recompute,
        ..options
    });
    ledger.each(|entry| push(&mut auditor, entry))?;
    Ok(auditor.finish())
}

/// Audits the ledger in a capsule.
fn packed<'a>(path: &Path, recompute: Option<&'a mut Recompute<'a>>) -> Result<Verdict, Failure> {
    let capsule = Capsule::read(path)?;
    let index = capsule.index();
    let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
    let manifests = capsule
        .members()
        .filter(|(name, _)| name.starts_with("checkpoints/"));
    let said = manifests.filter_map(|(name, bytes)| heads::said(name, bytes, &index.run));
    let (checkpoints, manifests) = said.unzip();
    let mut auditor = Auditor::new(Options {
        head: Some(index.ledger_head).filter(|head| *head != Hash::default()),
        recipe_hash: capsule.member(capsule::RECIPE).map(hash),
        checkpoints,
        manifests,
        recompute,
        ..Options::default()
    });
    for record in capsule.ledger()? {
        auditor.push(&record);
    }
    Ok(auditor.finish())
}

/// What there is on this machine of a run beside its ledger.
struct Witnesses {
    remembered: Vec<Remembered>,
    receipt: Option<Remembered>,
    manifests: Vec<Manifest>,
    /// Published checkpoints, with what is wrong with their files and how many are right.
    examined: Vec<(Checkpoint, Vec<String>, u64)>,
    /// The same of receipt and exported model.
    beside: (Vec<String>, u64),
}

impl Audit {
    /// Reads the checkpoints below `root` but for `damaged` ones, those that are `known`, and the exported model that the
    /// command names.
    fn witnesses(
        &self,
        run: &str,
        root: &Path,
        known: &[Checkpoint],
        damaged: &[PathBuf],
    ) -> Result<Witnesses, Failure> {
        let (mut remembered, manifests) = heads::remembered(root, run, damaged);
        let (mut receipt, mut beside) = (None, (Vec::new(), 0));
        if let Some(directory) = &self.export {
            let (of, head) = heads::of_export(directory)?;
            if of != run {
                return Err(Failure::input(format!(
                    "{} is a model of run {of}, not of {run}. Audit run {of}.",
                    directory.display()
                )));
            }
            remembered.push(head);
            if self.files {
                beside = heads::files_of_export(directory);
            }
        }
        match heads::of_receipt(root, run) {
            Ok(said) => receipt = said,
            Err(problem) => beside.0.push(problem),
        }
        let care = if self.files {
            Care::Thorough
        } else {
            Care::Quick
        };
        let examine = |checkpoint: &Checkpoint| {
            let (problems, right) = checkpoints::examine(checkpoint, care);
            (checkpoint.clone(), problems, right)
        };
        Ok(Witnesses {
            remembered,
            receipt,
            manifests,
            examined: known.iter().map(examine).collect(),
            beside,
        })
    }
}

impl Witnesses {
    /// Nothing is wrong with a checkpoint that went away while it was read.
    fn forget_retired(&mut self, known: &[Checkpoint]) {
        self.examined
            .retain(|(checkpoint, ..)| known.contains(checkpoint));
    }

    fn options<'a>(self) -> Options<'a> {
        let mut files = self.beside;
        for (_, problems, right) in self.examined {
            files.0.extend(problems);
            files.1 += right;
        }
        Options {
            checkpoints: self.remembered,
            receipt: self.receipt,
            manifests: self.manifests,
            files,
            ..Options::default()
        }
    }
}

fn push(auditor: &mut Auditor<'_>, entry: Entry) {
    match entry {
        Ok(record) => auditor.push(&record),
        Err(error) => auditor.unreadable(&error),
    }
}

/// The verdict for people: one line, the facts, and every break.
fn render(verdict: &Verdict) -> String {
    let (done, budget) = (
        format::grouped(verdict.tokens),
        format::grouped(verdict.budget_tokens),
    );
    let run = if verdict.run.is_empty() {
        "(without an opening)"
    } else {
        &verdict.run
    };
    let mut text = match (verdict.verdict, verdict.finished) {
        (Outcome::Broken, _) => {
            format!("BROKEN: the ledger of run {run} does not prove what was trained.\n")
        }
        (Outcome::Ok, _) if verdict.records == 0 => {
            "OK: the ledger is empty, nothing was trained yet.\n".to_owned()
        }
        (Outcome::Ok, true) => {
            format!(
                "OK: run {run} trained all {budget} tokens of its budget, every sample exactly once.\n"
            )
        }
        (Outcome::Ok, false) => {
            format!(
                "OK: run {run} trained {done} of {budget} tokens so far, every sample exactly once.\n"
            )
        }
    };
    let mut table = Table::new(&["", ""]);
    let mut fact = |name: &str, value: String| table.row([format!("  {name}"), value]);
    fact(
        "steps",
        format!(
            "{} of {}",
            format::grouped(verdict.steps),
            format::grouped(verdict.budget_steps)
        ),
    );
    fact("samples", format::grouped(verdict.samples));
    fact(
        "durable",
        format!("up to step {}", format::grouped(verdict.durable_step)),
    );
    if verdict.checkpoints > 0 {
        fact(
            "checkpoints",
            format!(
                "{} remember this ledger",
                format::grouped(verdict.checkpoints)
            ),
        );
    }
    if verdict.files > 0 {
        let files = format::counted(verdict.files, "file");
        fact("files", format!("{files} of checkpoints as written"));
    }
    if verdict.damaged_checkpoints > 0 {
        let damaged = format::counted(verdict.damaged_checkpoints, "checkpoint");
        fact("damaged", format!("{damaged}, started from no more"));
    }
    fact("generations", format::grouped(verdict.generations));
    let again = match verdict.voided_steps {
        0 => "none".to_owned(),
        steps => format!(
            "{}, after a generation was lost",
            format::counted(steps, "step")
        ),
    };
    fact("trained again", again);
    fact("skipped", skipped(&verdict.skipped));
    fact("records", format::grouped(verdict.records));
    fact("head", verdict.head.clone());
    text.push_str(&table.render());
    for found in &verdict.breaks {
        text.push_str(&format!("  record {}: {}\n", found.record, found.what));
    }
    if verdict.more_breaks > 0 {
        text.push_str(&format!(
            "  and {} more\n",
            format::grouped(verdict.more_breaks)
        ));
    }
    text
}

/// `none`, or how many and the first few.
fn skipped(steps: &[u64]) -> String {
    const SHOWN: usize = 10;
    if steps.is_empty() {
        return "none".to_owned();
    }
    let mut shown: Vec<String> = steps
        .iter()
        .take(SHOWN)
        .map(|&step| format::grouped(step))
        .collect();
    if steps.len() > SHOWN {
        shown.push("…".to_owned());
    }
    format!(
        "{} (step {})",
        format::grouped(steps.len() as u64),
        shown.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::audit;
    use crate::ledger::{Body, Tail};

    #[test]
    fn a_ledger_that_begins_in_the_middle_is_broken() {
        let record = Tail::default().next(Body::Close {
            step: 3,
            samples: 10,
        });
        let text = render(&audit([record], Options::default()));
        assert!(
            text.starts_with("BROKEN: the ledger of run (without an opening)"),
            "{text}"
        );
        assert!(
            text.contains("  record 0: the ledger does not begin with an opening\n"),
            "{text}"
        );
    }

    #[test]
    fn an_empty_ledger_is_no_break() {
        assert!(render(&audit([], Options::default())).starts_with("OK: the ledger is empty"));
    }

    #[test]
    fn many_skipped_steps_are_cut_short() {
        assert_eq!(skipped(&[]), "none");
        assert_eq!(skipped(&[4, 1000]), "2 (step 4, 1,000)");
        assert!(skipped(&(1..50).collect::<Vec<_>>()).ends_with("10, …)"));
    }
}
