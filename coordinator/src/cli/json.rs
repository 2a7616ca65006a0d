//! The stable JSON forms that `--json` prints; documented in `docs/cli.md`.
//!
//! Fields are those of the wire messages in snake_case. Hashes are lower-case hexadecimal, states
//! lower-case words, and what is not known yet is `null`.

use serde::Serialize;
use supra_proto::v1;

use super::format::hex;
use crate::goodput::Goodput;

/// One run: an element of `supra runs --json`, and what `status`, `watch`, `cancel` and `resume` print.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Run {
    run: String,
    name: String,
    state: &'static str,
    /// Why it is in this state; `null` when there is nothing to say.
    reason: Option<String>,
    generation: u64,
    world: u32,
    step: u64,
    /// `null` before the data is known.
    steps: Option<u64>,
    tokens: u64,
    budget_tokens: u64,
    /// `null` before the first step, and when the value is not finite; so are the next three.
    loss: Option<f64>,
    grad_norm: Option<f64>,
    learning_rate: Option<f64>,
    exposed_comm_ms: Option<f64>,
    tokens_per_second: f64,
    eta_seconds: Option<f64>,
    skipped_steps: u64,
    submitted_unix_ms: u64,
    ended_unix_ms: Option<u64>,
    checkpoint: Option<Checkpoint>,
    /// Checkpoints that were found damaged and still lie there.
    damaged: Vec<Checkpoint>,
    ledger_head: Option<String>,
    /// Where the wall time went; `null` for a run that is older than accounts of time.
    goodput: Option<Goodput>,
    /// With `checkpoint.every_tokens: auto`, while it trains; else `null`.
    checkpoint_interval: Option<CheckpointInterval>,
    /// With `chaos`, once it has trained; else `null`.
    chaos: Option<Chaos>,
    /// The newest; `null` without `eval`, or before the first, as is the next one.
    evaluation: Option<Evaluation>,
    gates: Option<Gates>,
    /// `null` while the evaluations are too few, and when the run does not train.
    forecast: Option<Forecast>,
}

/// The held-out loss of the state behind a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// 0 = before the first step.
    step: u64,
    tokens: u64,
    generation: u64,
    windows: u64,
    targets: u64,
    /// Per target, natural logarithm; `null` when it is not a number.
    loss: Option<f64>,
    /// exp(loss).
    perplexity: Option<f64>,
}

impl From<&v1::Evaluation> for Evaluation {
    fn from(evaluation: &v1::Evaluation) -> Evaluation {
        let finite = |value: f64| value.is_finite().then_some(value);
        Evaluation {
            step: evaluation.step,
            tokens: evaluation.tokens,
            generation: evaluation.generation,
            windows: evaluation.windows,
            targets: evaluation.targets,
            loss: finite(evaluation.loss),
            perplexity: finite(evaluation.loss.exp()),
        }
    }
}

/// Linearisation gates, and what is wrong with them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gates {
    #[serde(flatten)]
    gates: crate::gates::Gates,
    warnings: Vec<String>,
}

/// The held-out loss at the end of the budget.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    loss: f64,
    low: f64,
    high: f64,
    /// Evaluations that it follows from.
    points: u32,
    /// `eval.target_loss`; `null` without.
    target: Option<f64>,
    /// Even `low` is above it.
    missed: bool,
}

impl From<&v1::Forecast> for Forecast {
    fn from(forecast: &v1::Forecast) -> Forecast {
        Forecast {
            loss: forecast.loss,
            low: forecast.low,
            high: forecast.high,
            points: forecast.points,
            target: forecast.target,
            missed: forecast.missed,
        }
    }
}

/// How long a run trains from one checkpoint to the next.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointInterval {
    seconds: f64,
    reason: String,
}

impl From<&v1::CheckpointInterval> for CheckpointInterval {
    fn from(interval: &v1::CheckpointInterval) -> CheckpointInterval {
        CheckpointInterval {
            seconds: interval.seconds,
            reason: interval.reason.clone(),
        }
    }
}

/// What became of the faults that a run inflicted on its workers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Chaos {
    /// Faults that the recipe asks for.
    faults: u32,
    ordered: u32,
    survived: u32,
    /// `passed` or `failed`; `null` before the end.
    mark: Option<&'static str>,
    text: String,
}

