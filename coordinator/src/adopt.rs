//! Reads a run out of its checkpoints, for a coordinator that does not know it: the head node that had its journal is gone.
//!
//! A checkpoint carries the whole ledger up to the head that its manifest remembers, and the recipe, so it is enough by itself.
//! Nothing of it is believed before it is proved: every file by its hash, the ledger as `supra audit` does it, and that both
//! speak of the same run, data and steps ([`proof`]). What else lies in the folder is sorted by what that ledger says of it
//! ([`folder`]).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use supra_checkpoint::examine::{self, Care};
use supra_checkpoint::{LEDGER, PUBLISHED, Store, StoredError, store};
use supra_recipes::plan::VERSION;
use supra_recipes::schema::Recipe;

use crate::ledger::{Body, Record, lines};
use crate::machine::{Adoption, Checkpoint, Damaged, Submission};

mod folder;
mod proof;

use folder::{Folder, Found};

/// Why a run cannot be adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// What was named is not what can be adopted.
    #[error("{0}")]
    Input(String),
    /// The run is known.
    #[error(
        "this coordinator knows run {0} already, so there is nothing to adopt; `supra resume {0}` continues it when it has stopped"
    )]
    Known(String),
    /// What was named is damaged.
    #[error("{0}")]
    Broken(String),
    /// The storage cannot be read.
    #[error(
        "{0}; try again when the storage can be read, or start the coordinator with what it needs to read it"
    )]
    Storage(#[from] StoredError),
    /// Whoever asked does not wait for it any more.
    #[error("nobody waits for it any more")]
    Stopped,
}

/// What cannot be adopted from a checkpoint.
enum Flaw {
    /// It is damaged: an older one may do.
    Damage(String),
    /// It cannot be told whether it is: no older one is taken for that.
    Unfit(AdoptError),
}

/// Reads the run of the checkpoint at `url`, or of the newest one that is whole in a folder of checkpoints there; with `strict`,
/// of none but the newest. `known` are the ids of runs that need not be adopted. `read` is told of bytes as they are read, and
/// says whether to go on. Blocks: reads all of the checkpoint.
///
/// # Errors
/// There is no such checkpoint, it is damaged, or the storage cannot be read.
pub fn read(
    url: &str,
    strict: bool,
    known: &BTreeSet<String>,
    read: &mut dyn FnMut(u64) -> bool,
) -> Result<Adoption, AdoptError> {
    let (root, only) = place(url)?;
    let mut folder = Folder::survey(&root, only.as_deref())?;
    if let Some(run) = folder.run().filter(|run| known.contains(*run)) {
        return Err(AdoptError::Known(run.to_owned()));
    }
    let mut passed_over = Vec::new();
    while let Some(found) = folder.next() {
        match prove(&root, &found, read) {
            Ok(ledger) => {
                let others = folder.sort(&found, &ledger);
                return adoption(&root, strict, found, ledger, passed_over, others);
            }
            Err(Flaw::Unfit(error)) => return Err(error),
            Err(Flaw::Damage(problem)) if strict || only.is_some() => {
                let at = root.at(&found.checkpoint.path);
                return Err(AdoptError::Broken(format!(
                    "the checkpoint {} is damaged: {problem}. Name another one, or the folder that it lies in without --strict",
                    at.display()
                )));
            }
            Err(Flaw::Damage(problem)) => passed_over.push(Damaged {
                checkpoint: found.checkpoint,
                problem,
            }),
        }
    }
    let problems: Vec<String> = passed_over.into_iter().map(|it| it.problem).collect();
    Err(AdoptError::Broken(format!(
        "no checkpoint in {} is whole: {}",
        root.url(),
        problems.join("; ")
    )))
}

/// The folder of checkpoints at a path or URL; and, when that is a checkpoint, its name in the folder.
fn place(url: &str) -> Result<(Store, Option<String>), AdoptError> {
    let input = |problem: String| AdoptError::Input(problem);
    let here = Store::open(url).map_err(|error| input(error.to_string()))?;
    if here.is_local() && !Path::new(here.url()).is_absolute() {
        return Err(input(format!("{url} is not an absolute path")));
    }
    if !here.exists(PUBLISHED)? {
        return Ok((here, None));
    }
    let above = here.url().rsplit_once('/');
    let Some((root, name)) = above.filter(|(root, name)| !root.ends_with('/') && !name.is_empty())
    else {
        return Err(input(format!(
            "{url} is a checkpoint that lies in no folder: move it into one, which is where the run writes others"
        )));
    };
    let root = if root.is_empty() { "/" } else { root };
    Ok((Store::open(root)?, Some(name.to_owned())))
}

