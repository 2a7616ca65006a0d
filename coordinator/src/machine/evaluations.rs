//! What ranks measure between steps: the held-out loss, which is a record of the ledger, and linearisation gates.
//!
//! It counts once the ledger accounts for the state that it is of; until then it waits. All ranks say the same, and whoever
//! starts from such a state measures it again: the first word on a step is written down, any other changes nothing.

use std::collections::BTreeMap;

use supra_proto::v1;

use super::fact::Fact;
use super::generation::Stage;
use super::state::{Run, RunNumber};
use super::{Action, Machine};
use crate::forecast::{Forecast, forecast};
use crate::gates::Gates;
use crate::ledger::{Body, Evaluation, loss_bits};

/// What was measured of states, by the steps that they are behind.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    evaluations: BTreeMap<u64, v1::Evaluated>,
    gates: BTreeMap<u64, v1::Gates>,
}

impl Measured {
    /// Takes out what is of states up to `step`.
    pub fn up_to(&mut self, step: u64) -> Measured {
        let later = Measured {
            evaluations: self.evaluations.split_off(&(step + 1)),
            gates: self.gates.split_off(&(step + 1)),
        };
        std::mem::replace(self, later)
    }
}

impl Machine {
    pub(super) fn evaluated(&mut self, number: RunNumber, evaluated: v1::Evaluated) {
        if let Some(generation) = &mut self.generation {
            let evaluations = &mut generation.measured.evaluations;
            evaluations.entry(evaluated.step).or_insert(evaluated);
            self.account_for_measured(number);
        }
    }

    pub(super) fn gated(&mut self, number: RunNumber, gates: v1::Gates) {
        if let Some(generation) = &mut self.generation {
            let known = &mut generation.measured.gates;
            known.entry(gates.step).or_insert(gates);
            self.account_for_measured(number);
        }
    }

    /// Writes down what the generation in hand has measured of states that stand by now.
    pub(super) fn account_for_measured(&mut self, number: RunNumber) {
        let Some(applied) = self.state.run(number).map(|run| run.step) else {
            return;
        };
        let Some(generation) = self
            .generation
            .as_mut()
            .filter(|it| matches!(it.stage, Stage::Training | Stage::Away { .. }))
        else {
            return;
        };
        let (by, due) = (generation.number, generation.measured.up_to(applied));
        self.write_down_measured(number, by, due);
    }

    /// Writes down what generation `by` has measured of states that stand.
    pub(super) fn write_down_measured(&mut self, number: RunNumber, by: u64, measured: Measured) {
        for evaluated in measured.evaluations.into_values() {
            self.write_down_evaluation(number, by, evaluated);
        }
        for gates in measured.gates.into_values() {
            self.write_down_gates(number, gates.into());
        }
    }

    fn write_down_evaluation(&mut self, number: RunNumber, by: u64, evaluated: v1::Evaluated) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let known = |known: &Evaluation| known.step == evaluated.step;
        if run.open.is_none() || run.closed || run.evaluations.iter().any(known) {
            return;
        }
        let missed_before = self.misses_target(number);
        let evaluation = Evaluation {
            generation: by,
            step: evaluated.step,
            windows: evaluated.windows,
            loss_bits: loss_bits(evaluated.loss_sum),
            targets: evaluated.targets,
        };
        self.record(number, Body::Evaluated(evaluation));
        let loss = evaluation.loss();
        let text = format!(
            "held-out loss behind step {}: {loss:.4}, perplexity {:.2}, over {} targets of {} windows",
            evaluation.step,
            loss.exp(),
            evaluation.targets,
            evaluation.windows
        );
        self.log(Some(number), "INFO", text);
        self.stood_still(number, evaluated.seconds);
        if let Some((forecast, target)) = self
            .misses_target(number)
            .filter(|_| missed_before.is_none())
        {
            let text = format!(
                "the held-out loss will not reach eval.target_loss = {target}: {:.4} is to be expected at the end of the budget, \
                 at best {:.4}, by the last {} evaluations",
                forecast.loss, forecast.low, forecast.points
            );
            self.log(Some(number), "WARN", text);
        }
    }

    fn write_down_gates(&mut self, number: RunNumber, gates: Gates) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        if run
            .gates
            .as_ref()
            .is_some_and(|known| known.step >= gates.step)
        {
            return;
        }
        let (step, seconds) = (gates.step, gates.seconds);
        for warning in gates.warnings() {
            self.log(
                Some(number),
                "WARN",
                format!("behind step {step}: {warning}"),
            );
        }
        self.decide(Fact::Gated { run: number, gates });
        self.stood_still(number, seconds);
    }

    fn stood_still(&mut self, run: RunNumber, seconds: f64) {
        self.out.push(Action::StoodStill { run, seconds });
    }

    /// The target of the run in hand.
    fn target_loss(&self, number: RunNumber) -> Option<f64> {
        let generation = self.generation.as_ref();
        generation.filter(|it| it.run == number)?.target_loss
    }

    /// The forecast and the target of the run in hand, if the one says that the other will not be reached.
    fn misses_target(&self, number: RunNumber) -> Option<(Forecast, f64)> {
        let target = self.target_loss(number)?;
        let forecast = self.state.run(number)?.forecast()?;
        forecast.misses(target).then_some((forecast, target))
    }

    /// The forecast of the run in hand.
    pub(super) fn show_forecast(&self, number: RunNumber) -> Option<v1::Forecast> {
        let generation = self.generation.as_ref();
        generation.filter(|it| it.run == number)?;
        let forecast = self.state.run(number)?.forecast()?;
        Some(forecast.show(self.target_loss(number)))
    }
}

impl Run {
    /// What is to be expected of the held-out loss at the end of the budget.
    pub fn forecast(&self) -> Option<Forecast> {
        let open = self.open.as_ref()?;
        let known = self.evaluations.iter();
        let losses = known.map(|known| (open.tokens_after(known.step), known.loss()));
        forecast(losses, open.tokens_after(open.steps))
    }

    /// Puts held-out losses beside the metrics of the steps that they are behind.
    pub fn add_heldout_losses(&self, rows: &mut [v1::StepMetrics]) {
        for row in rows {
            let known = &self.evaluations;
            let found = known.binary_search_by_key(&row.step, |it| it.step);
            row.heldout_loss = found.ok().map(|at| known[at].loss());
        }
    }

    /// The newest evaluation, for clients.
    pub(super) fn show_evaluation(&self) -> Option<v1::Evaluation> {
        let known = self.evaluations.last()?;
        Some(v1::Evaluation {
            step: known.step,
            tokens: self.open.as_ref()?.tokens_after(known.step),
            generation: known.generation,
            windows: known.windows,
            targets: known.targets,
            loss: known.loss(),
        })
    }
}
