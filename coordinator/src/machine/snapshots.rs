//! Snapshots: states that ranks have divided, as workers hold their parts in memory. A generation may start from one whose
//! every part somebody still holds.

use std::collections::{BTreeMap, BTreeSet};

use supra_proto::v1::{self, Held, Part, PartHolder, SnapshotTaken};

use super::Machine;
use super::ending::Severity;
use super::generation::Stage;
use super::recovery::Holder;
use super::state::{Run, RunNumber};
use super::steps::Unapplied;
use crate::ledger::HASH_BYTES;

/// A state in parts, all of which are held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Divided {
    pub generation: u64,
    pub step: u64,
    /// Hash of each part, and the worker that is to hand it over.
    pub parts: Vec<(Vec<u8>, String)>,
}

impl Divided {
    /// Its name, for the workers.
    pub fn state(&self, run: &Run) -> Held {
        Held {
            run: run.id.clone(),
            generation: self.generation,
            step: self.step,
            ..Held::default()
        }
    }

    /// Whether a worker is to hand over a part.
    pub fn needs(&self, name: &str) -> bool {
        self.parts.iter().any(|(_, holder)| holder == name)
    }

    /// Who hands over each part, by rank. `members` are the names of the workers in rank order.
    pub fn holders(&self, members: &[String]) -> Vec<PartHolder> {
        let holder = |(hash, name): &(Vec<u8>, String)| PartHolder {
            rank: rank_of(name, members),
            hash: hash.clone(),
        };
        self.parts.iter().map(holder).collect()
    }

    /// The workers that hand over parts, for people.
    pub fn names(&self) -> String {
        let names: BTreeSet<&str> = self.parts.iter().map(|(_, name)| name.as_str()).collect();
        names.into_iter().collect::<Vec<_>>().join(", ")
    }
}

fn rank_of(name: &str, members: &[String]) -> u32 {
    let rank = members.iter().position(|member| member == name);
    rank.expect("invariant: whoever hands over a part has a place") as u32
}

/// Parts of one state by index: the hash of each, and who holds it.
type Found<'a> = BTreeMap<u32, (&'a [u8], Vec<&'a str>)>;

/// The newest state whose every part is held, not older than the newest checkpoint.
///
/// # Errors
/// Two workers hold different parts of one state under the same index: one of them is wrong, and nobody knows which.
pub(crate) fn newest(
    run: &Run,
    unapplied: Option<&Unapplied>,
    holders: &[Holder],
) -> Result<Option<Divided>, String> {
    let mut states: BTreeMap<(u64, u64, u32), Found> = BTreeMap::new();
    for (name, held) in holders.iter().filter(|(_, held)| held.run == run.id) {
        let usable = |snapshot: &&v1::Snapshot| usable(run, unapplied, snapshot);
        for snapshot in held.snapshots.iter().filter(usable) {
            let key = (snapshot.step, snapshot.generation, snapshot.of);
            add(states.entry(key).or_default(), name, snapshot)?;
        }
    }
    let whole = |((_, _, of), found): &(&(u64, u64, u32), &Found)| found.len() == *of as usize;
    let newest = states.iter().rev().find(whole);
    Ok(newest.map(|((step, generation, _), found)| Divided {
        generation: *generation,
        step: *step,
        parts: shared_out(found),
    }))
}

fn add<'a>(found: &mut Found<'a>, name: &'a str, snapshot: &'a v1::Snapshot) -> Result<(), String> {
    let sound = |part: &&Part| part.index < snapshot.of && part.hash.len() == HASH_BYTES;
    for part in snapshot.parts.iter().filter(sound) {
        let (hash, names) = found.entry(part.index).or_insert((&part.hash, Vec::new()));
        if *hash != part.hash {
            return Err(format!(
                "workers {} and {name} hold different parts {} of the state behind step {}; `supra resume` goes on from \
                 the newest checkpoint",
                names.join(", "),
                part.index,
                snapshot.step,
            ));
        }
        names.push(name);
    }
    Ok(())
}

