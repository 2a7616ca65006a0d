//! The folder of a run's checkpoints, as it is found.

use supra_checkpoint::{Manifest, PUBLISHED, Store, StoredError, store};

use super::{AdoptError, generation_of_name, order, proof};
use crate::ledger::{Hash, Record};
use crate::machine::{Checkpoint, Damaged};

/// A published checkpoint.
pub(super) struct Found {
    pub checkpoint: Checkpoint,
    /// What it says of itself, or what is wrong with that.
    pub manifest: Result<Manifest, StoredError>,
}

/// Published checkpoints of one run, from the oldest to the newest.
pub(super) struct Folder {
    candidates: Vec<Found>,
    /// Those that were not asked for.
    others: Vec<Found>,
    /// The greatest number of a generation that a name or manifest has.
    generation: u64,
}

/// What a ledger says of the checkpoints beside the one that it comes from.
pub(super) struct Sorted {
    /// Older ones that it calls durable, in order.
    pub older: Vec<Checkpoint>,
    pub passed_over: Vec<Damaged>,
    /// As of the folder.
    pub generation: u64,
}

impl Folder {
    /// Looks at all that is published in `root`; only the checkpoint of the name `only`, if one is given, is to be adopted.
    ///
    /// # Errors
    /// Nothing is published there, or by more than one run; or the storage cannot be read.
    pub fn survey(root: &Store, only: Option<&str>) -> Result<Folder, AdoptError> {
        let names = root.list("")?;
        let generation = names.iter().map(|name| generation_of_name(name)).max();
        let mut found = Vec::new();
        for name in &names {
            found.extend(look(root, name)?);
        }
        found.sort_by_key(|it| order(&it.checkpoint));
        let wanted = |it: &Found| only.is_none_or(|only| it.checkpoint.path == only);
        let (candidates, mut others): (Vec<_>, Vec<_>) = found.into_iter().partition(wanted);
        let run = the_run(root, &candidates)?.map(str::to_owned);
        let of_run = |it: &Found| run.as_deref().is_none_or(|run| it.is_of(run));
        others.retain(of_run);
        let manifests = candidates.iter().chain(&others);
        let written = manifests.map(|it| it.checkpoint.generation).max();
        Ok(Folder {
            generation: generation.max(written).unwrap_or(0),
            candidates,
            others,
        })
    }

    /// The run whose checkpoints they are; none when no manifest can be read.
    pub fn run(&self) -> Option<&str> {
        let manifests = self.candidates.iter().map(|it| it.manifest.as_ref());
        manifests.flatten().map(|it| it.run.as_str()).next()
    }

    /// The next newest one that is to be adopted.
    pub fn next(&mut self) -> Option<Found> {
        self.candidates.pop()
    }

    /// What the ledger of `adopted` says of those that were not taken out.
    pub fn sort(self, adopted: &Found, ledger: &[Record]) -> Sorted {
        let at = order(&adopted.checkpoint);
        let mut sorted = Sorted {
            older: Vec::new(),
            passed_over: Vec::new(),
            generation: self.generation,
        };
        let mut rest: Vec<Found> = self.candidates.into_iter().chain(self.others).collect();
        rest.sort_by_key(|it| order(&it.checkpoint));
        for Found {
            checkpoint,
            manifest,
        } in rest
        {
            let problem = match manifest {
                Err(error) => error.finding(),
                Ok(_) if order(&checkpoint) > at => {
                    let (step, generation) = at;
                    format!(
                        "it is newer than that of step {step} by generation {generation}, from which the run was adopted"
                    )
                }
                Ok(_) if proof::vouches(ledger, &checkpoint.manifest_hash) => {
                    sorted.older.push(checkpoint);
                    continue;
                }
                Ok(_) => "the ledger of the newer one, from which the run was adopted, does not call it durable".to_owned(),
            };
            sorted.passed_over.push(Damaged {
                checkpoint,
                problem,
            });
        }
        sorted
    }
}

impl Found {
    /// It may be this run's. Who cannot say it lies in its folder.
    fn is_of(&self, run: &str) -> bool {
        self.manifest.as_ref().map_or(true, |it| it.run == run)
    }
}

/// The one run whose checkpoints lie there.
fn the_run<'a>(root: &Store, found: &'a [Found]) -> Result<Option<&'a str>, AdoptError> {
    let manifests = found.iter().flat_map(|it| it.manifest.as_ref());
    let mut runs: Vec<&str> = manifests.map(|it| it.run.as_str()).collect();
    runs.sort_unstable();
    runs.dedup();
    match (runs.as_slice(), found) {
        (_, []) => Err(AdoptError::Input(format!(
            "no published checkpoint is to be seen in {}. Name a checkpoint, or the folder of a run's checkpoints (folders named \
             step-…-gen-…), as the coordinator's machine sees it",
            root.url()
        ))),
        ([], _) => Ok(None),
        ([run], _) => Ok(Some(run)),
        (many, _) => Err(AdoptError::Input(format!(
            "{} holds checkpoints of the runs {}: name one of the checkpoints",
            root.url(),
            many.join(", ")
        ))),
    }
}

/// What is published under a name; none when nothing is.
fn look(root: &Store, name: &str) -> Result<Option<Found>, AdoptError> {
    let file = store::join(name, PUBLISHED);
    // A file beside the checkpoints is no folder.
    if !root.exists(&file)? {
        return Ok(None);
    }
    let bytes = root.read_all(&file)?;
    let manifest_hash: Hash = *blake3::hash(&bytes).as_bytes();
    let manifest = Manifest::parse(&bytes, &root.at(&file));
    let named = store::parse_directory_name(name).unwrap_or_default();
    let said = manifest.as_ref().ok();
    let files = said.map_or(0, |it| it.files.values().map(|file| file.bytes).sum());
    let checkpoint = Checkpoint {
        step: said.map_or(named.0, |it| it.step),
        tokens: said.map_or(0, |it| it.tokens),
        generation: said.map_or(named.1, |it| it.generation),
        path: name.to_owned(),
        bytes: files + bytes.len() as u64,
        manifest_hash,
        published: false,
        world: said.map_or(0, |it| it.world),
        at: 0,
        verified: false,
        name: String::new(),
    };
    Ok(Some(Found {
        checkpoint,
        manifest,
    }))
}
