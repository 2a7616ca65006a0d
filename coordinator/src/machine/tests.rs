//! What the machine does, event by event.

use std::time::Duration;

use supra_proto::v1::{
    self, FaultKind, LeftReason, RunState, coordinator_message::Body as Down,
    worker_message::Body as Up,
};

use super::rig::{Rig, hello, plan, report};
use super::*;
use crate::audit::{Options, audit};
use crate::ledger::Body;

mod aside;
mod away;
mod evaluations;
mod keeping;
mod recovery;
mod snapshots;
mod stuck;

/// A rig whose run trains on workers a (stream 1) and b (stream 2), generation 1.
fn training() -> Rig {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    rig.attach(1, "a");
    rig.attach(2, "b");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    rig.formed(2, 1, 0);
    rig.told();
    rig
}

/// The same after step 2 with its checkpoint published.
fn halfway() -> Rig {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.step(&[1, 2], 1, 2);
    rig.written(1, 1, 2);
    rig.published(1, 1, 2);
    rig.told();
    rig
}

fn voids(rig: &mut Rig) -> Vec<(Conn, String)> {
    let told = rig.told().into_iter();
    told.filter_map(|(conn, _, body)| match body {
        Down::Void(void) => Some((conn, void.reason)),
        _ => None,
    })
    .collect()
}

fn refusal(rig: &mut Rig, hello: v1::Hello) -> Option<String> {
    rig.told();
    rig.event(Event::Hello {
        conn: 99,
        peer: "10.0.0.9:1".into(),
        hello,
    })
    .unwrap();
    rig.told().into_iter().find_map(|(_, _, body)| match body {
        Down::Refusal(refusal) => Some(refusal.message),
        _ => None,
    })
}

#[test]
fn ranks_go_by_name_and_each_knows_only_its_neighbour() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "c"), (2, "a"), (3, "b")] {
        rig.attach(conn, name);
    }
    let assignments: Vec<_> = rig
        .told()
        .into_iter()
        .filter_map(|(conn, generation, body)| match body {
            Down::Assignment(assignment) => Some((conn, generation, assignment)),
            _ => None,
        })
        .collect();
    let places: Vec<_> = assignments
        .iter()
        .map(|(conn, _, a)| (*conn, a.rank, a.next_address.as_str()))
        .collect();
    assert_eq!(places, [(2, 0, "b:1"), (3, 1, "c:1"), (1, 2, "a:1")]);
    assert!(
        assignments
            .iter()
            .all(|(_, generation, a)| (*generation, a.world) == (1, 3) && a.restore.is_none())
    );
}

#[test]
fn a_run_trains_to_the_last_sample_and_its_ledger_says_so() {
    let mut rig = halfway();
    rig.step(&[1, 2], 1, 3);
    rig.written(1, 1, 3);
    assert!(matches!(&rig.told()[..], [(1, 1, Down::Publish(publish))] if publish.step == 3));
    rig.published(1, 1, 3);
    assert_eq!(rig.status().state(), RunState::Finished);
    rig.left(1, 1, LeftReason::Finished);
    rig.left(2, 1, LeftReason::Finished);
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.breaks, []);
    assert!(verdict.finished);
    assert!(rig.deleted.is_empty(), "nothing is verified yet");
    assert!(rig.told().is_empty(), "nobody is called void after the end");
}

#[test]
fn a_step_waits_for_every_rank_and_repeats_change_nothing() {
    let mut rig = training();
    rig.report(1, 1, 1, 0, 2);
    rig.report(1, 1, 1, 0, 2);
    assert_eq!(rig.run().step, 0);
    rig.report(2, 1, 1, 1, 2);
    assert_eq!(rig.run().step, 1);
    rig.report(2, 1, 1, 1, 2);
    assert_eq!(rig.ledger().len(), 2);
}

#[test]
fn reports_that_come_before_the_last_rank_has_formed_are_kept() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    rig.attach(1, "a");
    rig.attach(2, "b");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    rig.step(&[1, 2], 1, 1);
    assert_eq!(rig.run().step, 0);
    rig.formed(2, 1, 0);
    assert_eq!(rig.run().step, 1);
}

