//! Workers that are drained, or put aside because they break their generations.

use supra_proto::v1::{
    self, FaultKind, LeftReason, RunState, coordinator_message::Body as Down,
    worker_message::Body as Up,
};

use super::super::rig::{Rig, hello};
use super::super::{Event, Fact, State};

/// Workers a (stream 1) and b (stream 2) train in generation 1.
fn training() -> Rig {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    rig.attach(1, "a");
    rig.attach(2, "b");
    rig.wait(1.1);
    rig.told();
    rig
}

/// b reports a fault of its environment, and both leave.
fn break_by_b(rig: &mut Rig, generation: u64) {
    rig.fault(2, generation, FaultKind::Transient, "xid 79");
    rig.left(2, generation, LeftReason::Fault);
    rig.left(1, generation, LeftReason::Void);
    rig.wait(1.1);
}

/// b has broken two generations; the third is a step further, which keeps the run alive.
fn twice_broken() -> Rig {
    let mut rig = training();
    break_by_b(&mut rig, 1);
    break_by_b(&mut rig, 2);
    rig.formed(1, 3, 0);
    rig.formed(2, 3, 0);
    rig.step(&[1, 2], 3, 1);
    rig
}

/// b has broken three generations.
fn broken() -> Rig {
    let mut rig = twice_broken();
    break_by_b(&mut rig, 3);
    rig
}

/// b attaches over another stream, under the supervisor of this number.
fn again(conn: u64, instance: u64) -> Event {
    Event::Hello {
        conn,
        peer: "b:9".into(),
        hello: hello("b", instance),
    }
}

fn aside(rig: &Rig, name: &str) -> String {
    let workers = rig.machine.worker_list();
    let worker = workers.iter().find(|worker| worker.name == name);
    worker.expect("is listed").aside.clone()
}

#[test]
fn a_worker_that_breaks_three_generations_is_put_aside_and_the_others_go_on() {
    let rig = broken();
    assert_eq!((rig.status().generation, rig.status().world), (4, 1));
    assert_eq!(aside(&rig, "a"), "");
    let why = aside(&rig, "b");
    assert!(
        why.starts_with("broke 3 of the last 3 generations; the last time rank 1 (b) failed")
            && why.contains("xid 79"),
        "{why}"
    );
}

/// Both ranks say that the device of `culprit` computes wrong, and leave.
fn hardware(rig: &mut Rig, generation: u64, culprit: Option<u32>) {
    for conn in [1, 2] {
        let fault = v1::Fault {
            kind: FaultKind::Hardware.into(),
            message: "rank 1 computed a loss that is not finite".into(),
            step: 1,
            culprit,
            ..v1::Fault::default()
        };
        rig.say(conn, generation, Up::Fault(fault));
    }
    rig.left(1, generation, LeftReason::Fault);
    rig.left(2, generation, LeftReason::Fault);
    rig.wait(1.1);
}

#[test]
fn the_second_hardware_fault_of_a_worker_puts_it_aside_whoever_says_so_first() {
    let mut rig = training();
    hardware(&mut rig, 1, Some(1));
    assert_eq!((rig.status().generation, rig.status().world), (2, 2));
    assert_eq!(aside(&rig, "b"), "");
    hardware(&mut rig, 2, Some(1));
    assert_eq!((rig.status().generation, rig.status().world), (3, 1));
    assert_eq!(aside(&rig, "a"), "");
    let why = aside(&rig, "b");
    assert!(
        why.starts_with(
            "broke 2 of the last 2 generations; the last time hardware fault of rank 1 (b) in step 1: rank 1 computed"
        ),
        "{why}"
    );
}

#[test]
fn a_hardware_fault_of_nobody_knows_whom_blames_nobody_and_ends_the_generation() {
    let mut rig = training();
    for generation in 1..=2 {
        hardware(&mut rig, generation, None);
    }
    assert_eq!((rig.status().generation, rig.status().world), (3, 2));
    assert_eq!((aside(&rig, "a"), aside(&rig, "b")), Default::default());
    hardware(&mut rig, 3, Some(9));
    assert_eq!(rig.status().state(), RunState::Failed, "always step 1");
}

#[test]
fn only_a_new_supervisor_brings_it_back() {
    let mut rig = broken();
    rig.lose(2);
    rig.event(again(3, 2)).unwrap();
    assert!(!aside(&rig, "b").is_empty(), "the same supervisor");
    rig.lose(3);
    rig.event(again(4, 4)).unwrap();
    assert_eq!(aside(&rig, "b"), "");
}

#[test]
fn three_failures_at_the_same_step_still_stop_the_run() {
    let mut rig = training();
    for generation in 1..=3 {
        break_by_b(&mut rig, generation);
    }
    assert_eq!(rig.status().state(), RunState::Failed);
}

#[test]
fn the_one_that_died_is_to_blame_and_not_those_that_noticed_first() {
    let mut rig = training();
    for (generation, b) in [(1, 2), (2, 12), (3, 22)] {
        if generation == 3 {
            rig.formed(1, 3, 0);
            rig.formed(b, 3, 0);
            rig.step(&[1, b], 3, 1);
        }
        let noticed = "rank 1 closed the connection";
        rig.fault(1, generation, FaultKind::Peer, noticed);
        rig.left(1, generation, LeftReason::Fault);
        rig.lose(b);
        rig.event(Event::Hello {
            conn: b + 10,
            peer: "b:9".into(),
            hello: hello("b", 2),
        })
        .unwrap();
        rig.wait(1.1);
    }
    assert_eq!(aside(&rig, "a"), "");
    assert!(aside(&rig, "b").contains("rank 1 (b) was lost"));
}

