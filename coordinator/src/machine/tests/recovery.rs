//! Where the next generation starts, and what becomes of the steps of the one before.

use supra_proto::v1::{
    self, Assignment, LeftReason, RunState, coordinator_message::Body as Down,
    worker_message::Body as Up,
};

use super::super::rig::{Rig, held, plan, report};
use super::super::*;
use super::{halfway, training};
use crate::audit::{Options, audit};
use crate::ledger::Body;

/// The assignments told since the last call, by rank.
fn assigned(rig: &mut Rig) -> Vec<(Conn, Assignment)> {
    let told = rig.told().into_iter();
    told.filter_map(|(conn, _, body)| match body {
        Down::Assignment(assignment) => Some((conn, assignment)),
        _ => None,
    })
    .collect()
}

/// Step, holders and step to restore of the newest generation's assignments.
fn starts(rig: &mut Rig) -> (Option<(v1::Held, Vec<u32>)>, Option<u64>) {
    let assigned = assigned(rig);
    let (_, first) = assigned.first().expect("a generation has formed");
    for (_, assignment) in &assigned {
        assert_eq!(assignment.held, first.held);
        assert_eq!(assignment.restore, first.restore);
    }
    let held = first.held.clone();
    (
        held.map(|held| (held.state.unwrap(), held.holders)),
        first.restore.as_ref().map(|restore| restore.step),
    )
}

fn voids(rig: &Rig) -> Vec<u64> {
    let records = rig.ledger().into_iter();
    records
        .filter_map(|record| match record.body {
            Body::Void { after_step, .. } => Some(after_step),
            _ => None,
        })
        .collect()
}

fn regroups(rig: &mut Rig) -> Vec<(Conn, String)> {
    let told = rig.told().into_iter();
    told.filter_map(|(conn, _, body)| match body {
        Down::Regroup(regroup) => Some((conn, regroup.reason)),
        _ => None,
    })
    .collect()
}

/// The ledger adds up, and `replay` gives the live state.
fn sound(rig: &Rig) {
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.breaks, []);
    assert_eq!(verdict.steps, rig.run().step);
    assert_eq!(&rig.replayed(), rig.machine.state());
}

/// Trains to the end with one worker from `step` on, and audits.
fn to_the_end(rig: &mut Rig, conn: Conn, generation: u64, from: u64) {
    rig.formed(conn, generation, from);
    for step in from + 1..=3 {
        rig.step(&[conn], generation, step);
    }
    rig.written(conn, generation, 3);
    rig.published(conn, generation, 3);
    assert_eq!(rig.status().state(), RunState::Finished);
    sound(rig);
}

/// Worker b is lost behind step 1, and a leaves with what it holds.
fn survivor(state: v1::Held) -> Rig {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(state));
    rig
}

#[test]
fn a_generation_starts_from_what_the_survivor_holds_and_nothing_is_void() {
    let mut rig = survivor(held(1, 1));
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 1), vec![0])), None));
    assert!(voids(&rig).is_empty());
    assert!(
        matches!(rig.facts.last(), Some(Fact::Formed { from_step: 1, .. })),
        "{:?}",
        rig.facts.last()
    );
    to_the_end(&mut rig, 1, 2, 1);
    assert!(voids(&rig).is_empty());
}

#[test]
fn the_lost_worker_that_came_back_gets_the_state_from_the_survivor() {
    let mut rig = survivor(held(1, 1));
    rig.attach(3, "b");
    rig.attach(4, "0");
    assert_eq!(
        starts(&mut rig),
        (Some((held(1, 1), vec![1])), None),
        "ranks go by name: 0, a, b"
    );
}

#[test]
fn nobody_has_to_load_anything_when_all_but_the_dead_hold_the_state() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
        rig.attach(conn, name);
    }
    for conn in 1..=3 {
        rig.formed(conn, 1, 0);
    }
    rig.step(&[1, 2, 3], 1, 1);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    rig.left_holding(3, 1, LeftReason::Void, Some(held(1, 1)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 1), vec![0, 1])), None));
}

