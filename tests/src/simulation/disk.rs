//! Simulated disks: the coordinator's journal, and the folder of checkpoints that all machines share.

use std::collections::BTreeMap;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use supra_coordinator::machine::{Fact, State};

use super::ground::Model;

/// The facts that were handed to the journal.
#[derive(Default)]
pub(super) struct Journal {
    facts: Vec<Fact>,
    /// What they rebuild.
    state: State,
    /// So many are on the platter; the others may be lost with the power.
    synced: usize,
}

impl Journal {
    pub fn append(&mut self, facts: impl IntoIterator<Item = Fact>) {
        for fact in facts {
            self.state.apply(&fact);
            self.facts.push(fact);
        }
    }

    pub fn sync(&mut self) {
        self.synced = self.facts.len();
    }

    /// The power fails: what was synced stays, and any number of the facts after it. One that was torn is none.
    /// `lying`: a disk that also loses up to so many facts that it called synced.
    pub fn crash(&mut self, random: &mut ChaCha8Rng, lying: usize) {
        let surely = self.synced.saturating_sub(lying);
        let kept = random.random_range(surely..=self.facts.len());
        self.facts.truncate(kept);
        self.state = self.replayed();
        self.sync();
    }

    pub fn facts(&self) -> &[Fact] {
        &self.facts
    }

    /// The facts that are on the platter.
    pub fn safe(&self) -> &[Fact] {
        &self.facts[..self.synced]
    }

    /// What its facts give, one after the other.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What replaying gives.
    pub fn replayed(&self) -> State {
        let mut state = State::default();
        self.facts.iter().for_each(|fact| state.apply(fact));
        state
    }
}

/// One checkpoint's directory.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    pub model: Model,
    /// The ledger's head that its manifest remembers.
    pub head: [u8; 32],
    pub manifest_hash: [u8; 32],
    pub published: bool,
    /// A file is not what was written.
    pub damaged: bool,
}

impl Saved {
    /// A checkpoint of `model` whose manifest is not published yet.
    pub fn pending(model: Model, head: [u8; 32]) -> Saved {
        let manifest = [model.hash, head].concat();
        Saved {
            model,
            head,
            manifest_hash: *blake3::hash(&manifest).as_bytes(),
            published: false,
            damaged: false,
        }
    }
}

/// Directories of checkpoints, by run and path.
#[derive(Default)]
pub(super) struct Checkpoints(BTreeMap<(String, String), Saved>);

impl Checkpoints {
    pub fn write(&mut self, run: &str, path: &str, saved: Saved) {
        self.0.insert((run.to_owned(), path.to_owned()), saved);
    }

    pub fn delete(&mut self, run: &str, path: &str) {
        self.0.remove(&(run.to_owned(), path.to_owned()));
    }

    /// Gives the manifest its final name, which may have happened before.
    pub fn publish(
        &mut self,
        run: &str,
        path: &str,
        manifest_hash: [u8; 32],
    ) -> Result<(), String> {
        match self.0.get_mut(&(run.to_owned(), path.to_owned())) {
            Some(saved) if saved.manifest_hash == manifest_hash => {
                saved.published = true;
                Ok(())
            }
            Some(_) => Err(format!("{path} holds another manifest")),
            None => Err(format!("{path} is not there")),
        }
    }

    /// A published checkpoint that is whole.
    pub fn read(&self, run: &str, path: &str, manifest_hash: [u8; 32]) -> Option<&Saved> {
        self.0
            .get(&(run.to_owned(), path.to_owned()))
            .filter(|saved| saved.published && !saved.damaged)
            .filter(|saved| saved.manifest_hash == manifest_hash)
    }

    /// Something happens to the newest published checkpoint of a run; false when there is none.
    pub fn damage(&mut self, run: &str) -> bool {
        let published = self
            .0
            .iter_mut()
            .filter(|((of, _), saved)| of == run && saved.published);
        // Paths are in the order of steps.
        let newest = published.last();
        newest.map(|(_, saved)| saved.damaged = true).is_some()
    }

    /// Published checkpoints of a run with their paths.
    pub fn published<'a>(&'a self, run: &'a str) -> impl Iterator<Item = (&'a str, &'a Saved)> {
        self.0
            .iter()
            .filter(move |((of, _), saved)| of == run && saved.published)
            .map(|((_, path), saved)| (path.as_str(), saved))
    }
}
