//! What clients ask for about checkpoints: names by which they are kept, and pruning.

use supra_proto::v1;

use super::Machine;
use super::clients::Refused;
use super::fact::Fact;
use super::retention::{self, Kept};
use super::state::{Checkpoint, Run, RunNumber};

/// Longest name of a checkpoint.
const LONGEST_NAME: usize = 64;

impl Machine {
    /// Gives the newest published checkpoint of a step a name.
    pub(super) fn name_checkpoint(
        &mut self,
        number: RunNumber,
        step: u64,
        name: String,
    ) -> Result<(), Refused> {
        let run = self.state.run(number).ok_or(Refused::NoRun(number))?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(plain) {
            return Err(Refused::BadName(name));
        }
        let mut published = run.checkpoints.iter().filter(|known| known.published);
        let mut of_step = published.clone().filter(|known| known.step == step);
        let Some(known) = of_step.next_back() else {
            return Err(Refused::NoCheckpoint {
                run: run.id.clone(),
                what: format!("of step {step}"),
            });
        };
        if let Some(other) = published.find(|it| it.name == name && it.path != known.path) {
            return Err(Refused::NameTaken {
                name,
                step: other.step,
            });
        }
        let (path, text) = (
            known.path.clone(),
            format!("checkpoint of step {step} is kept as {name}"),
        );
        if known.name != name {
            self.log(Some(number), "INFO", text);
            self.decide(Fact::Named {
                run: number,
                path,
                name,
            });
        }
        Ok(())
    }

    /// Drops a name: the checkpoint goes when nothing else keeps it.
    pub(super) fn drop_name(&mut self, number: RunNumber, name: &str) -> Result<(), Refused> {
        let run = self.state.run(number).ok_or(Refused::NoRun(number))?;
        let named = |known: &&Checkpoint| !name.is_empty() && known.name == name;
        let Some(known) = run.checkpoints.iter().find(named) else {
            return Err(Refused::NoCheckpoint {
                run: run.id.clone(),
                what: format!("called {name}"),
            });
        };
        let (path, step) = (known.path.clone(), known.step);
        let text = format!("checkpoint of step {step} is not kept as {name} any more");
        self.log(Some(number), "INFO", text);
        self.decide(Fact::Named {
            run: number,
            path,
            name: String::new(),
        });
        self.settle(number);
        Ok(())
    }

    /// Deletes damaged checkpoints, and all but the newest `keep` (as many as the recipe says, unless given) and the named.
    pub(super) fn prune(&mut self, number: RunNumber, keep: Option<u32>) -> Result<(), Refused> {
        let run = self.state.run(number).ok_or(Refused::NoRun(number))?;
        let paths = prunable(run, keep);
        if !paths.is_empty() {
            let text = format!("pruned by a user: {}", paths.join(", "));
            self.log(Some(number), "INFO", text);
        }
        self.remove(number, paths);
        Ok(())
    }

    /// What [`Machine::prune`] would delete now, oldest first.
    pub fn prunable(&self, number: RunNumber, keep: Option<u32>) -> Vec<v1::Checkpoint> {
        let Some(run) = self.state.run(number) else {
            return Vec::new();
        };
        let paths = prunable(run, keep);
        let root = &run.checkpoint_root;
        let paths: Vec<String> = paths
            .iter()
            .map(|path| root.join(path).display().to_string())
            .collect();
        let mut all = self.checkpoints(number);
        all.retain(|known| paths.contains(&known.path));
        all
    }

    /// Journalled checkpoints of a run, damaged ones too, oldest first.
    pub fn checkpoints(&self, number: RunNumber) -> Vec<v1::Checkpoint> {
        let Some(run) = self.state.run(number) else {
            return Vec::new();
        };
        let reasons = retention::reasons(run, run.keep, run.keep_every);
        let sound = run.checkpoints.iter().zip(reasons);
        let mut all: Vec<v1::Checkpoint> = sound
            .map(|(known, kept)| show(run, known, kept, ""))
            .chain(damaged(run))
            .collect();
        all.sort_by_key(|known| (known.step, known.generation));
        all
    }
}

/// Checkpoints that were found damaged, as they were found.
pub(super) fn damaged(run: &Run) -> impl Iterator<Item = v1::Checkpoint> + '_ {
    run.damaged
        .iter()
        .map(move |known| show(run, &known.checkpoint, None, &known.problem))
}

/// A checkpoint for clients.
pub(super) fn show(
    run: &Run,
    known: &Checkpoint,
    kept: Option<Kept>,
    damaged: &str,
) -> v1::Checkpoint {
    v1::Checkpoint {
        step: known.step,
        tokens: known.tokens,
        generation: known.generation,
        path: run.checkpoint_root.join(&known.path).display().to_string(),
        bytes: known.bytes,
        manifest_hash: known.manifest_hash.to_vec(),
        published: known.published,
        world: known.world,
        written_unix_ms: known.at,
        name: known.name.clone(),
        verified: known.verified,
        kept: kept.map(|kept| kept.to_string()).unwrap_or_default(),
        damaged: damaged.to_owned(),
    }
}

/// Paths of the checkpoints that a user may have deleted.
fn prunable(run: &Run, keep: Option<u32>) -> Vec<String> {
    let damaged = run.damaged.iter().map(|it| it.checkpoint.path.clone());
    let old = retention::removable(run, keep.unwrap_or(run.keep), 0);
    damaged.chain(old).collect()
}
