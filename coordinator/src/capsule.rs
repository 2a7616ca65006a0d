//! The capsule of a run: all that is known of it beside its weights, in one file or folder that goes anywhere.
//!
//! | member | what it is |
//! |---|---|
//! | `recipe.yaml` | the recipe with every default resolved, as the run has it |
//! | `submitted.yaml` | the recipe as its author wrote it |
//! | `versions.json` | builds, commits, libtorch, NCCL, devices and threads, as its checkpoints say |
//! | `data/train.json`, `data/heldout.json` | the manifests of its datasets |
//! | `base.json` | size and hash of every file of the base model |
//! | `ledger.jsonl` | the ledger, a record a line |
//! | `metrics.csv` | what is kept of loss, gradient norm and times, a step a line |
//! | `journal.jsonl` | what the coordinator decided about the run, a fact a line |
//! | `incidents.json` | generations that ended before the run did |
//! | `receipt.json` | what became of it |
//! | `checkpoints/DIRECTORY/manifest.json` | the manifests of the checkpoints that there are |
//!
//! [`Index`] names every member with its hash, and what is missing with the reason. The same run gives the same bytes.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use supra_checkpoint::seal;

use crate::journal::JournalError;
use crate::ledger::{Hash, Record, RecordError, Tail, hex32, lines};

mod archive;
mod base;
mod gather;
mod metrics;
mod versions;

pub use base::{BaseFile, BaseHash};
pub use gather::{gather, submitted};
pub use metrics::Numbers;
pub use versions::{Environment, Versions};

/// Version of the form: grows when a member changes its meaning or goes. Since 2 the index has a hash.
pub const FORMAT: u32 = 2;

/// The member that names the others.
pub const INDEX: &str = "index.json";

/// The resolved recipe.
pub const RECIPE: &str = "recipe.yaml";
/// The recipe as it was submitted.
pub const SUBMITTED: &str = "submitted.yaml";
/// What the run was computed with.
pub const VERSIONS: &str = "versions.json";
/// The manifest of the training data.
pub const TRAIN: &str = "data/train.json";
/// The manifest of the held-out data.
pub const HELDOUT: &str = "data/heldout.json";
/// The files of the base model.
pub const BASE: &str = "base.json";
/// The ledger.
pub const LEDGER: &str = supra_checkpoint::LEDGER;
/// Numbers of the steps.
pub const METRICS: &str = "metrics.csv";
/// Decided facts.
pub const JOURNAL: &str = "journal.jsonl";
/// Generations that ended early.
pub const INCIDENTS: &str = "incidents.json";
/// The receipt.
pub const RECEIPT: &str = "receipt.json";
/// The format of receipts since which they have a hash.
pub const SEALED_RECEIPT: u32 = 2;

