//! Live progress of a run: a bar over the token budget on a terminal, else a plain line now and then.

use std::io::{IsTerminal, stdout};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use supra_proto::v1::{ChaosMark, RunState, RunStatus};

use super::failure::{Exit, Failure};
use super::{format, json, out};

/// Pause between two plain lines while nothing but the numbers changes.
const PLAIN_PAUSE: Duration = Duration::from_secs(5);

/// How progress is shown.
pub enum Progress {
    /// A bar that is redrawn in place, on a terminal.
    Bar(ProgressBar),
    /// Lines, for files and pipes.
    Plain(Plain),
    /// One JSON document a line, at every change.
    Json,
}

/// What the last plain line said.
#[derive(Default)]
pub struct Plain {
    state: RunState,
    said: Option<Instant>,
}

impl Progress {
    /// A bar on a terminal, else plain lines; JSON lines when asked for.
    pub fn new(json: bool) -> Progress {
        if json {
            Progress::Json
        } else if stdout().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            let style = ProgressStyle::with_template("{wide_bar} {percent:>3} %\n{msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            Progress::Bar(bar)
        } else {
            Progress::Plain(Plain::default())
        }
    }

    /// Shows a status.
    ///
    /// # Errors
    /// [`Failure::Closed`] when nobody reads any more.
    pub fn show(&mut self, status: &RunStatus) -> Result<(), Failure> {
        match self {
            Progress::Bar(bar) => {
                bar.set_length(status.budget_tokens.max(1));
                bar.set_position(status.tokens);
                bar.set_message(summary(status));
                Ok(())
            }
            Progress::Plain(plain) => plain.show(status, Instant::now()),
            Progress::Json => out::json_line(&json::Run::from(status)),
        }
    }

    /// Says a line without tearing the bar. JSON output stays JSON: there the line goes to stderr.
    ///
    /// # Errors
    /// [`Failure::Closed`] when nobody reads any more.
    pub fn say(&self, text: &str) -> Result<(), Failure> {
        match self {
            Progress::Bar(bar) => bar.suspend(|| out::line(text)),
            Progress::Plain(_) => out::line(text),
            Progress::Json => {
                out::complain(text);
                Ok(())
            }
        }
    }

    /// Removes the bar and says how the run ended.
    ///
    /// # Errors
    /// [`Failure::Closed`] when nobody reads any more.
    pub fn end(&self, status: &RunStatus) -> Result<(), Failure> {
        match self {
            Progress::Bar(bar) => {
                bar.finish_and_clear();
                out::text(&ending(status))
            }
            Progress::Plain(_) => out::text(&ending(status)),
            Progress::Json => Ok(()),
        }
    }