#[test]
fn a_spare_takes_the_place_of_the_dead_at_once() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "b"), (2, "c"), (3, "d"), (4, "a")] {
        rig.attach(conn, name);
    }
    for conn in 1..=3 {
        rig.formed(conn, 1, 0);
    }
    rig.step(&[1, 2, 3], 1, 1);
    rig.wait(5.0);
    assert_eq!(regroups(&mut rig), [], "no generation could have more");
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    rig.left_holding(3, 1, LeftReason::Void, Some(held(1, 1)));
    let places: Vec<_> = assigned(&mut rig)
        .into_iter()
        .map(|(conn, assignment)| (conn, assignment.held.unwrap().holders))
        .collect();
    assert_eq!(
        places,
        [(4, vec![1, 2]), (1, vec![1, 2]), (3, vec![1, 2])],
        "without waiting for c"
    );
    assert!(voids(&rig).is_empty());
}

#[test]
fn one_that_holds_the_state_has_a_place_before_one_that_does_not() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "x"), (2, "y"), (3, "z")] {
        rig.attach(conn, name);
    }
    for conn in 1..=3 {
        rig.formed(conn, 1, 0);
    }
    for (conn, name) in [(4, "a"), (5, "b"), (6, "c")] {
        rig.attach(conn, name);
    }
    rig.step(&[1, 2, 3], 1, 1);
    rig.lose(2);
    rig.lose(3);
    rig.told();
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    let conns: Vec<Conn> = assigned(&mut rig).iter().map(|(conn, _)| *conn).collect();
    assert_eq!(conns, [4, 5, 1]);
}

#[test]
fn a_step_that_only_the_survivor_lived_to_report_is_applied_and_kept() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.report(1, 1, 2, 0, 2);
    rig.lose(2);
    assert_eq!(rig.run().step, 1);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 2)));
    assert_eq!(rig.run().step, 1, "decided when the next one forms");
    rig.told();
    rig.wait(3.1);
    assert_eq!(rig.run().step, 2);
    assert_eq!(starts(&mut rig), (Some((held(1, 2), vec![0])), None));
    let last = rig.ledger().pop().map(|record| record.body);
    assert!(
        matches!(&last, Some(Body::Step(step)) if (step.generation, step.step) == (1, 2)
            && step.digest.as_slice() == report(&plan(), 2, 0, 2).step_digest),
        "{last:?}"
    );
    to_the_end(&mut rig, 1, 2, 2);
}

#[test]
fn reports_that_come_after_the_break_up_count_as_well_and_as_many_as_there_are() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    rig.attach(1, "a");
    rig.attach(2, "b");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    rig.formed(2, 1, 0);
    rig.lose(2);
    rig.report(1, 1, 1, 0, 2);
    rig.report(1, 1, 2, 0, 2);
    assert_eq!(rig.run().step, 0);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 2)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(rig.run().step, 2);
    assert_eq!(starts(&mut rig).0.unwrap().0.step, 2);
    sound(&rig);
}

#[test]
fn the_newest_state_wins_and_the_slower_survivor_gets_it() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
        rig.attach(conn, name);
    }
    for conn in 1..=3 {
        rig.formed(conn, 1, 0);
    }
    rig.step(&[1, 2, 3], 1, 1);
    rig.report(2, 1, 2, 1, 3);
    rig.lose(3);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    rig.left_holding(2, 1, LeftReason::Void, Some(held(1, 2)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 2), vec![1])), None));
    assert_eq!((rig.run().step, voids(&rig)), (2, vec![]));
    sound(&rig);
}

#[test]
fn a_state_without_any_report_of_its_step_is_of_no_use() {
    let mut rig = survivor(held(1, 2));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (None, None));
    assert_eq!(voids(&rig), [0]);
    to_the_end(&mut rig, 1, 2, 0);
}

#[test]
fn survivors_that_report_a_step_differently_end_the_run() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
        rig.attach(conn, name);
    }
    for conn in 1..=3 {
        rig.formed(conn, 1, 0);
    }
    rig.report(1, 1, 1, 0, 3);
    rig.lose(3);
    let wrong = v1::StepReport {
        loss_sum: 9.0,
        ..report(&plan(), 1, 1, 3)
    };
    rig.say(2, 1, Up::Step(wrong));
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    rig.left_holding(2, 1, LeftReason::Void, Some(held(1, 1)));
    let status = rig.status();
    assert_eq!(status.state(), RunState::Failed);
    assert!(
        status.reason.contains("step 1: the ranks disagree")
            && status.reason.contains("rank 1 (b)"),
        "{}",
        status.reason
    );
}