impl From<&v1::Chaos> for Chaos {
    fn from(chaos: &v1::Chaos) -> Chaos {
        Chaos {
            faults: chaos.faults,
            ordered: chaos.ordered,
            survived: chaos.survived,
            mark: match chaos.mark() {
                v1::ChaosMark::Unspecified => None,
                v1::ChaosMark::Passed => Some("passed"),
                v1::ChaosMark::Failed => Some("failed"),
            },
            text: chaos.text.clone(),
        }
    }
}

impl From<&v1::RunStatus> for Run {
    fn from(status: &v1::RunStatus) -> Run {
        let metric = |value: f64| (status.step > 0 && value.is_finite()).then_some(value);
        Run {
            run: status.run.clone(),
            name: status.name.clone(),
            state: state_name(status.state()),
            reason: filled(&status.reason),
            generation: status.generation,
            world: status.world,
            step: status.step,
            steps: (status.steps > 0).then_some(status.steps),
            tokens: status.tokens,
            budget_tokens: status.budget_tokens,
            loss: metric(status.loss),
            grad_norm: metric(status.grad_norm),
            learning_rate: metric(status.learning_rate),
            exposed_comm_ms: metric(status.exposed_comm_ms),
            tokens_per_second: if status.tokens_per_second.is_finite() {
                status.tokens_per_second
            } else {
                0.0
            },
            eta_seconds: (status.eta_seconds.is_finite() && status.eta_seconds >= 0.0)
                .then_some(status.eta_seconds),
            skipped_steps: status.skipped_steps,
            submitted_unix_ms: status.submitted_unix_ms,
            ended_unix_ms: (status.ended_unix_ms > 0).then_some(status.ended_unix_ms),
            checkpoint: status.checkpoint.as_ref().map(Checkpoint::from),
            damaged: status.damaged.iter().map(Checkpoint::from).collect(),
            ledger_head: hash(&status.ledger_head),
            goodput: status.goodput.as_ref().map(Goodput::from),
            checkpoint_interval: status
                .checkpoint_interval
                .as_ref()
                .map(CheckpointInterval::from),
            chaos: status.chaos.as_ref().map(Chaos::from),
            evaluation: status.evaluation.as_ref().map(Evaluation::from),
            gates: status.gates.clone().map(|gates| Gates {
                gates: gates.into(),
                warnings: status.gate_warnings.clone(),
            }),
            forecast: status.forecast.as_ref().map(Forecast::from),
        }
    }
}

/// One journalled checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Checkpoint {
    step: u64,
    tokens: u64,
    generation: u64,
    path: String,
    bytes: u64,
    manifest_hash: Option<String>,
    published: bool,
    verified: bool,
    /// Workers that wrote it; `null` in runs of older builds, as is the next one.
    world: Option<u32>,
    written_unix_ms: Option<u64>,
    /// The name by which it is kept; `null` without one.
    name: Option<String>,
    /// Why it is kept; `null` when it is not.
    kept: Option<String>,
    /// What is wrong with it; `null` when nothing is known to be.
    damaged: Option<String>,
}

impl From<&v1::Checkpoint> for Checkpoint {
    fn from(checkpoint: &v1::Checkpoint) -> Checkpoint {
        Checkpoint {
            step: checkpoint.step,
            tokens: checkpoint.tokens,
            generation: checkpoint.generation,
            path: checkpoint.path.clone(),
            bytes: checkpoint.bytes,
            manifest_hash: hash(&checkpoint.manifest_hash),
            published: checkpoint.published,
            verified: checkpoint.verified,
            world: (checkpoint.world > 0).then_some(checkpoint.world),
            written_unix_ms: (checkpoint.written_unix_ms > 0).then_some(checkpoint.written_unix_ms),
            name: filled(&checkpoint.name),
            kept: filled(&checkpoint.kept),
            damaged: filled(&checkpoint.damaged),
        }
    }
}

/// One worker, attached or gone: an element of `supra workers --json`, and what `drain` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Worker {
    name: String,
    instance: String,
    device: String,
    data_address: String,
    build: String,
    pid: u32,
    phase: String,
    /// The run in which it has a place; `null` when it has none, as has `rank`.
    run: Option<String>,
    rank: Option<u32>,
    step: u64,
    silent_ms: u64,
    /// Why no generation takes it; `null` when one may.
    aside: Option<String>,
}

