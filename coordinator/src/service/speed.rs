//! The newest metrics of a run, and how fast it goes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use supra_proto::v1::{RunState, RunStatus, StepMetrics};

/// Speed is measured over this time, or over two steps if they take longer.
const WINDOW: Duration = Duration::from_secs(10);

/// What is shown of a run beside the machine's state.
#[derive(Debug, Default)]
pub(super) struct Speed {
    newest: StepMetrics,
    /// When steps were applied, and the tokens after them.
    window: VecDeque<(Instant, u64)>,
}

impl Speed {
    /// A run that trained before this coordinator started.
    pub fn resumed(newest: StepMetrics) -> Speed {
        Speed {
            newest,
            window: VecDeque::new(),
        }
    }

    pub fn measured(&mut self, now: Instant, metrics: &StepMetrics) {
        self.newest = *metrics;
        self.window.push_back((now, metrics.tokens));
        while self.window.len() > 2
            && self
                .window
                .get(1)
                .is_some_and(|(then, _)| now.duration_since(*then) >= WINDOW)
        {
            self.window.pop_front();
        }
    }

    /// A new generation: what comes is not to be averaged with what was.
    pub fn pause(&mut self) {
        self.window.clear();
    }

    /// Fills the metrics into a status.
    pub fn show(&self, status: &mut RunStatus, now: Instant) {
        status.loss = self.newest.loss;
        status.grad_norm = self.newest.grad_norm;
        status.learning_rate = self.newest.learning_rate;
        status.exposed_comm_ms = self.newest.exposed_comm_ms;
        if status.state() != RunState::Training {
            return;
        }
        status.tokens_per_second = self.tokens_per_second(now);
        if status.tokens_per_second > 0.0 {
            status.eta_seconds = status.budget_tokens.saturating_sub(status.tokens) as f64
                / status.tokens_per_second;
        }
    }

    /// Slows down while a step takes longer than those before it.
    fn tokens_per_second(&self, now: Instant) -> f64 {
        let (Some((first, before)), Some((last, after))) =
            (self.window.front(), self.window.back())
        else {
            return 0.0;
        };
        let steps = self.window.len() as u32 - 1;
        if steps == 0 {
            return if self.newest.seconds > 0.0 {
                step_tokens(&self.newest) / self.newest.seconds
            } else {
                0.0
            };
        }
        let span = last.duration_since(*first);
        let overdue = now.duration_since(*last).saturating_sub(span / steps);
        after.saturating_sub(*before) as f64 / (span + overdue).as_secs_f64().max(1e-9)
    }
}

/// Tokens of the first step, which is a full one unless it is also the last.
fn step_tokens(metrics: &StepMetrics) -> f64 {
    metrics.tokens as f64 / metrics.step.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> StepMetrics {
        StepMetrics {
            step,
            tokens: 100 * step,
            seconds: 2.0,
            loss: 1.5,
            ..StepMetrics::default()
        }
    }

    fn shown(speed: &Speed, now: Instant, state: RunState) -> RunStatus {
        let mut status = RunStatus {
            state: state.into(),
            tokens: 500,
            budget_tokens: 1000,
            eta_seconds: -1.0,
            ..RunStatus::default()
        };
        speed.show(&mut status, now);
        status
    }

    #[test]
    fn speed_is_tokens_over_time_and_forgets_the_past() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut speed = Speed::default();
        speed.measured(at(0), &metrics(1));
        assert_eq!(
            shown(&speed, at(0), RunState::Training).tokens_per_second,
            50.0
        );
        for step in 2..=5 {
            speed.measured(at(10 * step), &metrics(step));
        }
        let status = shown(&speed, at(50), RunState::Training);
        assert_eq!(
            (status.tokens_per_second, status.eta_seconds, status.loss),
            (10.0, 50.0, 1.5)
        );
        assert!(
            shown(&speed, at(90), RunState::Training).tokens_per_second < 5.0,
            "a stalled run shows it"
        );
        let stopped = shown(&speed, at(50), RunState::Cancelled);
        assert_eq!(
            (stopped.tokens_per_second, stopped.eta_seconds, stopped.loss),
            (0.0, -1.0, 1.5)
        );
        speed.pause();
        assert_eq!(
            shown(&speed, at(50), RunState::Training).tokens_per_second,
            0.0
        );
    }
}