#[test]
fn a_state_of_an_older_lineage_is_refused() {
    // b has the state of generation 1 behind step 1, but the run goes on without it, from the base.
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.lose(2);
    rig.left(1, 1, LeftReason::Void);
    rig.wait(3.1);
    assert_eq!(voids(&rig), [0]);
    rig.formed(1, 2, 0);
    rig.step(&[1], 2, 1);
    rig.lose(1);
    rig.attach_holding(3, "b", Some(held(1, 1)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (None, None));
    assert_eq!(voids(&rig), [0, 0]);
    sound(&rig);
}

#[test]
fn a_state_of_another_run_or_without_a_hash_is_refused() {
    for change in [
        |held: &mut v1::Held| held.run = "rig-0".into(),
        |held: &mut v1::Held| held.replica_hash.clear(),
        |held: &mut v1::Held| held.generation = 2,
    ] {
        let mut state = held(1, 1);
        change(&mut state);
        let mut rig = survivor(state);
        rig.told();
        rig.wait(3.1);
        assert_eq!(starts(&mut rig), (None, None));
        assert_eq!(voids(&rig), [0]);
    }
}

#[test]
fn a_generation_that_broke_while_it_formed_leaves_the_state_of_the_one_before() {
    let mut rig = survivor(held(1, 1));
    rig.wait(3.1);
    rig.fault(1, 2, v1::FaultKind::Transient, "no peer");
    rig.told();
    rig.left_holding(1, 2, LeftReason::Fault, Some(held(1, 1)));
    assert_eq!(rig.status().generation, 3);
    assert_eq!(starts(&mut rig), (Some((held(1, 1), vec![0])), None));
    to_the_end(&mut rig, 1, 3, 1);
    assert!(voids(&rig).is_empty());
}

#[test]
fn a_state_that_a_checkpoint_has_overtaken_is_ignored() {
    let mut rig = halfway();
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (None, Some(2)));
    assert!(voids(&rig).is_empty());
}

#[test]
fn a_generation_that_starts_from_memory_publishes_the_newest_checkpoint_if_need_be() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.written(1, 1, 1);
    rig.step(&[1, 2], 1, 2);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 2)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 2), vec![0])), Some(1)));
    assert!(!rig.run().checkpoints[0].published);
    rig.formed(1, 2, 2);
    assert!(rig.run().checkpoints[0].published);
    assert_eq!(rig.run().durable, 1);
}

#[test]
fn behind_the_last_step_a_generation_forms_only_to_write_it_down() {
    let mut rig = halfway();
    rig.step(&[1, 2], 1, 3);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 3)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 3), vec![0])), Some(2)));
    assert!(voids(&rig).is_empty());
    to_the_end(&mut rig, 1, 2, 3);
}

#[test]
fn survivors_that_hold_different_states_of_a_step_end_the_run() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.fault(1, 1, v1::FaultKind::Transient, "a switch rebooted");
    let other = v1::Held {
        replica_hash: vec![2; 32],
        ..held(1, 1)
    };
    rig.left_holding(1, 1, LeftReason::Fault, Some(held(1, 1)));
    rig.left_holding(2, 1, LeftReason::Void, Some(other));
    rig.wait(1.1);
    let status = rig.status();
    assert_eq!(status.state(), RunState::Failed);
    assert!(
        status.reason.contains("rank 0 (a)") && status.reason.contains("rank 1 (b)"),
        "{}",
        status.reason
    );
    assert_eq!((rig.run().step, voids(&rig)), (0, vec![0]));
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    rig.wait(1.1);
    assert_eq!(starts(&mut rig), (None, None), "from the base");
}

#[test]
fn what_a_failed_run_has_voided_stays_void_when_it_is_resumed_before_all_have_left() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.fault(1, 1, v1::FaultKind::Input, "the base is gone");
    rig.left_holding(1, 1, LeftReason::Fault, None);
    assert_eq!(voids(&rig), [0]);
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    rig.report(2, 1, 1, 1, 2);
    rig.left_holding(2, 1, LeftReason::Void, Some(held(1, 1)));
    rig.wait(1.1);
    assert_eq!(starts(&mut rig), (None, None), "from the base");
    sound(&rig);
}