/// A capsule cannot be packed, written or read.
#[derive(Debug, thiserror::Error)]
pub enum CapsuleError {
    /// The system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Something is there already.
    #[error("{} exists: nothing is overwritten. Name another place with --out, or remove it", .0.display())]
    Taken(PathBuf),
    /// It is no capsule, or not as it was packed.
    #[error("{}: {problem}. Get it again, or pack the run again with `supra capsule`", path.display())]
    Damaged {
        /// File or directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A later version.
    #[error("{} is a capsule of format {found}, this program reads formats 1 to {FORMAT}: take a newer one", path.display())]
    Newer {
        /// File or directory.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The metrics cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Telemetry {
        /// The file.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The ledger cannot be read: only an audit says where it is broken.
    #[error("the ledger is damaged: {0}. `supra audit` says more")]
    Ledger(#[from] RecordError),
    /// The journal has no such run.
    #[error("the journal holds no run {0}")]
    NoRun(u32),
}

/// The member that names the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// [`FORMAT`].
    pub format: u32,
    /// Id of the run.
    pub run: String,
    /// Name of its recipe.
    pub name: String,
    /// Head of its ledger, hexadecimal.
    #[serde(with = "hex32")]
    pub ledger_head: Hash,
    /// Records of its ledger.
    pub ledger_records: u64,
    /// Every other member by name.
    pub members: BTreeMap<String, Member>,
    /// What the capsule lacks, and why.
    pub missing: BTreeMap<String, String>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Length in bytes.
    pub bytes: u64,
    /// BLAKE3, hexadecimal.
    pub blake3: String,
}

impl Member {
    fn of(bytes: &[u8]) -> Member {
        Member {
            bytes: bytes.len() as u64,
            blake3: blake3::hash(bytes).to_string(),
        }
    }
}

/// A capsule in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capsule {
    index: Index,
    /// Those that the index names, and no others.
    members: BTreeMap<String, Vec<u8>>,
}

impl Capsule {
    /// A capsule of these members.
    pub fn new(
        (run, name): (&str, &str),
        ledger: &Tail,
        members: BTreeMap<String, Vec<u8>>,
        missing: BTreeMap<String, String>,
    ) -> Capsule {
        let listed = members
            .iter()
            .map(|(name, bytes)| (name.clone(), Member::of(bytes)));
        Capsule {
            index: Index {
                format: FORMAT,
                run: run.to_owned(),
                name: name.to_owned(),
                ledger_head: ledger.head,
                ledger_records: ledger.length,
                members: listed.collect(),
                missing,
            },
            members,
        }
    }

    /// What it holds.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// A member's bytes.
    pub fn member(&self, name: &str) -> Option<&[u8]> {
        self.members.get(name).map(Vec::as_slice)
    }

    /// The records of the ledger, in order.
    ///
    /// # Errors
    /// A line that is no record.
    pub fn ledger(&self) -> Result<Vec<Record>, CapsuleError> {
        let records = lines::parse(self.member(LEDGER).unwrap_or_default());
        records.map_err(|problem| CapsuleError::Damaged {
            path: LEDGER.into(),
            problem,
        })
    }

    /// Members by name, in order.
    pub fn members(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let members = self.members.iter();
        members.map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// The index and the members as they were found at `path`: what the index says has to be so.
    ///
    /// # Errors
    /// A member that is missing, altered or not named; an index that is none, or of a later version.
    pub fn checked(
        path: &Path,
        index: &[u8],
        members: BTreeMap<String, Vec<u8>>,
    ) -> Result<Capsule, CapsuleError> {
        let damaged = |problem: String| CapsuleError::Damaged {
            path: path.to_owned(),
            problem,
        };
        // The format first: a later one may have other fields.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let no_index = |error| damaged(format!("{INDEX} is not that of a capsule: {error}"));
        let Format { format } = serde_json::from_slice(index).map_err(no_index)?;
        if !(1..=FORMAT).contains(&format) {
            return Err(CapsuleError::Newer {
                path: path.to_owned(),
                found: format,
            });
        }
        let altered = |problem| damaged(format!("{INDEX}: {problem}"));
        seal::check(index, FORMAT).map_err(altered)?;
        let index: Index = serde_json::from_slice(index).map_err(no_index)?;
        for (name, member) in &index.members {
            match members.get(name) {
                None => return Err(damaged(format!("{name} is missing"))),
                Some(bytes) if Member::of(bytes) != *member => {
                    let cause = format!("{name} is not what was packed: its BLAKE3 differs");
                    return Err(damaged(cause));
                }
                Some(_) => {}
            }
        }
        if let Some(other) = members
            .keys()
            .find(|name| !index.members.contains_key(*name))
        {
            return Err(damaged(format!("{other:?} does not belong to it")));
        }
        Ok(Capsule { index, members })
    }

    /// The bytes of the index.
    fn index_bytes(&self) -> Vec<u8> {
        seal::seal(&self.index)
    }
}

/// A member lies below the place that a capsule is unpacked to.
fn plain(name: &Path) -> bool {
    let mut parts = name.components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests;