/// As few workers as it takes, as far as that is easily seen: who hands over one part is asked for the others that it has.
fn shared_out(found: &Found) -> Vec<(Vec<u8>, String)> {
    let mut asked: BTreeSet<&str> = BTreeSet::new();
    let each = found.values().map(|(hash, names)| {
        let known = names.iter().find(|name| asked.contains(**name));
        let name = *known
            .or(names.iter().min())
            .expect("invariant: whoever has it is there");
        asked.insert(name);
        (hash.to_vec(), name.to_owned())
    });
    each.collect()
}

/// The state is that which the ledger accounts for behind its step, or behind a later one that can still be applied.
fn usable(run: &Run, unapplied: Option<&Unapplied>, snapshot: &v1::Snapshot) -> bool {
    let (generation, step) = (snapshot.generation, snapshot.step);
    // No generation has more ranks; and whoever resumes a run means its checkpoint.
    let ours = (1..=run.workers.max).contains(&snapshot.of) && run.lineage <= run.generation;
    if !ours || step < run.recovery_step() {
        return false;
    }
    if step <= run.step {
        // Later generations than that which trained the step can only have started from it.
        let trained = run.trained_by(step);
        return trained.is_some_and(|trained| (trained..=run.generation).contains(&generation));
    }
    unapplied.is_some_and(|unapplied| {
        let mut steps = unapplied.steps.iter();
        unapplied.run == run.number
            && unapplied.generation == generation
            && steps.any(|(entry, _)| entry.step == step)
    })
}

/// The newest snapshot of a generation, as its ranks tell of it.
#[derive(Debug, Default)]
pub(crate) struct Told {
    step: u64,
    taken: BTreeMap<usize, SnapshotTaken>,
    /// Step of the newest one that all ranks have whole.
    pub whole: Option<u64>,
}

impl Told {
    /// Notes what a rank says; true when with it all `world` ranks have that snapshot.
    ///
    /// # Errors
    /// What a neighbour keeps is not what the rank has.
    fn note(&mut self, rank: usize, world: usize, taken: SnapshotTaken) -> Result<bool, String> {
        if taken.step < self.step {
            return Ok(false);
        }
        if taken.step > self.step {
            (self.step, self.taken) = (taken.step, BTreeMap::new());
        }
        self.taken.insert(rank, taken);
        if self.taken.len() < world || self.whole == Some(self.step) {
            return Ok(false);
        }
        let own: BTreeMap<u32, &Part> = self
            .taken
            .values()
            .filter_map(|taken| taken.own.as_ref())
            .map(|part| (part.index, part))
            .collect();
        for (rank, taken) in &self.taken {
            let kept = taken.kept.as_ref().filter(|kept| {
                let other = taken
                    .own
                    .as_ref()
                    .is_some_and(|own| own.index != kept.index);
                other && own.get(&kept.index) == Some(kept)
            });
            if kept.is_none() {
                return Err(format!(
                    "rank {rank} keeps another rank's part of the state behind step {} which is not what that rank has",
                    self.step
                ));
            }
        }
        self.whole = Some(self.step);
        Ok(true)
    }
}

impl Machine {
    /// A rank has its own part of a state, and a neighbour's, in memory.
    pub(super) fn snapshot_taken(&mut self, rank: usize, number: RunNumber, taken: SnapshotTaken) {
        let Some(generation) = self
            .generation
            .as_mut()
            .filter(|generation| generation.stage == Stage::Training)
        else {
            return;
        };
        let (world, step) = (generation.members.len(), taken.step);
        let first = generation.snapshots.whole.is_none();
        match generation.snapshots.note(rank, world, taken) {
            Ok(true) if first => {
                let text = format!("from step {step} on every part of the state is there twice");
                self.log(Some(number), "INFO", text);
            }
            Ok(_) => {}
            Err(cause) => self.break_up(cause, Severity::Transient, None),
        }
    }
}
