//! Why training stops before its end, and who has to act.

use supra_agent::{CollectiveError, FaultKind, Held, Voided};
use supra_checkpoint::StoredError;
use supra_data::DataError;
use supra_recipes::{
    PlanError,
    plan::{Memory, Policy, memory::gib},
};
use thiserror::Error;

use super::micro::LayoutError;
use crate::{
    checkpoint::{CheckpointError, probe::ProbeError},
    collective::DeviceCollectiveError,
    kernels::KernelError,
    model::ModelError,
    step::StepError,
};

/// Anything that ends a generation from inside the training loop.
#[derive(Debug, Error)]
pub enum TrainError {
    /// The coordinator has ended the generation.
    #[error(transparent)]
    Void(#[from] Voided),
    /// A peer is gone.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The ranks' devices cannot work together.
    #[error(transparent)]
    Devices(#[from] DeviceCollectiveError),
    /// The dataset cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The dataset does not hold the budget.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Samples cannot be laid out for the device.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The base cannot be read or is not what the recipe needs.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A checkpoint cannot be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The GPU's kernels cannot be compiled, loaded or launched.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The step does not fit the GPU. Nothing has been allocated.
    #[error(
        "the GPU has {} free, and training takes {}. Lower batch.micro_batch (it is {micro_batch}) or \
         batch.sequence_length{}, or take a GPU with more memory; `supra plan` shows what fits",
        gib(*.free), .smallest, remedy(.smallest.policy)
    )]
    NoRoom {
        /// Bytes that were free.
        free: u64,
        /// The plan that takes least, of those that the recipe allows.
        smallest: Box<Memory>,
        /// Samples of a micro-batch.
        micro_batch: u32,
    },
    /// This rank does not keep what the generation was to start from.
    #[error(
        "rank {rank} was to keep step {} of generation {}, but holds {}",
        asked.step, asked.generation, holds(found.as_deref())
    )]
    NotKept {
        /// This rank.
        rank: u32,
        /// What the coordinator takes it to have.
        asked: Box<Held>,
        /// What it has.
        found: Option<Box<Held>>,
    },
    /// Recipe, data, base or checkpoint do not fit each other.
    #[error("{0}")]
    Mismatch(String),
    /// Loss or gradient was not finite too often.
    #[error(
        "loss or gradient was not finite in {steps} steps in a row, up to step {step} (loss sum {loss_sum} over \
         {targets} targets, gradient norm {grad_norm}). Look for broken samples or weights, or lower optimizer.lr; \
         documents of one token have no targets; nonfinite.max allows more"
    )]
    Diverged {
        /// Skipped steps in a row.
        steps: u32,
        /// The last one.
        step: u64,
        /// Its loss.
        loss_sum: f64,
        /// What the loss is summed over.
        targets: u64,
        /// Its gradient norm.
        grad_norm: f64,
    },
    /// A device computes wrong.
    #[error("{}", hardware(.culprits))]
    Hardware {
        /// Ranks whose results were not finite where another rank had finite ones from the same samples; none when the fault
        /// did not show again.
        culprits: Vec<u32>,
    },
    /// Parts of the state do not get from rank to rank any more.
    #[error("while a snapshot was passed on: {0}")]
    Snapshot(#[source] CollectiveError),
    /// This host has not as much memory as snapshots take. Nothing has been allocated.
    #[error(
        "snapshots take {} of this host's memory for each worker, and {} are available. Write \
         recovery.snapshot_every: 0 (then a death costs the steps since the last checkpoint), or train with more workers; \
         `supra plan` shows what they take", gib(*.planned), gib(*.available)
    )]
    NoHostRoom {
        /// Bytes that snapshots take.
        planned: u64,
        /// Bytes that are available.
        available: u64,
    },
    /// The system has no thread for snapshots.
    #[error("cannot start the thread that passes snapshots on: {0}")]
    Thread(std::io::Error),
    /// The thread that reads samples ahead is gone.
    #[error("the reader of the training data ended before step {step}")]
    NoBatch {
        /// The step that has no batch.
        step: u64,
    },
}

