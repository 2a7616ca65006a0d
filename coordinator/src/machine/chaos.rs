//! Orders the faults of a recipe's `chaos`, one after the other, and sees how the run recovers. (Which ones, and the mark in
//! the end, stand in `crate::chaos`.)

use std::time::Duration;

use supra_proto::v1::{OrderedFault, OrderedFaultKind, coordinator_message::Body as Down};
use supra_recipes::schema::{Chaos, ChaosKind};

use super::fact::{Fact, Outcome};
use super::generation::Stage;
use super::regroup::LAST_STEPS;
use super::state::{Run, RunNumber};
use super::worker::Conn;
use super::{Machine, RunPhase};
use crate::chaos::{self, Draw, Fault, Mark};

/// Why a worker is aside that `chaos` has drained.
pub(super) const DRAINED: &str = "drained by chaos";

/// The clock of the faults of one run; volatile, since a coordinator that restarts begins it anew.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    run: RunNumber,
    /// When the last fault was ordered, or the run was first seen to train.
    ordered: Duration,
    /// Stream of the worker that the last fault hit.
    conn: Option<Conn>,
    /// When a step was last applied, and the longest time without one since the last fault.
    applied: Duration,
    longest: Duration,
}

impl Machine {
    /// A generation of a run with `chaos` begins: from here on the run is judged.
    pub(super) fn begin_chaos(&mut self, number: RunNumber) {
        let Some(faults) = self.chaos().map(|chaos| chaos.faults) else {
            return;
        };
        if self
            .state
            .run(number)
            .is_some_and(|run| run.chaos.is_none())
        {
            let run = number;
            self.decide(Fact::ChaosBegun { run, faults });
        }
        let now = self.moment.now;
        if self.clock.run != number {
            self.clock = Clock {
                run: number,
                ordered: now,
                applied: now,
                ..Clock::default()
            };
        }
    }

    /// What the generation in hand has to endure.
    fn chaos(&self) -> Option<&Chaos> {
        self.generation.as_ref()?.chaos.as_ref()
    }

    /// The fault that the run has not recovered from.
    fn open_fault(&self, number: RunNumber) -> Option<&Fault> {
        self.state.run(number)?.chaos.as_ref()?.open()
    }

    /// Time has passed: the next fault may be due, and a drained worker may come back.
    pub(super) fn tick_chaos(&mut self) {
        let lasted = self.moment.now.saturating_sub(self.clock.ordered);
        let front = self.state.queue.front().copied();
        let open = front.and_then(|number| self.open_fault(number));
        let kept = open
            .filter(|fault| fault.kind == ChaosKind::Drain && lasted < fault.lasts())
            .map(|fault| fault.worker.clone());
        self.take_back_aside(DRAINED, kept.as_deref());
        let Some(run) = self.generation.as_ref().map(|generation| generation.run) else {
            return;
        };
        if let Some((draw, fault)) = self.due_fault(run) {
            self.inflict(run, draw, fault);
        }
    }

    /// The next fault, if it is time for it.
    fn due_fault(&self, number: RunNumber) -> Option<(Draw, Fault)> {
        let (generation, chaos) = (self.generation.as_ref()?, self.chaos()?);
        let run = self.state.run(number)?;
        let ordeal = run.chaos.as_ref()?;
        let ordered = ordeal.faults.len() as u32;
        let waited = self.moment.now.saturating_sub(self.clock.ordered);
        let due = ordered < chaos.faults && waited >= chaos.every.duration();
        // Each has to find the run recovered and a step further.
        let trains = generation.stage == Stage::Training
            && generation.regroup.is_none()
            && run.step > generation.from_step
            && ordeal.open().is_none();
        let steps = generation.plan.as_ref().map_or(0, |plan| plan.steps);
        let ends = self.shutdown.is_some()
            || run.stop.is_some()
            || steps.saturating_sub(run.step) <= LAST_STEPS;
        if !due || !trains || ends {
            return None;
        }
        let draw = chaos::draw(chaos, ordered + 1, generation.members.len())?;
        let fault = Fault {
            kind: draw.kind,
            worker: generation.members[draw.rank].name.clone(),
            generation: generation.number,
            step: run.step,
            lasts_ms: draw.lasts_ms,
            stood_still_ms: None,
        };
        Some((draw, fault))
    }

