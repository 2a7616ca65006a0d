//! How generations and runs end, and what is tidied up then.

use supra_proto::v1::{LeftReason, Void, coordinator_message::Body as Down};

use super::fact::{Fact, Outcome};
use super::generation::{Generation, Stage};
use super::state::{Run, RunNumber, RunPhase};
use super::{Action, Machine, retention};
use crate::ledger::Body;

/// What a broken generation means for its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// A worker vanished. Counts towards giving up only when training had begun: workers that come and go while a
    /// generation forms are nobody's fault.
    Lost { counts: bool },
    /// Its members left as they were asked to, for another membership.
    Regrouped,
    /// The environment failed. Another generation may succeed.
    Transient,
    /// The input is wrong or the replicas differ. Another generation would fail as well.
    Fatal,
}

impl Machine {
    /// Ends the generation in hand: everybody but `spared` is told. Which of its steps are void is decided when the next
    /// one forms, by what survivors then hold.
    pub(super) fn break_up(&mut self, cause: String, severity: Severity, spared: Option<usize>) {
        let now = self.moment.now;
        if self.generation.as_ref().is_none_or(Generation::leaving) {
            return;
        }
        self.gain_experience(None);
        let ordered = self.ordered_here();
        let Some(generation) = self.generation.as_mut() else {
            return;
        };
        generation.stage = Stage::Leaving {
            since: now,
            limit: self.limits.leave,
        };
        generation.begun.clear();
        generation.held.clear();
        let (number, run) = (generation.number, generation.run);
        let cause = match &ordered {
            Some(fault) => format!("{cause} ({fault})"),
            None => cause,
        };
        let (level, how) = match severity {
            Severity::Regrouped => ("INFO", "is over"),
            _ => ("WARN", "is void"),
        };
        let text = format!("generation {number} {how}: {cause}");
        self.log(Some(run), level, text);
        let step = self.state.run(run).map_or(0, |known| known.step);
        let counts = !matches!(
            severity,
            Severity::Lost { counts: false } | Severity::Regrouped
        ) && ordered.is_none();
        self.decide(Fact::Broke {
            run,
            generation: number,
            step,
            counts,
            cause: cause.clone(),
        });
        if let Some((outcome, reason)) = self.consequence(run, &cause, severity) {
            self.end_run(run, outcome, reason);
        }
        self.tell_all(&Down::Void(Void { reason: cause }), spared);
    }

    /// What the end of a generation means for its run; nothing when it is to be tried again.
    fn consequence(
        &self,
        run: RunNumber,
        cause: &str,
        severity: Severity,
    ) -> Option<(Outcome, String)> {
        let run = self.state.run(run)?;
        if severity == Severity::Fatal {
            return Some((Outcome::Failed, cause.to_owned()));
        }
        if let Some(stop) = &run.stop {
            let step = run.recovery_step();
            return Some((
                Outcome::Cancelled,
                format!("{stop}; it stands at step {step}, since {cause}"),
            ));
        }
        let failures = run.failures.count;
        (failures >= self.limits.failures).then(|| {
            let step = run.failures.step + 1;
            (
                Outcome::Failed,
                format!("{failures} generations in a row failed at step {step}; the last: {cause}"),
            )
        })
    }

    /// Steps after the newest checkpoint are void.
    pub(super) fn roll_back(&mut self, number: RunNumber, reason: &str) {
        if let Some(after_step) = self.state.run(number).map(Run::recovery_step) {
            self.roll_back_to(number, after_step, reason);
        }
    }