    /// Removes the bar, for a display that ends before the run.
    pub fn leave(&self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

impl Plain {
    fn show(&mut self, status: &RunStatus, now: Instant) -> Result<(), Failure> {
        let due = self
            .said
            .is_none_or(|said| now.duration_since(said) >= PLAIN_PAUSE);
        if due || self.state != status.state() {
            self.state = status.state();
            self.said = Some(now);
            out::line(&format!("{} {}", percent(status), summary(status)))?;
        }
        Ok(())
    }
}

/// Whether the run is over: nothing more will happen to it unless it is resumed.
pub fn ended(status: &RunStatus) -> bool {
    matches!(
        status.state(),
        RunState::Cancelled | RunState::Finished | RunState::Failed
    )
}

/// The exit code of a command that waited for the end of a run.
pub fn exit(status: &RunStatus) -> Exit {
    if chaos_failed(status) || status.broken {
        return Exit::Broken;
    }
    match status.state() {
        RunState::Finished => Exit::Done,
        RunState::Cancelled => Exit::Stopped,
        _ => Exit::Failed,
    }
}

/// The run did not stand the faults that its recipe ordered.
fn chaos_failed(status: &RunStatus) -> bool {
    let chaos = status.chaos.as_ref();
    chaos.is_some_and(|chaos| chaos.mark() == ChaosMark::Failed)
}

/// `training  step 120/477  1.5 M/30 M tokens  loss 2.3456  12.3 k tok/s  ETA 3 min 5 s  2 workers`
pub fn summary(status: &RunStatus) -> String {
    let mut parts = vec![json::state_name(status.state()).to_owned()];
    if status.step > 0 || status.steps > 0 {
        parts.push(match status.steps {
            0 => format!("step {}", format::grouped(status.step)),
            steps => format!(
                "step {}/{}",
                format::grouped(status.step),
                format::grouped(steps)
            ),
        });
    }
    if status.budget_tokens > 0 {
        let (done, budget) = (
            format::short(status.tokens as f64),
            format::tokens(status.budget_tokens),
        );
        parts.push(format!("{done} of {budget}"));
    }
    if status.step > 0 {
        parts.push(format!("loss {}", format::metric(status.loss)));
    }
    if let Some(evaluation) = &status.evaluation {
        parts.push(format!("held-out {}", format::metric(evaluation.loss)));
    }
    if status.state() == RunState::Training && status.tokens_per_second > 0.0 {
        parts.push(format::rate(status.tokens_per_second));
        parts.push(format!("ETA {}", format::duration(status.eta_seconds)));
    }
    if status.world > 0 && !ended(status) {
        parts.push(format::counted(u64::from(status.world), "worker"));
    }
    if status.skipped_steps > 0 {
        parts.push(format!("{} skipped", format::grouped(status.skipped_steps)));
    }
    if let Some(chaos) = status.chaos.as_ref().filter(|_| !ended(status)) {
        parts.push(format!("chaos {}/{}", chaos.ordered, chaos.faults));
    }
    if !status.reason.is_empty() {
        parts.push(status.reason.clone());
    }
    parts.join("  ")
}

/// Share of the budget that is trained, `  4.2%`.
fn percent(status: &RunStatus) -> String {
    let share = status.tokens as f64 / status.budget_tokens.max(1) as f64;
    format!("{:5.1}%", 100.0 * share)
}

/// A few lines on how the run ended and where its model is.
pub fn ending(status: &RunStatus) -> String {
    let name = format!("{} ({})", status.run, status.name);
    let spent = match status.ended_unix_ms.checked_sub(status.submitted_unix_ms) {
        Some(ms) if status.ended_unix_ms > 0 => {
            format!(
                " {} after it was submitted",
                format::duration(ms as f64 / 1000.0)
            )
        }
        _ => String::new(),
    };
    let mut text = match status.state() {
        RunState::Finished => format!(
            "Run {name} finished{spent}: {} steps, {} tokens, last loss {}.\n",
            format::grouped(status.step),
            format::grouped(status.tokens),
            format::metric(status.loss)
        ),
        RunState::Cancelled => format!(
            "Run {name} stopped at step {} with {} of {} trained.\n",
            format::grouped(status.step),
            format::short(status.tokens as f64),
            format::tokens(status.budget_tokens)
        ),
        _ => format!(
            "Run {name} {}{spent} at step {}: {}\n",
            json::state_name(status.state()),
            format::grouped(status.step),
            if status.reason.is_empty() {
                "no reason given; see `supra logs`."
            } else {
                &status.reason
            }
        ),
    };
    if let Some(checkpoint) = &status.checkpoint {
        text.push_str(&format!(
            "Checkpoint of step {} ({}): {}\n",
            format::grouped(checkpoint.step),
            format::bytes(checkpoint.bytes),
            checkpoint.path
        ));
    }
    if let Some(chaos) = &status.chaos {
        text.push_str(&format!("Chaos {}.\n", chaos.text));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use supra_proto::v1::{Chaos, Checkpoint};

    fn training() -> RunStatus {
        RunStatus {
            run: "r7".to_owned(),
            name: "quickstart".to_owned(),
            state: RunState::Training as i32,
            world: 2,
            step: 120,
            steps: 477,
            tokens: 1_500_000,
            budget_tokens: 30_000_000,
            loss: 2.345_67,
            tokens_per_second: 12_345.0,
            eta_seconds: 185.0,
            ..RunStatus::default()
        }
    }

    #[test]
    fn a_line_names_everything_that_moves() {
        assert_eq!(
            summary(&training()),
            "training  step 120/477  1.5 M of 30 M tokens  loss 2.3457  12.3 k tok/s  ETA 3 min 5 s  2 workers"
        );
    }

    #[test]
    fn a_queued_run_shows_no_numbers_that_it_does_not_have() {
        let status = RunStatus {
            state: RunState::Queued as i32,
            reason: "waiting for workers".to_owned(),
            ..RunStatus::default()
        };
        assert_eq!(summary(&status), "queued  waiting for workers");
    }

    #[test]
    fn the_end_says_where_the_model_is() {
        let status = RunStatus {
            state: RunState::Finished as i32,
            submitted_unix_ms: 1000,
            ended_unix_ms: 66_000,
            checkpoint: Some(Checkpoint {
                step: 477,
                bytes: 1536,
                path: "/c/step".to_owned(),
                ..Checkpoint::default()
            }),
            ..training()
        };
        assert_eq!(
            ending(&status),
            "Run r7 (quickstart) finished 1 min 5 s after it was submitted: 120 steps, 1,500,000 tokens, last loss 2.3457.\n\
             Checkpoint of step 477 (1.5 KiB): /c/step\n"
        );
        assert_eq!(exit(&status), Exit::Done);
    }

    #[test]
    fn a_run_that_did_not_stand_its_chaos_is_broken_however_it_ended() {
        let end = |state: RunState, mark: ChaosMark| RunStatus {
            state: state as i32,
            chaos: Some(Chaos {
                faults: 3,
                ordered: 2,
                mark: mark as i32,
                text: "failed: only 2 of 3 fitted".to_owned(),
                ..Chaos::default()
            }),
            ..training()
        };
        let failed = end(RunState::Finished, ChaosMark::Failed);
        assert_eq!(exit(&failed), Exit::Broken);
        assert!(ending(&failed).ends_with("Chaos failed: only 2 of 3 fitted.\n"));
        assert_eq!(
            exit(&end(RunState::Failed, ChaosMark::Failed)),
            Exit::Broken
        );
        assert_eq!(
            exit(&end(RunState::Finished, ChaosMark::Passed)),
            Exit::Done
        );
        let training = end(RunState::Training, ChaosMark::Unspecified);
        assert!(summary(&training).ends_with("2 workers  chaos 2/3"));
    }

    #[test]
    fn exit_codes_follow_the_end() {
        let end = |state: RunState| {
            exit(&RunStatus {
                state: state as i32,
                ..RunStatus::default()
            })
        };
        assert_eq!(end(RunState::Cancelled), Exit::Stopped);
        assert_eq!(end(RunState::Failed), Exit::Failed);
        let strict = RunStatus {
            state: RunState::Failed as i32,
            broken: true,
            ..RunStatus::default()
        };
        assert_eq!(exit(&strict), Exit::Broken);
    }
}
