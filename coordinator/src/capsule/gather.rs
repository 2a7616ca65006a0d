//! Gathers what a capsule holds from a state directory, the folder of the checkpoints, the data and the base.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use supra_checkpoint::store::join;
use supra_checkpoint::{PUBLISHED, Store, StoredError, seal};
use supra_recipes::Recipe;

use super::{
    BASE, Capsule, CapsuleError, Environment, HELDOUT, INCIDENTS, JOURNAL, LEDGER, METRICS,
    RECEIPT, RECIPE, SEALED_RECEIPT, SUBMITTED, TRAIN, VERSIONS, Versions, base, metrics,
};
use crate::goodput::Account;
use crate::journal::Reader;
use crate::ledger::{hex, lines};
use crate::machine::{Run, RunNumber};
use crate::telemetry::{self, TelemetryReader};

/// Ledger records that are read at once.
const PAGE: usize = 4096;

/// Where the recipe of a run is kept as its author wrote it.
pub fn submitted(state: &Path, run: &str) -> PathBuf {
    state.join("runs").join(run).join("recipe.yaml")
}

/// Gathers the capsule of a run from a state directory, whose journal is open, as it is now. What cannot be had is named in the
/// index and stops nothing. Blocks: reads the ledger, and some MiB of each file of the base.
///
/// # Errors
/// A journal or metrics that cannot be read, or a broken ledger.
pub fn gather(state: &Path, journal: &Reader, number: RunNumber) -> Result<Capsule, CapsuleError> {
    journal.hold()?;
    let known = journal.state()?;
    let run = known.run(number).ok_or(CapsuleError::NoRun(number))?;
    let mut gathered = Gathered::default();
    gathered.put(RECIPE, run.recipe.clone().into_bytes());
    gathered.copy(SUBMITTED, &submitted(state, &run.id));
    gathered.put(LEDGER, ledger(journal, run)?);
    gathered.put(JOURNAL, facts(journal, number)?);
    gathered.telemetry(state, run)?;
    let store = Store::open(&run.checkpoint_root.to_string_lossy());
    let build = gathered.receipt(run, &store);
    let environments = gathered.checkpoints(run, &store);
    gathered.put_json(VERSIONS, &Versions::new(environments, build));
    match Recipe::parse(&run.recipe, RECIPE) {
        Ok(recipe) => gathered.sources(&recipe, run),
        Err(_) => {
            let why = "this version does not understand the recipe, which names it";
            for member in [TRAIN, BASE] {
                gathered.lack(member, why);
            }
        }
    }
    let Gathered { members, missing } = gathered;
    Ok(Capsule::new(
        (&run.id, &run.name),
        &run.ledger,
        members,
        missing,
    ))
}

fn ledger(journal: &Reader, run: &Run) -> Result<Vec<u8>, CapsuleError> {
    let (mut bytes, mut from) = (Vec::new(), 0);
    loop {
        let page = journal.ledger(run.number, from, PAGE)?;
        if page.is_empty() {
            return Ok(bytes);
        }
        from += page.len() as u64;
        for record in page {
            lines::append(&mut bytes, record?);
        }
    }
}

fn facts(journal: &Reader, run: RunNumber) -> Result<Vec<u8>, CapsuleError> {
    let mut text = String::new();
    for fact in journal.facts(run)? {
        text.push_str(&fact);
        text.push('\n');
    }
    Ok(text.into_bytes())
}

#[derive(Default)]
struct Gathered {
    members: BTreeMap<String, Vec<u8>>,
    missing: BTreeMap<String, String>,
}

impl Gathered {
    fn put(&mut self, name: &str, bytes: Vec<u8>) {
        self.members.insert(name.to_owned(), bytes);
    }

    fn put_json(&mut self, name: &str, value: &impl Serialize) {
        let mut bytes = serde_json::to_vec_pretty(value)
            .expect("invariant: what a capsule holds has only string keys");
        bytes.push(b'\n');
        self.put(name, bytes);
    }

    fn lack(&mut self, name: &str, why: impl Into<String>) {
        self.missing.insert(name.to_owned(), why.into());
    }

    /// Takes a file over as it is.
    fn copy(&mut self, name: &str, path: &Path) {
        match fs::read(path) {
            Ok(bytes) => self.put(name, bytes),
            Err(error) => self.lack(name, format!("cannot read {}: {error}", path.display())),
        }
    }

