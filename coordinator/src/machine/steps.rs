//! Steps: what ranks report on them, and how they come into the ledger.
//!
//! A step is applied when all ranks have reported it alike. When a generation ends, some of its ranks may be a step or
//! more further than the ledger: what one of them reports is enough then, since the ranks told each other what they fed.

use supra_proto::v1::{StepMetrics, StepReport};
use supra_recipes::plan::Plan;

use super::ending::Severity;
use super::evaluations::Measured;
use super::generation::{Generation, MAX_AHEAD, Stage};
use super::state::RunNumber;
use super::{Action, Machine, agreement};
use crate::ledger::{Body, Step};

/// Ledger entry and metrics of a step.
pub(crate) type Accounted = (Step, StepMetrics);

/// Steps of a generation that is over which the ledger does not hold: to be applied if a worker still has their outcome.
#[derive(Debug)]
pub(crate) struct Unapplied {
    pub run: RunNumber,
    pub generation: u64,
    /// From the one after the last applied step, without a gap.
    pub steps: Vec<Accounted>,
    /// As of the generation.
    pub verify_steps: u64,
    /// What it measured of states that the ledger does not account for.
    pub measured: Measured,
}

impl Machine {
    pub(super) fn reported(&mut self, rank: usize, number: RunNumber, report: StepReport) {
        let Some(applied) = self.state.run(number).map(|run| run.step) else {
            return;
        };
        let Some(generation) = self.generation.as_mut() else {
            return;
        };
        if report.step <= applied {
            return;
        }
        let most = applied.max(generation.repeated) + MAX_AHEAD;
        if generation.stage.counts() && report.step > most {
            let cause = format!(
                "rank {rank} ({}) reports step {}, but step {} is not complete",
                generation.members[rank].name,
                report.step,
                applied + 1,
            );
            return self.break_up(cause, Severity::Transient, None);
        }
        generation.note(rank, report);
        self.apply_steps(number);
    }

    /// Applies the steps that all ranks have reported, in order.
    pub(super) fn apply_steps(&mut self, number: RunNumber) {
        while let Some((step, result)) = self.next_step(number) {
            let Some(generation) = &self.generation else {
                return;
            };
            let verify_steps = generation.verify_steps;
            let verified = result
                .map_err(|cause| format!("step {step}: {cause}"))
                .and_then(|accounted| {
                    self.verify(number, &accounted)?;
                    Ok(accounted)
                });
            match verified {
                Ok(accounted) => self.apply(number, accounted, verify_steps),
                Err(cause) => return self.break_up(cause, Severity::Fatal, None),
            }
            let Some(generation) = &mut self.generation else {
                return;
            };
            generation.reports.remove(&step);
            self.release(number);
        }
    }

    /// Puts a step into the ledger; `verify_steps` is how many after a checkpoint are logged.
    pub(super) fn apply(&mut self, number: RunNumber, accounted: Accounted, verify_steps: u64) {
        let (entry, metrics) = &accounted;
        if entry.skipped {
            self.log(
                Some(number),
                "WARN",
                format!(
                    "step {} was skipped: loss or gradient was not finite",
                    entry.step
                ),
            );
        }
        self.record(number, Body::Step(entry.clone()));
        self.step_took(metrics.seconds);
        self.log_result(number, &accounted, verify_steps);
        self.recovering(number);
        self.out.push(Action::Measured {
            run: number,
            metrics: accounted.1,
        });
    }

    /// The next step, if all ranks have reported it.
    fn next_step(&self, number: RunNumber) -> Option<(u64, Result<Accounted, String>)> {
        let generation = self
            .generation
            .as_ref()
            .filter(|generation| generation.stage == Stage::Training)?;
        let plan = generation.plan.as_ref()?;
        let step = self.state.run(number)?.step + 1;
        if !generation.complete(step) {
            return None;
        }
        Some((step, generation.account(step, plan).transpose()?))
    }
}

impl Generation {
    /// The steps after `applied` that are accounted for, by whoever lived to report them; or why the reports on one of
    /// them do not add up.
    pub(super) fn unapplied(&self, applied: u64) -> Result<Unapplied, String> {
        let mut steps = Vec::new();
        if let Some(plan) = &self.plan {
            for step in applied + 1.. {
                let accounted = self.account(step, plan);
                match accounted.map_err(|cause| format!("step {step}: {cause}"))? {
                    Some(accounted) => steps.push(accounted),
                    None => break,
                }
            }
        }
        Ok(Unapplied {
            run: self.run,
            generation: self.number,
            steps,
            verify_steps: self.verify_steps,
            measured: self.measured.clone(),
        })
    }

    /// A step's ledger entry and metrics, or why the reports on it do not add up; none while they do not account for all
    /// that was fed.
    fn account(&self, step: u64, plan: &Plan) -> Result<Option<Accounted>, String> {
        let said = self.reported(step);
        let Some((_, _, first)) = said.first() else {
            return Ok(None);
        };
        let Some(digest) = agreement::step(&said, self.members.len(), step, plan)? else {
            return Ok(None);
        };
        let slowest = |seconds: fn(&StepReport) -> f64| {
            said.iter()
                .map(|(_, _, report)| seconds(report))
                .fold(0.0, f64::max)
        };
        let entry = Step {
            generation: self.number,
            step,
            first_sample: first.first_sample,
            samples: first.samples,
            digest: *digest.as_bytes(),
            skipped: first.skipped,
        };
        let metrics = StepMetrics {
            step,
            tokens: plan.tokens_after(step),
            loss: first.loss_sum / first.targets as f64,
            grad_norm: first.grad_norm,
            learning_rate: first.learning_rate,
            skipped: first.skipped,
            seconds: slowest(|report| report.seconds),
            data_seconds: slowest(|report| report.data_seconds),
            exposed_comm_ms: slowest(|report| report.exposed_comm_ms),
            generation: self.number,
            heldout_loss: None,
        };
        Ok(Some((entry, metrics)))
    }
}