    fn inflict(&mut self, run: RunNumber, draw: Draw, fault: Fault) {
        let number = self
            .state
            .run(run)
            .and_then(|run| run.chaos.as_ref())
            .map_or(0, |ordeal| ordeal.faults.len()) as u32
            + 1;
        let text = format!(
            "chaos orders fault {number}: {}, rank {}, after step {}",
            fault.what(),
            draw.rank,
            fault.step
        );
        self.log(Some(run), "WARN", text);
        self.clock.ordered = self.moment.now;
        self.clock.longest = Duration::ZERO;
        let generation = self.generation.as_ref();
        self.clock.conn = generation.map(|generation| generation.members[draw.rank].conn);
        let (worker, seconds) = (fault.worker.clone(), fault.lasts().as_secs_f64());
        self.decide(Fact::FaultOrdered { run, fault });
        let kind = match draw.kind {
            ChaosKind::Drain => return self.put_aside_attached(&worker, DRAINED),
            ChaosKind::Kill => OrderedFaultKind::Kill,
            ChaosKind::Stop => OrderedFaultKind::Stop,
            ChaosKind::Disconnect => OrderedFaultKind::Disconnect,
            ChaosKind::Reset => OrderedFaultKind::Reset,
        };
        let kind = kind.into();
        self.tell(
            draw.rank,
            Down::OrderedFault(OrderedFault {
                kind,
                seconds,
                number,
            }),
        );
    }

    /// A step was applied: the run may have recovered from its last fault.
    pub(super) fn recovering(&mut self, number: RunNumber) {
        let now = self.moment.now;
        let trains = self.generation.as_ref().is_some_and(|generation| {
            generation.run == number && generation.stage == Stage::Training
        });
        if self.clock.run != number || !trains {
            return;
        }
        let still = now.saturating_sub(self.clock.applied);
        self.clock.applied = now;
        self.clock.longest = self.clock.longest.max(still);
        let open = self.open_fault(number);
        if open.is_some_and(|fault| self.is_over(fault)) {
            let stood_still_ms = u64::try_from(self.clock.longest.as_millis()).unwrap_or(u64::MAX);
            let run = number;
            self.decide(Fact::FaultSurvived {
                run,
                stood_still_ms,
            });
        }
    }

    /// The fault has had its effect, and the generation in hand, which trains, is what came after it.
    fn is_over(&self, fault: &Fault) -> bool {
        let Some(generation) = &self.generation else {
            return false;
        };
        let next = generation.number > fault.generation;
        let lasted = self.moment.now.saturating_sub(self.clock.ordered) >= fault.lasts();
        match fault.kind {
            ChaosKind::Kill | ChaosKind::Reset => next,
            ChaosKind::Drain => next && lasted,
            ChaosKind::Stop => lasted,
            // A worker that is back before anybody missed it has broken nothing.
            ChaosKind::Disconnect => {
                let of_worker = |member: &&super::generation::Member| member.name == fault.worker;
                let member = generation.members.iter().find(of_worker);
                next || member.is_some_and(|member| Some(member.conn) != self.clock.conn)
            }
        }
    }

    /// What was ordered of the generation in hand: whatever breaks it is nobody's fault.
    pub(super) fn ordered_here(&self) -> Option<String> {
        let generation = self.generation.as_ref()?;
        let fault = self.open_fault(generation.run)?;
        let here = fault.generation == generation.number;
        here.then(|| format!("chaos ordered: {}", fault.what()))
    }