#[test]
fn ranks_that_formed_with_another_state_than_that_which_was_held_end_the_run() {
    let mut rig = survivor(v1::Held {
        replica_hash: vec![9; 32],
        ..held(1, 1)
    });
    rig.wait(3.1);
    rig.formed(1, 2, 1);
    let status = rig.status();
    assert_eq!(status.state(), RunState::Failed);
    assert!(
        status.reason.contains("they were to start from"),
        "{}",
        status.reason
    );
}

#[test]
fn a_restarted_coordinator_goes_on_from_what_workers_say_they_hold() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.restart(usize::MAX);
    assert_eq!(rig.run().step, 1);
    rig.attach_holding(7, "a", Some(held(1, 1)));
    rig.attach_holding(8, "b", Some(held(1, 1)));
    rig.wait(1.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 1), vec![0, 1])), None));
    assert!(voids(&rig).is_empty());
    sound(&rig);
}

#[test]
fn steps_that_a_crash_of_the_coordinator_took_from_the_ledger_are_trained_again() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.step(&[1, 2], 1, 2);
    // The last step, and what it came to.
    rig.restart(rig.facts.len() - 2);
    rig.attach_holding(7, "a", Some(held(1, 2)));
    rig.attach_holding(8, "b", Some(held(1, 2)));
    rig.wait(1.1);
    assert_eq!(starts(&mut rig), (None, None));
    assert_eq!(voids(&rig), [0]);
    sound(&rig);
}

#[test]
fn a_run_that_is_cancelled_while_survivors_hold_it_stands_at_its_checkpoint() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.report(1, 1, 2, 0, 2);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 2)));
    rig.event(Event::Cancel(1)).unwrap();
    assert_eq!(rig.status().state(), RunState::Cancelled);
    assert_eq!((rig.run().step, voids(&rig)), (0, vec![0]));
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (None, None));
    sound(&rig);
}

#[test]
fn a_worker_that_joins_makes_the_generation_regroup_and_nothing_is_lost() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.attach(3, "c");
    assert_eq!(regroups(&mut rig), [], "others may come");
    rig.wait(1.1);
    let reason = || "worker c joins".to_owned();
    assert_eq!(regroups(&mut rig), [(1, reason()), (2, reason())]);
    rig.wait(1.1);
    assert_eq!(regroups(&mut rig), [], "once");
    rig.left_holding(1, 1, LeftReason::Regrouped, Some(held(1, 1)));
    rig.left_holding(2, 1, LeftReason::Regrouped, Some(held(1, 1)));
    let broke = rig.facts.iter().rev().nth(1);
    assert!(
        matches!(broke, Some(Fact::Broke { counts: false, cause, .. })
            if cause == "regrouped: worker c joins"),
        "{broke:?}"
    );
    assert_eq!(rig.status().world, 3, "at once");
    assert_eq!(starts(&mut rig), (Some((held(1, 1), vec![0, 1])), None));
    assert_eq!((voids(&rig), rig.run().checkpoints.len()), (vec![], 0));
    assert_eq!(rig.run().failures.count, 0);
    sound(&rig);
}

#[test]
fn no_generation_regroups_that_stops_or_ends_or_would_lose_its_state() {
    let joins = |rig: &mut Rig| {
        rig.attach(3, "c");
        rig.told();
        rig.wait(1.1);
        regroups(rig).len()
    };
    let mut ending = halfway();
    assert_eq!(joins(&mut ending), 0);
    let mut stopping = training();
    stopping.event(Event::Cancel(1)).unwrap();
    assert_eq!(joins(&mut stopping), 0);
    let mut sharded = training();
    sharded.machine.generation.as_mut().unwrap().whole = false;
    assert_eq!(joins(&mut sharded), 0);
    assert_eq!(joins(&mut training()), 2);
}

#[test]
fn a_member_that_dies_while_the_generation_regroups_breaks_it_up() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.attach(3, "c");
    rig.wait(1.1);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 1)));
    rig.told();
    rig.wait(3.1);
    assert_eq!(starts(&mut rig), (Some((held(1, 1), vec![0])), None));
    assert_eq!(rig.run().failures.count, 1);
}
