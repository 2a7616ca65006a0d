//! `receipt.json`: what a run was and what became of it, beside its checkpoints, for whoever finds them later.
//!
//! Written by the coordinator whenever the run ends, and replaced when it was resumed and ends again. It says what the
//! journal says; the ledger's head in it lets an audit prove that the journal is that of these checkpoints. Its last member is the
//! hash of all before ([`seal`]).

use serde::Serialize;
use supra_checkpoint::{Store, StoredError, seal};
use supra_proto::v1;
use tokio::task::JoinSet;

use super::accounts::Accounts;
use crate::chaos::Ordeal;
use crate::goodput::{Account, Goodput, Incident};
use crate::interval::Experience;
use crate::ledger::hex;
use crate::machine::{Damaged, Run, RunNumber, RunPhase, State};

/// Version of the receipt's form: grows when a field changes its meaning or goes. Since 2 it is sealed.
const FORMAT: u32 = 2;

const FILE: &str = "receipt.json";

/// The receipt of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Receipt {
    format: u32,
    run: String,
    name: String,
    /// `finished`, `cancelled` or `failed`.
    outcome: RunPhase,
    /// Why it ended; empty when it finished.
    reason: String,
    /// Version and commit of the coordinator that saw it end.
    build: String,
    /// BLAKE3 of the resolved recipe's YAML, hexadecimal.
    recipe_hash: String,
    /// BLAKE3 of the training data's manifest; `null` when it never formed.
    manifest_hash: Option<String>,
    /// Tokens behind the weights, and of the whole samples of the budget.
    tokens: u64,
    budget_tokens: u64,
    /// Steps behind the weights, of the whole budget (`null` when it never formed), and those whose update was skipped.
    step: u64,
    steps: Option<u64>,
    skipped_steps: Vec<u64>,
    generations: u64,
    /// Head of the ledger, hexadecimal, and its number of records.
    ledger_head: String,
    ledger_records: u64,
    /// The newest held-out loss; `null` where none was measured.
    heldout: Option<Heldout>,
    /// Where the run can go on, or what it made; `null` before the first.
    checkpoint: Option<Checkpoint>,
    /// Checkpoints that were found damaged and not deleted since, as they were found.
    damaged_checkpoints: Vec<DamagedCheckpoint>,
    /// Milliseconds since the Unix epoch, as is the next.
    submitted_unix_ms: u64,
    ended_unix_ms: u64,
    /// Where the time went; `null` for a run that is older than accounts of time.
    goodput: Option<Goodput>,
    /// How many generations ended before the run did, and the newest of these, oldest first.
    incident_count: u64,
    incidents: Vec<Incident>,
    /// What the interval of `checkpoint.every_tokens: auto` was decided from; `null` where the recipe named one.
    checkpoint_experience: Option<Experience>,
    /// What became of the faults that the recipe ordered; `null` without `chaos`.
    chaos: Option<Chaos>,
}

/// The faults of a run with `chaos`.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Chaos {
    /// As `supra status` shows it.
    text: String,
    #[serde(flatten)]
    ordeal: Ordeal,
}

/// The loss on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Heldout {
    /// Step that the state is behind.
    step: u64,
    /// Per target, natural logarithm; `null` when it is not a number.
    loss: Option<f64>,
    windows: u64,
    targets: u64,
}

/// The newest checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Checkpoint {
    step: u64,
    /// Relative to the receipt.
    path: String,
    /// BLAKE3 of its manifest, hexadecimal.
    manifest_hash: String,
    published: bool,
}

/// A checkpoint that nothing starts from any more.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct DamagedCheckpoint {
    step: u64,
    /// Relative to the receipt.
    path: String,
    /// File and cause, in one line.
    problem: String,
}

impl Receipt {
    /// The receipt of a run that has ended.
    fn new(run: &Run, account: Option<&Account>, build: &str) -> Receipt {
        let goodput = account.map(|account| v1::Goodput::from(account.parts(run.ended_unix_ms)));
        let (incident_count, incidents) = account.map_or((0, Vec::new()), |account| {
            let (count, newest) = account.incidents();
            (count, newest.cloned().collect())
        });
        Receipt {
            format: FORMAT,
            run: run.id.clone(),
            name: run.name.clone(),
            outcome: run.phase,
            reason: run.reason.clone(),
            build: build.to_owned(),
            recipe_hash: blake3::hash(run.recipe.as_bytes()).to_string(),
            manifest_hash: run.open.as_ref().map(|open| hex(&open.manifest_hash)),
            tokens: run.tokens(),
            budget_tokens: run.budget_tokens,
            step: run.step,
            steps: run.open.as_ref().map(|open| open.steps),
            skipped_steps: run.skipped.iter().copied().collect(),
            generations: run.generation,
            ledger_head: hex(&run.ledger.head),
            ledger_records: run.ledger.length,
            heldout: run.evaluations.last().map(|known| Heldout {
                step: known.step,
                loss: Some(known.loss()).filter(|loss| loss.is_finite()),
                windows: known.windows,
                targets: known.targets,
            }),
            checkpoint: run.recovery().map(|known| Checkpoint {
                step: known.step,
                path: known.path.clone(),
                manifest_hash: hex(&known.manifest_hash),
                published: known.published,
            }),
            damaged_checkpoints: run.damaged.iter().map(DamagedCheckpoint::from).collect(),
            submitted_unix_ms: run.submitted_unix_ms,
            ended_unix_ms: run.ended_unix_ms,
            goodput: goodput.as_ref().map(Goodput::from),
            incident_count,
            incidents,
            checkpoint_experience: (run.experience.worker_ms > 0).then(|| run.experience.clone()),
            chaos: run.chaos.clone().map(|ordeal| Chaos {
                text: ordeal.line(),
                ordeal,
            }),
        }
    }

    /// Writes it into a run's checkpoint root, which is made when it is not there: whole, or not at all.
    ///
    /// # Errors
    /// The store's.
    fn write(&self, root: &str) -> Result<(), StoredError> {
        Store::open(root)?.replace(FILE, &seal::seal(self))
    }
}

impl From<&Damaged> for DamagedCheckpoint {
    fn from(damaged: &Damaged) -> DamagedCheckpoint {
        DamagedCheckpoint {
            step: damaged.checkpoint.step,
            path: damaged.checkpoint.path.clone(),
            problem: damaged.problem.clone(),
        }
    }
}

/// The receipts that a coordinator writes.
#[derive(Debug)]
pub(super) struct Receipts {
    build: String,
    /// Runs that have ended.
    owed: Vec<RunNumber>,
    writing: JoinSet<()>,
}

impl Receipts {
    pub fn new(build: String) -> Receipts {
        Receipts {
            build,
            owed: Vec::new(),
            writing: JoinSet::new(),
        }
    }

    /// A run has ended.
    pub fn owe(&mut self, run: RunNumber) {
        self.owed.push(run);
    }

    /// Writes what is owed, in the background: the store may be slow.
    pub fn hand_out(&mut self, state: &State, accounts: &Accounts) {
        while self.writing.try_join_next().is_some() {}
        for number in std::mem::take(&mut self.owed) {
            let Some(run) = state.run(number) else {
                continue;
            };
            let receipt = Receipt::new(run, accounts.of(number), &self.build);
            let root = run.checkpoint_root.display().to_string();
            self.writing.spawn_blocking(move || {
                if let Err(error) = receipt.write(&root) {
                    tracing::warn!("cannot write a receipt to {root}: {error}");
                }
            });
        }
    }

    /// Ready when none is being written any more.
    pub async fn written(&mut self) {
        while self.writing.join_next().await.is_some() {}
    }
}
