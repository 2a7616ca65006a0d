//! When a run with `checkpoint.every_tokens: auto` is asked for a checkpoint. (How long the interval is, and why, is decided in
//! `interval.rs`.)

use std::time::Duration;

use supra_proto::v1::{self, CheckpointAfterStep, coordinator_message::Body as Down};

use super::Machine;
use super::fact::Fact;
use super::generation::Stage;
use super::regroup::LAST_STEPS;
use super::state::{Run, RunNumber};
use crate::interval::Interval;

/// The clock of a generation whose checkpoints the coordinator asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pacing {
    /// Up to when its training is in the run's experience.
    pub since: Duration,
    /// It was asked for a checkpoint that is not written yet.
    pub asked: bool,
}

impl Machine {
    /// Asks rank 0 for a checkpoint when the interval has passed.
    pub(super) fn ask_for_checkpoint(&mut self) {
        let Some((run, pacing)) = self.paced() else {
            return;
        };
        let unsaved = Duration::from_millis(run.experience.unsaved_ms)
            .saturating_add(self.moment.now.saturating_sub(pacing.since));
        let last_steps = run
            .open
            .as_ref()
            .is_none_or(|open| open.steps.saturating_sub(run.step) <= LAST_STEPS);
        let newest = run.recovery_step();
        let nothing_new = run.stop.is_some() || last_steps || run.step <= newest;
        if pacing.asked || nothing_new || unsaved < self.interval(run).every {
            return;
        }
        if let Some(pacing) = self
            .generation
            .as_mut()
            .and_then(|generation| generation.pacing.as_mut())
        {
            pacing.asked = true;
        }
        self.tell(0, Down::Checkpoint(CheckpointAfterStep { newest }));
    }

    /// Run and clock of the generation in hand, while it trains and the coordinator asks for its checkpoints.
    fn paced(&self) -> Option<(&Run, Pacing)> {
        let generation = self.generation.as_ref()?;
        let pacing = generation.pacing?;
        let trains = generation.stage == Stage::Training && generation.regroup.is_none();
        Some((self.state.run(generation.run).filter(|_| trains)?, pacing))
    }

    fn interval(&self, run: &Run) -> Interval {
        run.experience
            .interval(run.members.len() as u32, self.limits.interval)
    }

    /// Adds what the generation in hand has trained to the experience of its run; and what its checkpoint has cost.
    pub(super) fn gain_experience(&mut self, cost_seconds: Option<f64>) {
        let now = self.moment.now;
        let Some(generation) = self.generation.as_mut() else {
            return;
        };
        let (run, stage) = (generation.run, generation.stage);
        let world = generation.members.len() as u32;
        let Some(pacing) = generation
            .pacing
            .as_mut()
            .filter(|_| stage == Stage::Training)
        else {
            return;
        };
        let trained = now.saturating_sub(pacing.since);
        pacing.since = now;
        pacing.asked &= cost_seconds.is_none();
        // What is no number is no cost.
        let cost_ms = cost_seconds.map(|seconds| (seconds * 1e3) as u64);
        self.decide(Fact::Trained {
            run,
            trained_ms: u64::try_from(trained.as_millis()).unwrap_or(u64::MAX),
            world,
            cost_ms,
        });
    }