impl TrainError {
    /// The one rank whose device is at fault.
    pub fn culprit(&self) -> Option<u32> {
        match self {
            TrainError::Hardware { culprits } => match culprits[..] {
                [rank] => Some(rank),
                _ => None,
            },
            _ => None,
        }
    }

    /// Who has to act.
    pub fn fault_kind(&self) -> FaultKind {
        match self {
            TrainError::Collective(_)
            | TrainError::Snapshot(_)
            | TrainError::Devices(DeviceCollectiveError::Host(_)) => FaultKind::Peer,
            TrainError::Void(_)
            | TrainError::Devices(_)
            | TrainError::Kernel(_)
            | TrainError::Layout(LayoutError::Memory(_))
            | TrainError::NotKept { .. }
            | TrainError::Thread(_)
            | TrainError::NoBatch { .. } => FaultKind::Transient,
            TrainError::Hardware { .. } => FaultKind::Hardware,
            TrainError::Checkpoint(error) => error.fault_kind(),
            TrainError::Data(_)
            | TrainError::Plan(_)
            | TrainError::Model(_)
            | TrainError::Layout(LayoutError::Token { .. })
            | TrainError::NoRoom { .. }
            | TrainError::NoHostRoom { .. }
            | TrainError::Mismatch(_) => FaultKind::Input,
            TrainError::Diverged { .. } => FaultKind::Diverged,
        }
    }
}

/// What a device that computes wrong did.
fn hardware(culprits: &[u32]) -> String {
    let check = "check the GPU's error counters (`nvidia-smi -q -d ECC`), temperature and memory before it trains again";
    match culprits {
        [] => "loss or gradient was not finite, and is finite when the same samples are fed again, by the same ranks and by \
               others: a device or a link erred once, and nobody knows which"
            .to_owned(),
        [rank] => format!(
            "rank {rank} computed a loss or gradient that is not finite, and another rank finite ones from the same samples: \
             its device is at fault; {check}"
        ),
        ranks => format!(
            "ranks {ranks:?} computed losses or gradients that are not finite, and other ranks finite ones from the same \
             samples: more than one device is at fault; {check}"
        ),
    }
}

/// What a rank has in memory.
fn holds(found: Option<&Held>) -> String {
    let Some(Held {
        run,
        generation,
        step,
        replica_hash,
        snapshots,
    }) = found
    else {
        return "nothing".to_owned();
    };
    if !snapshots.is_empty() {
        let each = snapshots.iter().map(|snapshot| {
            let parts: Vec<String> = snapshot
                .parts
                .iter()
                .map(|part| part.index.to_string())
                .collect();
            format!(
                "parts {} of {} of step {} of generation {}",
                parts.join(" and "),
                snapshot.of,
                snapshot.step,
                snapshot.generation
            )
        });
        return each.collect::<Vec<_>>().join(", ");
    }
    let hash: String = replica_hash[..4]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!(
        "step {step} of generation {generation} of run {run}, with a hash that begins with {hash}"
    )
}

/// What else helps where not everything is recomputed yet.
fn remedy(policy: Policy) -> &'static str {
    match policy {
        Policy::Recompute => "",
        Policy::Lean | Policy::Save => ", write batch.activations: auto",
    }
}

impl From<StepError> for TrainError {
    fn from(error: StepError) -> TrainError {
        match error {
            StepError::Stopped => Voided.into(),
            StepError::Exchange(error) => TrainError::Devices(error),
            StepError::Kernel(error) => TrainError::Kernel(error),
        }
    }
}

impl From<StoredError> for TrainError {
    fn from(error: StoredError) -> TrainError {
        TrainError::Checkpoint(error.into())
    }
}

impl From<ProbeError> for TrainError {
    fn from(error: ProbeError) -> TrainError {
        match error {
            ProbeError::Store(error) => error.into(),
            ProbeError::Collective(error) => error.into(),
        }
    }
}
