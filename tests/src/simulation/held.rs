//! What simulated workers keep in memory when a generation ends, and how one starts from it.

use supra_agent::Place;
use supra_proto::v1::Held;

use super::ground::Model;

/// State that outlived its generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    pub run: String,
    /// Generation that trained it.
    pub generation: u64,
    pub model: Model,
}

impl Memory {
    /// Its name.
    pub fn held(&self) -> Held {
        Held {
            run: self.run.clone(),
            generation: self.generation,
            step: self.model.step,
            replica_hash: self.model.hash.to_vec(),
        }
    }

    /// It is the state that an assignment names, whichever generation calls it its own.
    pub fn is(&self, held: &Held) -> bool {
        (&self.run, self.model.step) == (&held.run, held.step)
            && self.model.hash[..] == held.replica_hash[..]
    }
}

/// The state in memory that a generation is to start from.
#[derive(Clone, Debug)]
pub(super) struct Start {
    pub state: Held,
    /// This rank keeps it; the others get it over the collective.
    pub holder: bool,
}

impl Start {
    /// What an assignment says.
    pub fn of(place: &Place) -> Option<Start> {
        let donation = place.donation.as_ref()?;
        Some(Start {
            state: donation.state.clone(),
            holder: donation.holders.contains(&place.rank),
        })
    }
}