#[test]
fn a_checkpoint_is_journalled_only_when_its_step_is_accounted_for() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.report(1, 1, 2, 0, 2);
    rig.written(1, 1, 2);
    assert!(rig.run().checkpoints.is_empty());
    rig.report(2, 1, 2, 1, 2);
    assert_eq!(rig.run().recovery_step(), 2);
    assert!(matches!(&rig.told()[..], [(1, 1, Down::Publish(_))]));
}

#[test]
fn a_checkpoint_that_begins_gets_the_ledgers_head_behind_its_step() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.report(1, 1, 2, 0, 2);
    let begun = || Up::CheckpointBegun(v1::CheckpointBegun { step: 2 });
    rig.say(1, 1, begun());
    assert!(
        rig.told().is_empty(),
        "not every rank has reported the step"
    );
    rig.report(2, 1, 2, 1, 2);
    let head = rig.ledger().last().unwrap().hash.to_vec();
    let expected = Down::LedgerHead(v1::LedgerHead {
        step: 2,
        hash: head,
    });
    assert_eq!(rig.told(), [(1, 1, expected.clone())]);
    rig.say(1, 1, begun());
    assert_eq!(rig.told(), [(1, 1, expected)], "a repeat is answered again");
    rig.say(2, 1, begun());
    let told = voids(&mut rig);
    assert!(told[0].1.contains("rank 0's task"), "{told:?}");
}

#[test]
fn a_lost_worker_voids_the_generation_and_the_next_resumes_from_the_checkpoint_if_nobody_holds_more()
 {
    let mut rig = halfway();
    rig.step(&[1, 2], 1, 3);
    rig.lose(2);
    let told = voids(&mut rig);
    assert_eq!(told.len(), 1);
    assert!(
        told[0].0 == 1 && told[0].1.contains("rank 1 (b) was lost while"),
        "{told:?}"
    );
    rig.left(1, 1, LeftReason::Void);
    rig.wait(1.0);
    assert!(
        rig.status().reason.contains("waiting for b to come back"),
        "{}",
        rig.status().reason
    );
    rig.attach(3, "b");
    rig.wait(1.1);
    let told = rig.told();
    let restores: Vec<_> = told
        .iter()
        .filter_map(|(_, generation, body)| match body {
            Down::Assignment(a) => a
                .restore
                .as_ref()
                .map(|restore| (*generation, restore.step)),
            _ => None,
        })
        .collect();
    assert_eq!(restores, [(2, 2), (2, 2)]);
    assert!(matches!(
        rig.ledger().last().map(|r| &r.body),
        Some(Body::Void { after_step: 2, reason, .. }) if reason.contains("rank 1 (b) was lost")
    ));
    assert_eq!(rig.run().step, 2);
}

#[test]
fn survivors_go_on_alone_when_the_lost_one_stays_away() {
    let mut rig = halfway();
    rig.lose(2);
    rig.left(1, 1, LeftReason::Void);
    rig.wait(2.5);
    rig.wait(2.5);
    assert_eq!((rig.status().generation, rig.status().world), (2, 1));
}

#[test]
fn a_member_that_does_not_leave_is_dropped() {
    let mut rig = halfway();
    rig.fault(2, 1, FaultKind::Transient, "no space left on device");
    assert_eq!(voids(&mut rig).len(), 1);
    rig.left(2, 1, LeftReason::Fault);
    for _ in 0..11 {
        rig.heartbeat(1);
        rig.heartbeat(2);
        rig.wait(1.0);
    }
    assert_eq!(rig.closed, [1]);
    for _ in 0..3 {
        rig.heartbeat(2);
        rig.wait(2.0);
    }
    assert_eq!(rig.status().generation, 2, "the other worker trains on");
}

#[test]
fn silence_is_loss_but_not_when_the_coordinator_itself_slept() {
    let mut rig = halfway();
    rig.wait(60.0);
    assert_eq!(
        rig.machine
            .worker_list()
            .iter()
            .filter(|worker| worker.phase == "lost")
            .count(),
        0
    );
    for _ in 0..11 {
        rig.heartbeat(1);
        rig.wait(1.0);
    }
    let told = voids(&mut rig);
    assert!(
        told.len() == 1 && told[0].1.contains("silent for more than 10 s"),
        "{told:?}"
    );
}