/// Proves a checkpoint and gives its ledger.
fn prove(
    root: &Store,
    found: &Found,
    read: &mut dyn FnMut(u64) -> bool,
) -> Result<Vec<Record>, Flaw> {
    let path = &found.checkpoint.path;
    let at = root.at(path).display().to_string();
    let unfit = |problem: String| Flaw::Unfit(AdoptError::Input(problem));
    let unreadable = |error: StoredError| match error {
        StoredError::Damaged { .. } => Flaw::Damage(error.finding()),
        error => Flaw::Unfit(error.into()),
    };
    let manifest = match &found.manifest {
        Ok(manifest) => manifest,
        Err(error @ StoredError::Damaged { .. }) => return Err(Flaw::Damage(error.finding())),
        Err(error) => return Err(unfit(error.to_string())),
    };
    if !manifest.files.contains_key(LEDGER) {
        return Err(unfit(format!(
            "{at} has checkpoint format {} and carries no ledger, so its run cannot be rebuilt from it: checkpoints of this build do. \
             The model in it can still be exported, and trained on as the base of a new run",
            manifest.format
        )));
    }
    if manifest.plan_version != VERSION {
        return Err(unfit(format!(
            "{at} was trained by version {} of the plan, and this program has version {VERSION}: its samples would be others. Start the \
             coordinator of the build that wrote it, {}",
            manifest.plan_version, manifest.environment.build
        )));
    }
    let here = Store::open(&at).map_err(unreadable)?;
    let findings = examine::published(&here, &found.checkpoint.manifest_hash, Care::Thorough, read)
        .map_err(|examine::Stopped| Flaw::Unfit(AdoptError::Stopped))?
        .unwrap_or_default();
    if let Some(problem) = findings.damage() {
        return Err(Flaw::Damage(problem));
    }
    if let Some(error) = findings.problems.into_iter().next() {
        return Err(Flaw::Unfit(error.into()));
    }
    let ledger = here.read_all(LEDGER).map_err(unreadable)?;
    let damage =
        |problem: String| Flaw::Damage(format!("{}: {problem}", here.at(LEDGER).display()));
    let ledger = lines::parse(&ledger).map_err(damage)?;
    proof::prove(&ledger, manifest).map_err(damage)?;
    Ok(ledger)
}

fn adoption(
    root: &Store,
    strict: bool,
    found: Found,
    ledger: Vec<Record>,
    mut passed_over: Vec<Damaged>,
    others: folder::Sorted,
) -> Result<Adoption, AdoptError> {
    let manifest = found.manifest?;
    let recipe = Recipe::parse(&manifest.recipe, &manifest.run)
        .map_err(|error| AdoptError::Input(error.to_string()))?;
    let submission = Submission {
        // Its hash is in the ledger.
        recipe: manifest.recipe,
        ..Submission::new(manifest.run, &recipe, PathBuf::from(root.url()), strict)
    };
    let generation = others.generation.max(newest_generation(&ledger));
    if generation > u64::from(u32::MAX) {
        return Err(AdoptError::Input(format!(
            "a folder in {} names generation {generation}, which no run comes to: remove it",
            root.url()
        )));
    }
    let replica_hash = blake3::Hash::from_hex(&manifest.replica_hash);
    let replica_hash = replica_hash.map_err(|_| {
        let at = root.at(&found.checkpoint.path).display().to_string();
        AdoptError::Broken(format!("the manifest of {at} states no hash of its state"))
    })?;
    passed_over.extend(others.passed_over);
    passed_over.sort_by_key(|it| order(&it.checkpoint));
    Ok(Adoption {
        submission,
        ledger,
        checkpoint: found.checkpoint,
        older: others.older,
        passed_over,
        replica_hash: *replica_hash.as_bytes(),
        generation,
    })
}

fn order(checkpoint: &Checkpoint) -> (u64, u64) {
    (checkpoint.step, checkpoint.generation)
}

/// The greatest number of a generation that a ledger knows.
fn newest_generation(ledger: &[Record]) -> u64 {
    let generations = ledger.iter().map(|record| match &record.body {
        Body::Step(step) => step.generation,
        Body::Evaluated(evaluation) => evaluation.generation,
        Body::Void { generation, .. }
        | Body::Durable { generation, .. }
        | Body::Lost { generation, .. } => *generation,
        Body::Open(_) | Body::Close { .. } => 0,
    });
    generations.max().unwrap_or(0)
}

/// The folders of other writers, published or not, say which generations there were.
fn generation_of_name(name: &str) -> u64 {
    store::parse_directory_name(name).map_or(0, |(_, generation)| generation)
}

#[cfg(test)]
mod tests;
