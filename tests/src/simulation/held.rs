//! What simulated workers keep in memory when a generation ends, and how one starts from it.

use supra_agent::{Part, PartHolder, Place, Snapshot};
use supra_proto::v1::Held;
use supra_recipes::plan::snapshots::every;
use supra_recipes::schema::Sharding;

use super::ground::Model;

/// State that outlived its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    pub run: String,
    /// All of it, and the generation that trained it.
    pub whole: Option<(u64, Model)>,
    /// Parts of it.
    pub parts: Vec<Parts>,
}

impl Memory {
    /// Its name.
    pub fn held(&self) -> Held {
        let (generation, model) = self.whole.unwrap_or_default();
        Held {
            run: self.run.clone(),
            generation,
            step: model.step,
            replica_hash: self.whole.map_or(Vec::new(), |_| model.hash.to_vec()),
            snapshots: self.parts.iter().map(Parts::name).collect(),
        }
    }

    /// The whole state that an assignment names, whichever generation calls it its own.
    pub fn whole(&self, held: &Held) -> Option<Model> {
        let (_, model) = self.whole?;
        let same = (&self.run, model.step) == (&held.run, held.step)
            && model.hash[..] == held.replica_hash[..];
        same.then_some(model)
    }

    /// The state that an assignment names, if a part of it is here.
    pub fn part(&self, held: &Held, index: u32, hash: &[u8; 32]) -> Option<Model> {
        let named = |parts: &&Parts| {
            parts.is_of(held) && parts.indices.contains(&index) && parts.hash(index) == *hash
        };
        let parts = self.parts.iter().find(named)?;
        (self.run == held.run).then_some(parts.model)
    }
}

/// A rank's own part of a state, and a neighbour's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    pub generation: u64,
    pub model: Model,
    pub of: u32,
    pub indices: [u32; 2],
}

impl Parts {
    pub fn name(&self) -> Snapshot {
        let part = |index: u32| Part {
            index,
            hash: self.hash(index).to_vec(),
        };
        Snapshot {
            generation: self.generation,
            step: self.model.step,
            of: self.of,
            parts: self.indices.map(part).to_vec(),
        }
    }

    fn is_of(&self, held: &Held) -> bool {
        (self.generation, self.model.step) == (held.generation, held.step)
    }

    fn hash(&self, index: u32) -> [u8; 32] {
        let mut bytes = self.model.hash.to_vec();
        bytes.extend([index, self.of].map(u32::to_le_bytes).concat());
        *blake3::hash(&bytes).as_bytes()
    }
}

/// The snapshots of a rank in a generation.
#[derive(Debug)]
pub(super) struct Snapshots {
    every: u64,
    /// Step of the one that was begun last, or that the generation started from.
    pub last: u64,
    /// Oldest first.
    pub whole: Vec<Parts>,
    pub under_way: Option<Parts>,
}

impl Snapshots {
    /// Those of a rank that has loaded the state behind `step`; none where it has all of the state. `before` is what it has
    /// of older ones.
    pub fn of(place: &Place, step: u64, before: Option<Memory>) -> Option<Snapshots> {
        let every = every(&place.recipe, place.world).into();
        let state = place.donation.as_ref().map(|donation| &donation.state);
        let whole = before.map(|memory| memory.parts).unwrap_or_default();
        let kept = |parts: &Parts| state.is_some_and(|state| parts.is_of(state));
        (every > 0).then(|| Snapshots {
            every,
            last: step,
            whole: whole.into_iter().filter(kept).collect(),
            under_way: None,
        })
    }

    pub fn due(&self, step: u64) -> bool {
        step >= self.last + self.every
    }

    pub fn begin(&mut self, place: &Place, model: Model) {
        if self.whole.len() > 1 {
            self.whole.remove(0);
        }
        let before = (place.rank + place.world - 1) % place.world;
        self.last = model.step;
        self.under_way = Some(Parts {
            generation: place.generation,
            model,
            of: place.world,
            indices: [place.rank, before],
        });
    }
}

/// Whether a rank has all of the state.
pub(super) fn has_all(place: &Place) -> bool {
    place.world == 1 || place.recipe.optimizer.sharding == Sharding::None
}

/// The state in memory that a generation is to start from.
#[derive(Clone, Debug)]
pub(super) struct Start {
    pub state: Held,
    /// This rank keeps it; the others get it over the collective.
    pub holder: bool,
    /// Who gives each part of it, where it is in parts.
    pub parts: Vec<PartHolder>,
}

impl Start {
    /// What an assignment says.
    pub fn of(place: &Place) -> Option<Start> {
        let donation = place.donation.as_ref()?;
        Some(Start {
            state: donation.state.clone(),
            holder: donation.holders.contains(&place.rank),
            parts: donation.parts.clone(),
        })
    }
}