#[test]
fn a_wrong_report_fails_the_run_with_rank_and_field() {
    let mut rig = training();
    let plan = plan();
    rig.report(1, 1, 1, 0, 2);
    rig.say(
        2,
        1,
        Up::Step(v1::StepReport {
            grad_norm: 2.0,
            ..report(&plan, 1, 1, 2)
        }),
    );
    let status = rig.status();
    assert_eq!(status.state(), RunState::Failed);
    assert!(
        status.reason.contains("gradient norm") && status.reason.contains("rank 1 (b)"),
        "{}",
        status.reason
    );
    assert_eq!(voids(&mut rig).len(), 2);
    assert_eq!(rig.run().step, 0);
}

#[test]
fn a_fault_of_the_input_fails_the_run_and_frees_the_workers() {
    let mut rig = training();
    rig.fault(1, 1, FaultKind::Input, "part-3.parquet is truncated");
    rig.left(1, 1, LeftReason::Fault);
    rig.submit("rig-2");
    assert_eq!(rig.status().world, 0);
    rig.say_of(
        "rig-1".into(),
        2,
        1,
        Up::Left(v1::Left {
            reason: LeftReason::Void.into(),
            held: None,
        }),
    );
    let first = rig.machine.status(1).unwrap();
    assert_eq!(first.state(), RunState::Failed);
    assert!(
        first.reason.contains("part-3.parquet is truncated"),
        "{}",
        first.reason
    );
    assert_eq!(rig.status().world, 2, "the next run got the workers");
}

#[test]
fn data_that_is_too_small_for_the_budget_fails_the_run() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    rig.attach(1, "a");
    rig.wait(1.1);
    let formed = v1::Formed {
        step: 0,
        replica_hash: vec![1; 32],
        windows: 3,
        manifest_hash: vec![2; 32],
    };
    rig.say(1, 1, Up::Formed(formed));
    assert_eq!(rig.status().state(), RunState::Failed);
    assert!(
        rig.status().reason.contains("the dataset holds 3"),
        "{}",
        rig.status().reason
    );
}

#[test]
fn three_failures_at_the_same_step_are_enough() {
    let mut rig = training();
    for generation in 1..=3 {
        if generation > 1 {
            rig.formed(1, generation, 0);
            rig.formed(2, generation, 0);
        }
        rig.fault(1, generation, FaultKind::Transient, "out of memory");
        rig.left(1, generation, LeftReason::Fault);
        rig.left(2, generation, LeftReason::Void);
        rig.wait(1.1);
    }
    assert_eq!(rig.status().state(), RunState::Failed);
    let reason = rig.status().reason;
    assert!(
        reason.contains("3 generations in a row failed at step 1")
            && reason.contains("out of memory"),
        "{reason}"
    );
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    assert_eq!(rig.status().state(), RunState::Forming);
}

#[test]
fn workers_that_vanish_while_forming_are_not_held_against_the_run() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for conn in 1..10 {
        rig.attach(conn, "a");
        rig.wait(1.1);
        rig.lose(conn);
    }
    assert_eq!(rig.status().state(), RunState::Forming);
}

#[test]
fn cancel_stops_with_a_checkpoint_and_resume_goes_on_from_it() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.event(Event::Cancel(1)).unwrap();
    assert_eq!(rig.status().state(), RunState::Stopping);
    let stops = rig
        .told()
        .into_iter()
        .filter(|(_, _, body)| matches!(body, Down::Stop(_)))
        .count();
    assert_eq!(stops, 2);
    rig.written(1, 1, 1);
    rig.published(1, 1, 1);
    rig.left(1, 1, LeftReason::Stopped);
    rig.left(2, 1, LeftReason::Stopped);
    assert_eq!(rig.status().state(), RunState::Cancelled);
    assert_eq!(rig.run().step, 1);
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    rig.wait(1.1);
    assert!(
        rig.told()
            .iter()
            .any(|(_, _, body)| matches!(body, Down::Assignment(a) if a.restore.is_some()))
    );
}

#[test]
fn a_queued_run_is_cancelled_at_once_and_a_finished_one_not_at_all() {
    let mut rig = training();
    rig.submit("rig-2");
    rig.event(Event::Cancel(2)).unwrap();
    assert_eq!(rig.status().state(), RunState::Cancelled);
    let mut rig = halfway();
    rig.step(&[1, 2], 1, 3);
    rig.written(1, 1, 3);
    rig.published(1, 1, 3);
    assert!(
        rig.event(Event::Cancel(1))
            .unwrap_err()
            .to_string()
            .contains("has finished")
    );
    assert!(
        rig.event(Event::Resume {
            run: 1,
            strict: false
        })
        .is_err()
    );
    assert_eq!(rig.event(Event::Cancel(7)), Err(Refused::NoRun(7)));
}

