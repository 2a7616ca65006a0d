//! How far a checkpoint has got, from what can be seen of it: its folder, and what the journal says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use supra_checkpoint::{PENDING, PUBLISHED};
use supra_coordinator::journal::Reader;
use supra_coordinator::machine::Run;

use crate::failure::{Failure, Result, While};

/// The phases of a checkpoint, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Its folder is there, without a manifest.
    Files,
    /// It waits for the coordinator: there is a manifest that the journal does not know.
    Pending,
    /// It exists, and waits for its manifest's final name.
    Journalled,
    /// The manifest has that, and the journal does not know it yet.
    Published,
    /// The journal has retired an older one, which is not gone yet.
    Retired,
}

impl Phase {
    pub const ALL: [Phase; 5] = [
        Phase::Files,
        Phase::Pending,
        Phase::Journalled,
        Phase::Published,
        Phase::Retired,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Files => "files",
            Phase::Pending => "pending",
            Phase::Journalled => "journalled",
            Phase::Published => "published",
            Phase::Retired => "retired",
        }
    }
}

/// Who wrote a checkpoint, and of which step: newer ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Origin {
    pub generation: u64,
    pub step: u64,
}

impl Origin {
    /// From the name of a folder.
    fn parse(name: &str) -> Option<Self> {
        let (step, generation) = name.strip_prefix("step-")?.split_once("-gen-")?;
        Some(Self {
            generation: generation.parse().ok()?,
            step: step.parse().ok()?,
        })
    }
}

/// What the folder of a checkpoint has of a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manifest {
    None,
    Pending,
    Published,
}

/// Looks at the checkpoints of a run, by the root of its checkpoints and the coordinator's state.
pub(super) struct Eye {
    root: PathBuf,
    state: PathBuf,
    run: String,
}

impl Eye {
    pub fn new(root: PathBuf, state: PathBuf, run: &str) -> Self {
        let run = run.to_owned();
        Self { root, state, run }
    }

    /// The root of the checkpoints.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What the journal holds of the run.
    pub fn journal(&self) -> Result<Run> {
        let state = Reader::open(&self.state).and_then(|journal| journal.state());
        let state = state.while_doing("reading the journal")?;
        let run = state.runs().iter().find(|run| run.id == self.run);
        run.cloned()
            .ok_or_else(|| Failure::new(format!("the journal has no run {}", self.run)))
    }

    /// The newest checkpoint, and what happens to it now; none when nothing does.
    pub fn look(&self) -> Result<Option<(Origin, Phase)>> {
        let folders = self.folders()?;
        let Some((&newest, &manifest)) = folders.last_key_value() else {
            return Ok(None);
        };
        if manifest == Manifest::None {
            return Ok(Some((newest, Phase::Files)));
        }
        let run = self.journal()?;
        // Those before it are gone, or stay until another coordinator tries again.
        let retired = run.doomed.last().and_then(|path| Origin::parse(path));
        let goes = retired.is_some_and(|retired| folders.contains_key(&retired));
        let known = run.checkpoints.iter();
        let mut known = known.filter(|known| Origin::parse(&known.path) == Some(newest));
        let published = known.next().map(|known| known.published);
        Ok(phase(manifest, published, goes).map(|phase| (newest, phase)))
    }

    fn folders(&self) -> Result<BTreeMap<Origin, Manifest>> {
        let Ok(entries) = fs::read_dir(&self.root) else {
            // Nobody has begun one.
            return Ok(BTreeMap::new());
        };
        let mut folders = BTreeMap::new();
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(origin) = name.and_then(Origin::parse) else {
                continue;
            };
            let manifest = if path.join(PUBLISHED).exists() {
                Manifest::Published
            } else if path.join(PENDING).exists() {
                Manifest::Pending
            } else {
                Manifest::None
            };
            folders.insert(origin, manifest);
        }
        Ok(folders)
    }
}

/// What happens to the newest checkpoint, whose folder has such a manifest; `journal` says whether it is published, and nothing
/// where the journal does not know it. An older one is retired and `goes`.
fn phase(manifest: Manifest, journal: Option<bool>, goes: bool) -> Option<Phase> {
    match (manifest, journal) {
        (Manifest::None, _) => Some(Phase::Files),
        (Manifest::Pending, None) => Some(Phase::Pending),
        (Manifest::Pending, Some(_)) => Some(Phase::Journalled),
        (Manifest::Published, Some(false)) => Some(Phase::Published),
        (Manifest::Published, _) => goes.then_some(Phase::Retired),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_goes_through_every_phase_and_then_none() {
        let way = [
            (Manifest::None, None, false),
            (Manifest::Pending, None, false),
            (Manifest::Pending, Some(false), false),
            (Manifest::Published, Some(false), false),
            (Manifest::Published, Some(true), true),
        ];
        let phases = way.map(|(manifest, journal, goes)| phase(manifest, journal, goes));
        assert_eq!(phases, Phase::ALL.map(Some));
        assert_eq!(phase(Manifest::Published, Some(true), false), None);
    }

    #[test]
    fn later_generations_and_then_later_steps_are_newer() {
        let parse = |name| Origin::parse(name).unwrap();
        assert!(parse("step-00000020-gen-2") > parse("step-00000018-gen-2"));
        assert!(parse("step-00000018-gen-10") > parse("step-00000020-gen-2"));
        assert_eq!(Origin::parse(".probe-gen-2"), None);
    }
}