    /// A run that ends without its budget spent has no other judge.
    pub(super) fn fail_chaos(&mut self, number: RunNumber, outcome: Outcome, reason: &str) {
        let suffered = |run: &Run| {
            let ordeal = run.chaos.as_ref();
            ordeal.is_some_and(|ordeal| ordeal.mark.is_none() && !ordeal.faults.is_empty())
        };
        if outcome == Outcome::Failed && self.state.run(number).is_some_and(suffered) {
            let mark = Mark {
                passed: false,
                why: format!("the run failed: {reason}"),
            };
            self.decide(Fact::ChaosMarked { run: number, mark });
        }
    }

    /// The ledger of a run that has spent its budget is audited: its mark is known.
    pub(super) fn audited(&mut self, number: RunNumber, result: Result<(), String>) {
        let Some(ordeal) = self
            .state
            .run(number)
            .filter(|run| run.owes_mark())
            .and_then(|run| run.chaos.as_ref())
        else {
            return;
        };
        let mark = ordeal.judge(result);
        let level = if mark.passed { "INFO" } else { "ERROR" };
        self.decide(Fact::ChaosMarked { run: number, mark });
        let run = self.state.run(number);
        if let Some(line) = run.and_then(|run| run.chaos.as_ref()).map(|it| it.line()) {
            self.log(Some(number), level, format!("chaos {line}"));
        }
    }
}

impl Run {
    /// It has spent its budget under `chaos`, and its ledger is not audited yet.
    pub fn owes_mark(&self) -> bool {
        let ordeal = self.chaos.as_ref();
        self.phase == RunPhase::Finished && ordeal.is_some_and(|ordeal| ordeal.mark.is_none())
    }
}

#[cfg(test)]
mod tests {
    use supra_proto::v1::{ChaosMark, FaultKind, LeftReason, RunState};

    use super::super::rig::{RECIPE, Rig, checkpoint, held, submission};
    use super::super::{Event, Submission};
    use super::*;

    /// Workers a (stream 1) and b (stream 2) have trained step 1 of 3 of a run with chaos of this kind.
    fn training(kind: &str, faults: u32) -> Rig {
        let mut rig = Rig::new();
        let chaos = format!("chaos: {{ faults: {faults}, every: 1 s, kinds: [{kind}] }}\n");
        let submission = Submission {
            recipe: format!("{RECIPE}{chaos}"),
            ..submission("rig-1")
        };
        rig.event(Event::Submit(submission)).unwrap();
        rig.attach(1, "a");
        rig.attach(2, "b");
        rig.wait(1.1);
        rig.formed(1, 1, 0);
        rig.formed(2, 1, 0);
        rig
    }

    /// Whom a fault is ordered of, and what.
    fn ordered(rig: &mut Rig) -> Vec<(Conn, OrderedFaultKind, u32)> {
        let told = rig.told().into_iter();
        let ordered = told.filter_map(|(conn, _, body)| match body {
            Down::OrderedFault(fault) => Some((conn, fault.kind(), fault.number)),
            _ => None,
        });
        ordered.collect()
    }

    fn ordeal(rig: &Rig) -> &chaos::Ordeal {
        rig.run().chaos.as_ref().unwrap()
    }