#[test]
fn shutdown_stops_with_a_checkpoint_then_tells_everybody() {
    let mut rig = training();
    rig.attach(3, "c");
    rig.event(Event::Shutdown("asked to".into())).unwrap();
    assert!(!rig.exited);
    assert_eq!(
        rig.event(Event::Submit(super::rig::submission("late"))),
        Err(Refused::ShuttingDown)
    );
    rig.left(1, 1, LeftReason::Stopped);
    rig.left(2, 1, LeftReason::Stopped);
    assert!(rig.exited);
    let goodbyes = rig
        .told()
        .into_iter()
        .filter(|(_, _, body)| matches!(body, Down::Goodbye(_)))
        .count();
    assert_eq!(goodbyes, 3);
    assert_eq!(rig.status().state(), RunState::Cancelled);
}

#[test]
fn strangers_are_refused_with_a_remedy() {
    let mut rig = Rig::new();
    rig.attach(1, "a");
    let build = v1::Hello {
        build: "other".into(),
        ..hello("b", 1)
    };
    assert!(
        refusal(&mut rig, build)
            .unwrap()
            .contains("worker b is build other, the coordinator is build test")
    );
    let plan = v1::Hello {
        plan_probe: vec![6; 32],
        ..hello("b", 1)
    };
    assert!(
        refusal(&mut rig, plan)
            .unwrap()
            .contains("order the data in another way")
    );
    let twin = refusal(&mut rig, hello("a", 2)).unwrap();
    assert_eq!(twin, "worker a is already attached from a:9; choose --name");
    assert_eq!(refusal(&mut rig, hello("b", 1)), None);
}

#[test]
fn a_supervisor_that_reconnects_takes_the_place_of_its_dead_stream() {
    let mut rig = training();
    rig.event(Event::Hello {
        conn: 5,
        peer: "b:9".into(),
        hello: hello("b", 2),
    })
    .unwrap();
    assert_eq!(rig.closed, [2]);
    let told = voids(&mut rig);
    assert!(
        told.len() == 1 && told[0].1.contains("it attached again"),
        "{told:?}"
    );
}

#[test]
fn a_restarted_coordinator_voids_what_neither_workers_nor_a_checkpoint_hold_and_forms_anew() {
    let mut rig = halfway();
    rig.step(&[1, 2], 1, 3);
    rig.restart(usize::MAX);
    assert_eq!(rig.run().step, 3);
    assert_eq!(rig.status().state(), RunState::Forming);
    rig.attach(7, "a");
    rig.attach(8, "b");
    rig.wait(1.1);
    assert_eq!(rig.status().generation, 2);
    assert_eq!(rig.status().world, 2);
    assert_eq!(rig.run().step, 2);
}

#[test]
fn a_stop_that_a_crash_interrupted_is_a_stop() {
    let mut rig = halfway();
    rig.event(Event::Cancel(1)).unwrap();
    rig.restart(usize::MAX);
    assert_eq!(rig.status().state(), RunState::Stopping);
    rig.attach(7, "a");
    assert_eq!(rig.status().state(), RunState::Cancelled);
}

#[test]
fn runs_are_found_by_unique_prefix() {
    let mut rig = Rig::new();
    assert_eq!(rig.machine.find(""), Err(FindError::Empty));
    rig.submit("alpha-1");
    rig.submit("alpha-10");
    assert_eq!(rig.machine.find(""), Ok(2));
    assert_eq!(rig.machine.find("alpha-1"), Ok(1));
    assert!(
        rig.machine
            .find("al")
            .unwrap_err()
            .to_string()
            .contains("alpha-1, alpha-10")
    );
    assert!(rig.machine.find("beta").is_err());
}

#[test]
fn a_full_house_does_not_wait() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "a"), (2, "b"), (3, "c"), (4, "d")] {
        rig.attach(conn, name);
    }
    assert_eq!(rig.status().world, 3);
    assert_eq!(rig.now, Duration::ZERO);
}