#[test]
fn a_run_that_lacks_workers_names_those_that_are_aside() {
    let mut rig = training();
    rig.event(Event::Drain("a".into())).unwrap();
    rig.event(Event::Drain("b".into())).unwrap();
    rig.left(1, 1, LeftReason::Regrouped);
    rig.left(2, 1, LeftReason::Regrouped);
    let reason = rig.status().reason;
    assert!(
        reason.starts_with(
            "waiting for 1 worker: 0 attached, without a (drained by a user), b (drained by a user)"
        ),
        "{reason}"
    );
}

#[test]
fn a_drained_member_is_left_out_of_the_next_generation() {
    let mut rig = training();
    rig.event(Event::Drain("b".into())).unwrap();
    rig.event(Event::Drain("b".into())).unwrap();
    assert!(rig.told().is_empty(), "it has no step to finish yet");
    rig.formed(1, 1, 0);
    rig.formed(2, 1, 0);
    let told = rig.told();
    assert_eq!(told.len(), 2, "a repeat is harmless: {told:?}");
    for (_, _, body) in told {
        assert!(
            matches!(&body, Down::Regroup(regroup) if regroup.reason == "worker b is drained"),
            "{body:?}"
        );
    }
    rig.left(1, 1, LeftReason::Regrouped);
    rig.left(2, 1, LeftReason::Regrouped);
    rig.wait(1.1);
    assert_eq!((rig.status().generation, rig.status().world), (2, 1));
    assert_eq!(aside(&rig, "b"), "drained by a user");
}

#[test]
fn a_worker_that_is_started_anew_before_its_predecessor_is_put_aside_stays_in() {
    let mut rig = twice_broken();
    rig.fault(2, 3, FaultKind::Transient, "xid 79");
    // Its name is free when it was silent for a while.
    rig.wait(2.0);
    rig.wait(2.0);
    rig.event(again(4, 4)).unwrap();
    rig.left(1, 3, LeftReason::Void);
    rig.wait(1.1);
    assert_eq!(aside(&rig, "b"), "");
    assert_eq!((rig.status().generation, rig.status().world), (4, 2));
    assert!(rig.machine.state().aside.is_empty());
}

#[test]
fn a_worker_without_a_place_is_drained_at_once() {
    let mut rig = Rig::new();
    rig.attach(1, "a");
    rig.event(Event::Drain("a".into())).unwrap();
    assert!(
        rig.told()
            .iter()
            .all(|(_, _, body)| !matches!(body, Down::Regroup(_)))
    );
    rig.submit("rig-1");
    rig.wait(5.0);
    assert_eq!(rig.status().world, 0);
    assert_eq!(rig.machine.state(), &rig.replayed());
    assert_ne!(rig.machine.state(), &State::default());
}

#[test]
fn a_drained_worker_that_goes_is_not_waited_for() {
    let mut rig = training();
    rig.event(Event::Drain("b".into())).unwrap();
    rig.left(1, 1, LeftReason::Regrouped);
    rig.left(2, 1, LeftReason::Regrouped);
    rig.lose(2);
    rig.wait(1.1);
    assert_eq!((rig.status().generation, rig.status().world), (2, 1));
}

#[test]
fn an_unknown_name_is_refused_with_the_nearest() {
    let mut rig = Rig::new();
    rig.attach(1, "node7/cuda:0");
    rig.attach(2, "desk/cpu");
    let refused = rig.event(Event::Drain("node7".into())).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no attached worker is called node7; did you mean node7/cuda:0? `supra workers` lists them"
    );
}

/// The coordinator is killed and started again, and a and b are back over new streams; b has this supervisor.
fn restart(rig: &mut Rig, instance: u64) {
    rig.restart(usize::MAX);
    rig.event(Event::Hello {
        conn: 11,
        peer: "a:9".into(),
        hello: hello("a", 1),
    })
    .unwrap();
    rig.event(again(12, instance)).unwrap();
    rig.wait(4.0);
}

#[test]
fn a_coordinator_that_restarts_remembers_who_is_drained() {
    let mut rig = training();
    rig.event(Event::Drain("b".into())).unwrap();
    restart(&mut rig, 2);
    assert_eq!(aside(&rig, "b"), "drained by a user");
    assert_eq!((rig.status().generation, rig.status().world), (2, 1));
    restart(&mut rig, 9);
    assert_eq!(aside(&rig, "b"), "", "its supervisor was started anew");
    assert_eq!((rig.status().generation, rig.status().world), (3, 2));
    restart(&mut rig, 9);
    assert_eq!(aside(&rig, "b"), "", "nor is that forgotten");
    assert_eq!(rig.machine.state(), &rig.replayed());
}

#[test]
fn a_coordinator_that_restarts_remembers_who_is_put_aside_and_why() {
    let mut rig = broken();
    let why = aside(&rig, "b");
    restart(&mut rig, 2);
    assert!(!why.is_empty());
    assert_eq!(aside(&rig, "b"), why);
    assert_eq!(rig.status().world, 1);
    let facts = rig.facts.iter();
    let aside = facts.filter(|fact| matches!(fact, Fact::PutAside { .. }));
    assert_eq!(aside.count(), 1, "it is decided once");
}

#[test]
fn a_worker_that_is_aside_and_away_is_not_waited_for_after_a_restart() {
    let mut rig = training();
    rig.event(Event::Drain("b".into())).unwrap();
    rig.restart(usize::MAX);
    rig.attach(11, "a");
    // As long as any member has to say what it holds, and no longer.
    rig.wait(3.1);
    rig.wait(1.1);
    assert_eq!((rig.status().generation, rig.status().world), (2, 1));
}