    /// A fault is ordered of one of the workers; the streams of it and of the other, and its name.
    fn struck(rig: &mut Rig) -> (Conn, Conn, &'static str) {
        rig.step(&[1, 2], 1, 1);
        rig.wait(1.1);
        match ordered(rig).as_slice() {
            [(1, ..)] => (1, 2, "a"),
            [(2, ..)] => (2, 1, "b"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_fault_waits_for_its_time_and_for_a_step() {
        let mut rig = training("kill", 5);
        rig.wait(5.0);
        assert_eq!(ordered(&mut rig), [], "nothing is trained yet");
        rig.step(&[1, 2], 1, 1);
        rig.wait(0.1);
        let [(_, kind, number)] = ordered(&mut rig)[..] else {
            panic!("no fault");
        };
        assert_eq!((kind, number), (OrderedFaultKind::Kill, 1));
        rig.wait(5.0);
        assert_eq!(ordered(&mut rig), [], "the run has not recovered");
        assert_eq!(
            rig.status().chaos.unwrap().text,
            "1 of 5 faults ordered: 1 kill"
        );
    }

    #[test]
    fn a_killed_worker_is_not_to_blame_and_the_run_recovers_with_the_next_step() {
        let mut rig = training("kill", 1);
        let (victim, other, name) = struck(&mut rig);
        rig.wait(0.2);
        rig.lose(victim);
        rig.left_holding(other, 1, LeftReason::Void, Some(held(1, 1)));
        let blamed = rig.machine.conduct.blamed();
        assert_eq!(blamed, 0);
        let cause = &rig.run().reason;
        assert!(
            cause.contains(&format!("chaos ordered: kill of {name}")),
            "{cause}"
        );
        assert_eq!(rig.run().failures.count, 0);
        rig.wait(3.1);
        rig.formed(other, 2, 1);
        assert!(ordeal(&rig).open().is_some());
        rig.step(&[other], 2, 2);
        let fault = &ordeal(&rig).faults[0];
        assert_eq!(fault.stood_still_ms, Some(1100 + 200 + 3100));
    }

    #[test]
    fn a_drained_worker_is_taken_back_by_itself() {
        let mut rig = training("drain", 1);
        rig.step(&[1, 2], 1, 1);
        rig.wait(1.1);
        let fault = ordeal(&rig).faults[0].clone();
        let aside = |rig: &Rig| {
            let workers = rig.machine.worker_list();
            let worker = workers.iter().find(|worker| worker.name == fault.worker);
            worker.unwrap().aside.clone()
        };
        assert_eq!(aside(&rig), DRAINED);
        rig.wait(fault.lasts().as_secs_f64() - 0.1);
        assert_eq!(aside(&rig), DRAINED);
        rig.wait(0.2);
        assert_eq!(aside(&rig), "");
    }

    #[test]
    fn a_disconnected_worker_that_is_back_unmissed_has_broken_nothing() {
        let mut rig = training("disconnect", 1);
        let (victim, other, name) = struck(&mut rig);
        rig.lose(victim);
        rig.left_holding(other, 1, LeftReason::Void, Some(held(1, 1)));
        rig.attach_holding(9, name, Some(held(1, 1)));
        rig.wait(1.1);
        let conns = if name == "a" { [9, 2] } else { [1, 9] };
        for conn in conns {
            rig.formed(conn, 2, 1);
        }
        rig.step(&conns, 2, 2);
        assert!(ordeal(&rig).open().is_none());
    }

    #[test]
    fn a_run_that_fails_under_chaos_is_marked_at_once() {
        let mut rig = training("stop", 1);
        let (victim, ..) = struck(&mut rig);
        rig.fault(victim, 1, FaultKind::Input, "the data is gone");
        assert_eq!(rig.status().state(), RunState::Failed);
        let chaos = rig.status().chaos.unwrap();
        assert_eq!(chaos.mark(), ChaosMark::Failed);
        assert!(chaos.text.contains("the data is gone"), "{}", chaos.text);
    }

    #[test]
    fn a_run_that_spends_its_budget_waits_for_its_audit() {
        let mut rig = training("kill", 1);
        for step in 1..=3 {
            rig.step(&[1, 2], 1, step);
        }
        rig.written(1, 1, 3);
        rig.published(1, 1, 3);
        assert_eq!(checkpoint(1, 3).step, rig.run().durable);
        assert_eq!(rig.status().state(), RunState::Finished);
        assert!(rig.run().owes_mark());
        let run = rig.run().number;
        rig.event(Event::Audited {
            run,
            result: Ok(()),
        })
        .unwrap();
        let chaos = rig.status().chaos.unwrap();
        assert_eq!(chaos.mark(), ChaosMark::Failed, "{}", chaos.text);
        assert!(
            chaos.text.contains("only 0 of 1 faults fitted"),
            "{}",
            chaos.text
        );
        assert_eq!(rig.replayed(), *rig.machine.state());
    }
}
