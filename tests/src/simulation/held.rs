//! What simulated workers keep in memory when a generation ends: the one place that knows how it is said, and how one
//! starts from it.

use supra_proto::v1::{Assignment, Held, worker_message::Body as Up};

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
    fn held(&self) -> Held {
        Held {
            run: self.run.clone(),
            generation: self.generation,
            step: self.model.step,
            replica_hash: self.model.hash.to_vec(),
        }
    }

    /// It is the state that an assignment names.
    pub fn is(&self, held: &Held) -> bool {
        self.held() == *held
    }
}

/// Says in a Hello or Left what the worker keeps, unless it says so already.
pub(super) fn declare(memory: Option<&Memory>, body: &mut Up) {
    let place = match body {
        Up::Hello(hello) => &mut hello.held,
        Up::Left(left) => &mut left.held,
        _ => return,
    };
    if place.is_none() {
        *place = memory.map(Memory::held);
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
    pub fn of(assignment: &Assignment) -> Option<Start> {
        let held = assignment.held.as_ref()?;
        Some(Start {
            state: held.state.clone()?,
            holder: held.holders.contains(&assignment.rank),
        })
    }
}