    fn telemetry(&mut self, state: &Path, run: &Run) -> Result<(), CapsuleError> {
        let path = telemetry::file(state);
        if !path.exists() {
            for member in [METRICS, INCIDENTS] {
                self.lack(member, format!("there is no {}", path.display()));
            }
            return Ok(());
        }
        let unreadable = |source| CapsuleError::Telemetry {
            path: path.clone(),
            source,
        };
        let reader = TelemetryReader::open(state).map_err(unreadable)?;
        let mut rows = reader.metrics(run.number).map_err(unreadable)?;
        run.add_heldout_losses(&mut rows);
        self.put(METRICS, metrics::csv(&rows));
        let account = reader.account(run.number).map_err(unreadable)?;
        let account: Option<Account> = account.and_then(|text| serde_json::from_str(&text).ok());
        match account {
            Some(account) => {
                let (count, newest) = account.incidents();
                let newest: Vec<_> = newest.collect();
                let incidents = serde_json::json!({ "count": count, "newest": newest });
                self.put_json(INCIDENTS, &incidents);
            }
            None => self.lack(INCIDENTS, "the run has no account of its time"),
        }
        Ok(())
    }

    /// Takes a file of the checkpoints' store over as it is.
    fn fetch(&mut self, name: &str, store: &Result<Store, StoredError>, relative: &str) {
        let read = store.as_ref().map(|store| store.read_all(relative));
        match read {
            Ok(Ok(bytes)) => self.put(name, bytes),
            Ok(Err(error)) => self.lack(name, error.to_string()),
            Err(error) => self.lack(name, error.to_string()),
        }
    }

    /// Takes the receipt, and gives the build that it names.
    fn receipt(&mut self, run: &Run, store: &Result<Store, StoredError>) -> Option<String> {
        if !run.ended() {
            self.lack(RECEIPT, "the run has not ended");
            return None;
        }
        self.fetch(RECEIPT, store, RECEIPT);
        let proved = seal::check(self.members.get(RECEIPT)?, SEALED_RECEIPT);
        if let Err(problem) = proved {
            self.members.remove(RECEIPT);
            self.lack(RECEIPT, problem);
            return None;
        }
        #[derive(Deserialize)]
        struct Said {
            build: String,
        }
        let said: Option<Said> = serde_json::from_slice(self.members.get(RECEIPT)?).ok();
        said.map(|said| said.build)
    }

    /// Takes the manifests of published checkpoints that are what the journal says, and gives what they were written with.
    fn checkpoints(&mut self, run: &Run, store: &Result<Store, StoredError>) -> Vec<Environment> {
        #[derive(Deserialize)]
        struct Said {
            world: u32,
            environment: supra_checkpoint::Environment,
        }
        let mut environments = Vec::new();
        for known in run.checkpoints.iter().filter(|known| known.published) {
            let relative = join(&known.path, PUBLISHED);
            let name = format!("checkpoints/{relative}");
            self.fetch(&name, store, &relative);
            let Some(bytes) = self.members.get(&name) else {
                continue;
            };
            if *blake3::hash(bytes).as_bytes() != known.manifest_hash {
                self.members.remove(&name);
                let path = run.checkpoint_root.join(&relative);
                self.lack(&name, format!("{} was altered", path.display()));
                continue;
            }
            // One of a later form says nothing here, and is taken all the same.
            if let Ok(said) = serde_json::from_slice::<Said>(bytes) {
                environments.push(Environment {
                    step: known.step,
                    generation: known.generation,
                    world: said.world,
                    of: said.environment,
                });
            }
        }
        environments
    }

    /// Takes what the recipe names: the manifests of its data, and what the base is.
    fn sources(&mut self, recipe: &Recipe, run: &Run) {
        self.copy(TRAIN, &manifest(&recipe.data.train));
        let trained = run.open.as_ref().map(|open| open.manifest_hash);
        let found = self
            .members
            .get(TRAIN)
            .map(|bytes| *blake3::hash(bytes).as_bytes());
        if let (Some(trained), Some(found)) = (trained, found)
            && trained != found
        {
            self.members.remove(TRAIN);
            let why = format!(
                "{} is not what was trained: its BLAKE3 is {}, the ledger says {}",
                manifest(&recipe.data.train).display(),
                hex(&found),
                hex(&trained)
            );
            self.lack(TRAIN, why);
        }
        if let Some(heldout) = &recipe.data.heldout {
            self.copy(HELDOUT, &manifest(heldout));
        }
        // A base of random weights is wholly in the recipe.
        if let Some(directory) = recipe.base.directory() {
            match base::files(directory) {
                Ok(files) => self.put_json(BASE, &files),
                Err(error) => {
                    let why = format!("cannot read {}: {error}", directory.display());
                    self.lack(BASE, why);
                }
            }
        }
    }
}

/// The manifest that a recipe's `data` names.
fn manifest(path: &Path) -> PathBuf {
    if path.is_dir() {
        path.join("dataset.json")
    } else {
        path.to_owned()
    }
}