impl From<&v1::WorkerStatus> for Worker {
    fn from(worker: &v1::WorkerStatus) -> Worker {
        let run = filled(&worker.run);
        Worker {
            name: worker.name.clone(),
            instance: worker.instance.clone(),
            device: worker.device.clone(),
            data_address: worker.data_address.clone(),
            build: worker.build.clone(),
            pid: worker.pid,
            phase: worker.phase.clone(),
            rank: run.is_some().then_some(worker.rank),
            run,
            step: worker.step,
            silent_ms: worker.silent_ms,
            aside: filled(&worker.aside),
        }
    }
}

/// One line of `supra logs --json`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogEntry {
    unix_ms: u64,
    source: String,
    level: String,
    text: String,
}

impl From<&v1::LogEntry> for LogEntry {
    fn from(entry: &v1::LogEntry) -> LogEntry {
        LogEntry {
            unix_ms: entry.unix_ms,
            source: entry.source.clone(),
            level: entry.level.to_lowercase(),
            text: entry.text.clone(),
        }
    }
}

/// The word for a state, in JSON and for people.
pub fn state_name(state: v1::RunState) -> &'static str {
    match state {
        v1::RunState::Unspecified => "unknown",
        v1::RunState::Queued => "queued",
        v1::RunState::Forming => "forming",
        v1::RunState::Training => "training",
        v1::RunState::Stopping => "stopping",
        v1::RunState::Cancelled => "cancelled",
        v1::RunState::Finished => "finished",
        v1::RunState::Failed => "failed",
    }
}

fn filled(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// A hash of nothing yet is empty or all zeros.
fn hash(bytes: &[u8]) -> Option<String> {
    bytes.iter().any(|&byte| byte != 0).then(|| hex(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_null() {
        let status = v1::RunStatus {
            loss: f64::NAN,
            eta_seconds: -1.0,
            ledger_head: vec![0; 32],
            ..v1::RunStatus::default()
        };
        let json = serde_json::to_value(Run::from(&status)).expect("serialises");
        for field in [
            "loss",
            "grad_norm",
            "steps",
            "eta_seconds",
            "ended_unix_ms",
            "checkpoint",
            "ledger_head",
            "reason",
            "goodput",
            "checkpoint_interval",
            "chaos",
            "evaluation",
            "gates",
            "forecast",
        ] {
            assert!(json[field].is_null(), "{field}: {json}");
        }
        assert_eq!(json["state"], "unknown");
    }

    #[test]
    fn a_training_run_keeps_every_field() {
        let status = v1::RunStatus {
            run: "r1".to_owned(),
            state: v1::RunState::Training as i32,
            step: 3,
            steps: 10,
            loss: 2.5,
            exposed_comm_ms: 12.5,
            eta_seconds: 4.0,
            ledger_head: vec![0xab; 32],
            goodput: Some(v1::Goodput {
                productive: 3.0,
                lost: 1.0,
                idle: 100.0,
                ..v1::Goodput::default()
            }),
            checkpoint: Some(v1::Checkpoint {
                step: 2,
                manifest_hash: vec![1, 2],
                ..v1::Checkpoint::default()
            }),
            ..v1::RunStatus::default()
        };
        let json = serde_json::to_value(Run::from(&status)).expect("serialises");
        assert_eq!(json["state"], "training");
        assert_eq!(json["loss"], 2.5);
        assert_eq!(json["exposed_comm_ms"], 12.5);
        assert_eq!(json["steps"], 10);
        assert_eq!(json["ledger_head"], "ab".repeat(32));
        assert_eq!(json["checkpoint"]["manifest_hash"], "0102");
        assert_eq!(json["goodput"]["share"], 0.75);
        assert_eq!(json["goodput"]["idle"], 100.0);
    }

    #[test]
    fn a_rank_needs_a_run() {
        let idle = Worker::from(&v1::WorkerStatus::default());
        assert_eq!((idle.run, idle.rank, idle.aside), (None, None, None));
        let placed = Worker::from(&v1::WorkerStatus {
            run: "r".to_owned(),
            ..v1::WorkerStatus::default()
        });
        assert_eq!(placed.rank, Some(0));
    }
}