    /// Steps after `after_step` are void.
    pub(super) fn roll_back_to(&mut self, number: RunNumber, after_step: u64, reason: &str) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        if run.step > after_step {
            let body = Body::Void {
                generation: run.generation,
                after_step,
                reason: reason.to_owned(),
            };
            self.record(number, body);
        }
    }

    /// Ends a run. One that has not finished stands at its newest checkpoint from here on.
    pub(super) fn end_run(&mut self, run: RunNumber, outcome: Outcome, reason: String) {
        self.end_run_as(run, outcome, reason, false);
    }

    /// The same; `broken` when it ends since it is strict and a checkpoint is damaged.
    pub(super) fn end_run_as(
        &mut self,
        run: RunNumber,
        outcome: Outcome,
        reason: String,
        broken: bool,
    ) {
        let (level, how) = match outcome {
            Outcome::Finished => ("INFO", "has finished"),
            Outcome::Cancelled => ("INFO", "is stopped"),
            Outcome::Failed => ("ERROR", "has failed"),
        };
        let id = self
            .state
            .run(run)
            .map(|known| known.id.clone())
            .unwrap_or_default();
        let colon = if reason.is_empty() { "" } else { ": " };
        self.log(Some(run), level, format!("run {id} {how}{colon}{reason}"));
        self.unapplied.take_if(|unapplied| unapplied.run == run);
        self.roll_back(run, &reason);
        self.fail_chaos(run, outcome, &reason);
        self.decide(Fact::Ended {
            run,
            outcome,
            reason,
            at: self.moment.unix_ms,
            broken,
        });
    }

    /// A generation that everybody has left is over.
    pub(super) fn conclude(&mut self) {
        if !self.generation.as_ref().is_some_and(Generation::empty) {
            return;
        }
        self.all_left();
        self.judge();
        let Some(generation) = self.generation.take() else {
            return;
        };
        self.free_since = generation.waited_since().unwrap_or(self.moment.now);
        self.unapplied = None;
        let run = generation.run;
        // What was voided meanwhile stays void, also when the run was resumed before all had left.
        let goes_on = |known: &&Run| !known.ended() && known.lineage <= generation.number;
        let Some(known) = self.state.run(run).filter(goes_on) else {
            return;
        };
        let unapplied = generation.unapplied(known.step).and_then(|unapplied| {
            let mut steps = unapplied.steps.iter();
            steps.try_for_each(|accounted| self.verify(run, accounted))?;
            Ok(unapplied)
        });
        match unapplied {
            Ok(unapplied) => self.unapplied = Some(unapplied),
            Err(cause) => self.end_run(run, Outcome::Failed, cause),
        }
    }

    /// What it means that everybody has left the generation in hand, if that was not known before.
    fn all_left(&mut self) {
        let Some(generation) = self
            .generation
            .as_ref()
            .filter(|generation| !generation.leaving())
        else {
            return;
        };
        let run = generation.run;
        let stopped = generation.all_left(LeftReason::Stopped);
        let regrouped = generation.all_left(LeftReason::Regrouped).then(|| {
            let asked = generation.regroup.clone();
            asked.unwrap_or_else(|| "asked for before the coordinator was restarted".to_owned())
        });
        let asked = self.state.run(run).and_then(|known| known.stop.clone());
        let (cause, severity) = match (asked.filter(|_| stopped), regrouped) {
            (Some(reason), _) => return self.end_run(run, Outcome::Cancelled, reason),
            (None, Some(reason)) => (format!("regrouped: {reason}"), Severity::Regrouped),
            (None, None) if stopped => (
                "its workers stopped".to_owned(),
                Severity::Lost { counts: false },
            ),
            (None, None) => (
                "its workers left before the end".to_owned(),
                Severity::Transient,
            ),
        };
        self.break_up(cause, severity, None);
    }

    /// Draws the consequences of published checkpoints: steps are durable, the budget may be spent, old ones may go.
    /// Does nothing twice, so that it also completes what a crash interrupted.
    pub(super) fn settle(&mut self, number: RunNumber) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        if let Some(newest) = run.checkpoints.iter().rev().find(|known| known.published)
            && newest.step > run.durable
        {
            let (generation, step, manifest_hash) =
                (newest.generation, newest.step, newest.manifest_hash);
            self.record(
                number,
                Body::Durable {
                    generation,
                    step,
                    manifest_hash,
                },
            );
        }
        self.close(number);
        self.retire(number);
        self.prove(number);
    }

    /// Ends a run whose last step is durable.
    fn close(&mut self, number: RunNumber) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let Some(open) = run.open.as_ref().filter(|open| run.durable == open.steps) else {
            return;
        };
        let (step, samples, closed, phase) = (open.steps, open.samples, run.closed, run.phase);
        if !closed {
            self.record(number, Body::Close { step, samples });
        }
        if phase == RunPhase::Finished {
            return;
        }
        self.end_run(number, Outcome::Finished, String::new());
        let (now, limit) = (self.moment.now, self.limits.farewell);
        if let Some(generation) = self
            .generation
            .as_mut()
            .filter(|generation| generation.run == number)
        {
            generation.stage = Stage::Leaving { since: now, limit };
        }
    }

    /// Retires what nothing keeps any more.
    fn retire(&mut self, number: RunNumber) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let old = retention::removable(run, run.keep, run.keep_every);
        self.remove(number, old);
    }

    /// Lets go of checkpoints, and has their directories deleted.
    pub(super) fn remove(&mut self, number: RunNumber, paths: Vec<String>) {
        for path in paths {
            self.decide(Fact::Retired {
                run: number,
                path: path.clone(),
            });
            self.delete(number, path);
        }
    }

    fn delete(&mut self, number: RunNumber, path: String) {
        let Some(run) = self.state.run(number) else {
            return;
        };
        let directory = run.checkpoint_root.join(&path);
        self.out.push(Action::Delete {
            run: number,
            path,
            directory,
        });
    }

    pub(super) fn deleted(&mut self, run: RunNumber, path: String) {
        if self
            .state
            .run(run)
            .is_some_and(|known| known.doomed.contains(&path))
        {
            self.decide(Fact::Deleted { run, path });
        }
    }

    /// Takes up what the last coordinator left in the middle. Nothing is void yet: workers may still hold what it applied,
    /// and say so when they attach.
    pub(super) fn recover(&mut self) {
        for number in 1..self.state.next_number() {
            self.settle(number);
            let Some(run) = self.state.run(number).cloned() else {
                continue;
            };
            for path in run.doomed.iter().cloned() {
                self.delete(number, path);
            }
            if run.ended() {
                continue;
            }
            if run.alive && self.await_members(number) {
                continue;
            }
            if run.alive {
                let (generation, step) = (run.generation, run.step);
                self.decide(Fact::Broke {
                    run: number,
                    generation,
                    step,
                    counts: false,
                    cause: "the coordinator was restarted".into(),
                });
            }
            if let Some(reason) = run.stop {
                self.end_run(number, Outcome::Cancelled, reason);
            }
        }
    }
}
