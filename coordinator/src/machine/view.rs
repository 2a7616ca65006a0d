//! What the machine shows to clients. Metrics and speeds are added by the service, which keeps them.

use supra_proto::v1::{self, RunState};

use super::Machine;
use super::generation::Stage;
use super::keeping::{damaged, show};
use super::state::{Run, RunNumber, RunPhase};
use super::worker::{Conn, Worker, phase_name};
use crate::gates::Gates;

/// A run that a client names and that cannot be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// There are no runs at all.
    #[error("there are no runs yet; submit one with `supra submit RECIPE`")]
    Empty,
    /// None begins like this.
    #[error("there is no run {0}; `supra runs` lists them")]
    None(String),
    /// More than one begins like this.
    #[error("{prefix} may be any of {}; write more of it", candidates.join(", "))]
    Many {
        /// What was asked for.
        prefix: String,
        /// What begins with it.
        candidates: Vec<String>,
    },
}

impl Machine {
    /// The run with this id or unique prefix of one; the newest for an empty text.
    ///
    /// # Errors
    /// None or more than one matches.
    pub fn find(&self, prefix: &str) -> Result<RunNumber, FindError> {
        let runs = self.state.runs();
        if prefix.is_empty() {
            return runs.last().map(|run| run.number).ok_or(FindError::Empty);
        }
        if let Some(run) = runs.iter().find(|run| run.id == prefix) {
            return Ok(run.number);
        }
        let matching: Vec<&Run> = runs
            .iter()
            .filter(|run| run.id.starts_with(prefix))
            .collect();
        match matching.as_slice() {
            [] => Err(FindError::None(prefix.to_owned())),
            [run] => Ok(run.number),
            many => Err(FindError::Many {
                prefix: prefix.to_owned(),
                candidates: many.iter().map(|run| run.id.clone()).collect(),
            }),
        }
    }

    /// Status of a run, without metrics.
    pub fn status(&self, number: RunNumber) -> Option<v1::RunStatus> {
        let run = self.state.run(number)?;
        let (state, reason) = self.standing(run);
        let generation = self
            .generation
            .as_ref()
            .filter(|generation| generation.run == number);
        Some(v1::RunStatus {
            run: run.id.clone(),
            name: run.name.clone(),
            state: state.into(),
            reason,
            generation: run.generation,
            world: generation.map_or(0, |generation| generation.members.len() as u32),
            step: run.step,
            steps: run.open.as_ref().map_or(0, |open| open.steps),
            tokens: run.tokens(),
            budget_tokens: run.budget_tokens,
            eta_seconds: -1.0,
            skipped_steps: run.skipped.len() as u64,
            submitted_unix_ms: run.submitted_unix_ms,
            ended_unix_ms: run.ended_unix_ms,
            checkpoint: run.recovery().map(|newest| show(run, newest, None, "")),
            ledger_head: run.ledger.head.to_vec(),
            checkpoint_interval: self.show_interval(number),
            chaos: run.chaos.as_ref().map(v1::Chaos::from),
            evaluation: run.show_evaluation(),
            gates: run.gates.as_ref().map(v1::Gates::from),
            gate_warnings: run.gates.as_ref().map(Gates::warnings).unwrap_or_default(),
            forecast: self.show_forecast(number),
            damaged: damaged(run).collect(),
            broken: run.broken,
            ..v1::RunStatus::default()
        })
    }

    fn standing(&self, run: &Run) -> (RunState, String) {
        match run.phase {
            RunPhase::Cancelled => return (RunState::Cancelled, run.reason.clone()),
            RunPhase::Finished => return (RunState::Finished, run.reason.clone()),
            RunPhase::Failed => return (RunState::Failed, run.reason.clone()),
            RunPhase::Queued => {}
        }
        let stage = self
            .generation
            .as_ref()
            .filter(|generation| generation.run == run.number);
        let absent = || stage.map(|generation| generation.absent_names().join(", "));
        match (stage.map(|generation| generation.stage), &run.stop) {
            (Some(_), Some(reason)) => (RunState::Stopping, reason.clone()),
            (Some(Stage::Training), None) => (RunState::Training, String::new()),
            (Some(Stage::Forming), None) => (
                RunState::Forming,
                format!("generation {} is loading", run.generation),
            ),
            (Some(Stage::Away { .. }), None) => (
                RunState::Forming,
                format!(
                    "the coordinator was restarted; waiting for {} to come back to generation {}",
                    absent().unwrap_or_default(),
                    run.generation
                ),
            ),
            (Some(Stage::Leaving { .. }), None) => (RunState::Forming, run.reason.clone()),
            (None, _) => self.waiting(run),
        }
    }

    /// Why a run without a generation has none.
    fn waiting(&self, run: &Run) -> (RunState, String) {
        let first = self.state.queue.front().copied().unwrap_or(run.number);
        if first != run.number {
            let other = self
                .state
                .run(first)
                .map(|other| other.id.as_str())
                .unwrap_or_default();
            return (RunState::Queued, format!("behind {other}"));
        }
        let why = match &self.generation {
            Some(_) => "the workers are leaving the last run".to_owned(),
            None => {
                let doubt = self.proofs.doubt(run.number);
                doubt.or(self.muster(run).err()).unwrap_or_default()
            }
        };
        let before = if run.reason.is_empty() {
            String::new()
        } else {
            format!(" (before: {})", run.reason)
        };
        (RunState::Forming, format!("{why}{before}"))
    }

    /// Attached workers by name, then those that left, newest first.
    pub fn worker_list(&self) -> Vec<v1::WorkerStatus> {
        let mut attached: Vec<_> = self
            .workers
            .iter()
            .map(|(conn, worker)| self.worker(*conn, worker))
            .collect();
        attached.sort_by(|left, right| left.name.cmp(&right.name));
        let departed = self.departed.iter().rev().map(|worker| v1::WorkerStatus {
            phase: "lost".to_owned(),
            ..self.worker(Conn::MAX, worker)
        });
        attached.into_iter().chain(departed).collect()
    }

    fn worker(&self, conn: Conn, worker: &Worker) -> v1::WorkerStatus {
        let place = self.generation.as_ref().and_then(|generation| {
            let rank = generation.rank(conn)?;
            if generation.members[rank].gone() {
                return None;
            }
            Some((self.state.run(generation.run)?.id.clone(), rank as u32))
        });
        let silent = self.moment.now.saturating_sub(worker.heard);
        let (run, rank) = place.unwrap_or_default();
        v1::WorkerStatus {
            name: worker.hello.name.clone(),
            instance: worker.hello.instance.clone(),
            device: worker.hello.device.clone(),
            data_address: worker.hello.data_address.clone(),
            build: worker.hello.build.clone(),
            pid: worker.hello.pid,
            phase: phase_name(worker.phase).to_owned(),
            run,
            rank,
            step: worker.step,
            silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
            aside: self.why_aside(worker).to_owned(),
        }
    }
}