    /// How often the generation in hand is asked for a checkpoint, for people.
    pub(super) fn show_interval(&self, number: RunNumber) -> Option<v1::CheckpointInterval> {
        let (run, _) = self.paced().filter(|(run, _)| run.number == number)?;
        let Interval { every, reason } = self.interval(run);
        Some(v1::CheckpointInterval {
            seconds: every.as_secs_f64(),
            reason,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use supra_proto::v1::LeftReason;

    use super::super::rig::{RECIPE, Rig, held, submission};
    use super::super::{Event, Submission};
    use super::*;

    /// Workers a (stream 1) and b (stream 2) have trained step 1 of 3 of a run with `auto`.
    fn training() -> Rig {
        let mut rig = Rig::new();
        rig.machine.limits.interval.least = Duration::from_secs(10);
        let submission = Submission {
            recipe: RECIPE.replace("every_tokens: 80", "every_tokens: auto"),
            ..submission("rig-1")
        };
        rig.event(Event::Submit(submission)).unwrap();
        rig.attach(1, "a");
        rig.attach(2, "b");
        rig.wait(1.1);
        rig.formed(1, 1, 0);
        rig.formed(2, 1, 0);
        rig.step(&[1, 2], 1, 1);
        rig.told();
        rig
    }

    /// Who was asked for a checkpoint newer than which.
    fn asked(rig: &mut Rig) -> Vec<(u64, u64)> {
        let told = rig.told().into_iter();
        let asked = told.filter_map(|(conn, _, body)| match body {
            Down::Checkpoint(checkpoint) => Some((conn, checkpoint.newest)),
            _ => None,
        });
        asked.collect()
    }

    fn wait(rig: &mut Rig, seconds: u32) {
        for _ in 0..seconds {
            rig.wait(1.0);
            rig.heartbeat(1);
            rig.heartbeat(2);
        }
    }

    #[test]
    fn rank_0_is_asked_once_when_the_interval_has_passed() {
        let mut rig = training();
        wait(&mut rig, 9);
        assert_eq!(asked(&mut rig), []);
        wait(&mut rig, 5);
        assert_eq!(asked(&mut rig), [(1, 0)]);
        let interval = rig.status().checkpoint_interval.unwrap();
        assert_eq!(interval.seconds, 10.0);
    }

    #[test]
    fn the_measured_cost_decides_the_next_interval_and_a_restart_remembers_it() {
        let mut rig = training();
        wait(&mut rig, 10);
        rig.written(1, 1, 1);
        let interval = rig.status().checkpoint_interval.unwrap();
        assert!(
            interval.seconds > 590.0 && interval.reason.contains("a checkpoint costs 0.1 s"),
            "{interval:?}"
        );
        assert_eq!(rig.run().experience.unsaved_ms, 0);
        let experience = rig.run().experience.clone();
        assert_eq!(experience.worker_ms, 2 * 10_000);
        rig.restart(rig.facts.len());
        assert_eq!(rig.run().experience, experience);
    }

    #[test]
    fn what_a_survivor_keeps_is_as_unsaved_in_the_next_generation() {
        let mut rig = training();
        wait(&mut rig, 8);
        rig.lose(2);
        rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
        rig.wait(4.0);
        rig.formed(1, 2, 1);
        assert_eq!(rig.run().experience.unsaved_ms, 8_000);
        assert_eq!(rig.run().experience.failures, 0, "no step was lost");
        rig.told();
        wait(&mut rig, 1);
        assert_eq!(asked(&mut rig), []);
        wait(&mut rig, 2);
        assert_eq!(asked(&mut rig), [(1, 0)]);
    }

    #[test]
    fn a_failure_that_costs_steps_counts_and_begins_anew() {
        let mut rig = training();
        wait(&mut rig, 8);
        rig.lose(2);
        rig.left(1, 1, LeftReason::Void);
        rig.wait(4.0);
        let experience = &rig.run().experience;
        assert_eq!((experience.failures, experience.unsaved_ms), (1, 0));
        assert_eq!(experience.worker_ms, 16_000);
    }

    #[test]
    fn a_recipe_that_names_tokens_is_not_asked() {
        let mut rig = Rig::new();
        rig.submit("rig-1");
        rig.attach(1, "a");
        rig.wait(1.1);
        rig.formed(1, 1, 0);
        rig.step(&[1], 1, 1);
        wait(&mut rig, 20);
        assert_eq!(asked(&mut rig), []);
        assert_eq!(rig.status().checkpoint_interval, None);
        assert_eq!(rig.run().experience, Default::default());
    }
}
