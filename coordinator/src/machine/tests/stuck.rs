//! What becomes of generations that stand still.

use std::time::Duration;

use supra_proto::v1::{self, LeftReason, Phase, worker_message::Body as Up};

use super::super::Event;
use super::super::rig::{Rig, held, hello};
use super::voids;

/// What a heartbeat says: phase and step.
type Doing = (Phase, u64);

/// Workers a, b and c (streams 1 to 3) train; step 1 is applied.
fn training() -> Rig {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
        rig.attach(conn, name);
    }
    for conn in 1..=3 {
        rig.formed(conn, 1, 0);
    }
    rig.step(&[1, 2, 3], 1, 1);
    rig.told();
    rig
}

fn beat(rig: &mut Rig, conn: u64, (phase, step): Doing, waiting: Duration) {
    let heartbeat = v1::Heartbeat {
        phase: phase.into(),
        step,
        in_phase_ms: 0,
        waiting_ms: waiting.as_millis() as u64,
    };
    rig.say(conn, 1, Up::Heartbeat(heartbeat));
}

/// Lets time pass while every worker says what it does; the reasons of the voids told.
fn pass(rig: &mut Rig, seconds: u64, doing: [Doing; 3]) -> Vec<String> {
    pass_waiting(rig, seconds, doing, [false; 3])
}

/// The same while some of them wait for others.
fn pass_waiting(rig: &mut Rig, seconds: u64, doing: [Doing; 3], waits: [bool; 3]) -> Vec<String> {
    let since = rig.now;
    for _ in 0..seconds {
        for (conn, (doing, waits)) in (1..).zip(doing.into_iter().zip(waits)) {
            let waited = rig.now - since;
            let waiting = if waits { waited } else { Duration::ZERO };
            beat(rig, conn, doing, waiting);
        }
        rig.wait(1.0);
    }
    let told = voids(rig).into_iter();
    told.map(|(_, reason)| reason).collect()
}

const ON: Doing = (Phase::Training, 2);

#[test]
fn a_rank_that_does_not_report_what_others_have_is_stuck() {
    let mut rig = training();
    rig.report(1, 1, 2, 0, 3);
    rig.report(3, 1, 2, 2, 3);
    let ahead = (Phase::Training, 3);
    assert!(pass(&mut rig, 31, [ahead, ON, ahead]).is_empty());
    let told = pass(&mut rig, 1, [ahead, ON, ahead]);
    assert_eq!(
        told,
        vec!["rank 1 (b) is stuck: training step 2 for 32 s, usually 0.1 s"; 3],
        "the stuck one is told too"
    );
    assert!(rig.closed.is_empty(), "it may still leave");
}

#[test]
fn when_nobody_is_behind_the_reason_says_so() {
    let mut rig = training();
    let told = pass(&mut rig, 32, [ON; 3]);
    assert!(
        told[0].starts_with("none of 3 ranks is behind, but all are stuck: training step 2"),
        "{told:?}"
    );
}

#[test]
fn a_long_checkpoint_is_no_stuck_step() {
    let mut rig = training();
    rig.step(&[1, 2, 3], 1, 2);
    let writing = (Phase::Checkpointing, 2);
    let ahead = (Phase::Training, 3);
    assert!(pass(&mut rig, 300, [writing, ahead, ahead]).is_empty());
    assert!(
        pass(&mut rig, 31, [ahead; 3]).is_empty(),
        "time begins anew"
    );
    assert_eq!(pass(&mut rig, 2, [ahead; 3]).len(), 3);
}

#[test]
fn an_evaluation_is_no_stuck_step_and_one_that_never_ends_is_stuck_in_its_rank() {
    let mut rig = training();
    rig.step(&[1, 2, 3], 1, 2);
    let evaluating = (Phase::Evaluating, 2);
    let told = pass_waiting(&mut rig, 1802, [evaluating; 3], [true, false, true]);
    assert_eq!(
        told[0],
        "rank 1 (b) is stuck: evaluating the state behind step 2 for 1801 s, at most 1800 s; 2 ranks wait for it"
    );
}

#[test]
fn a_checkpoint_that_never_ends_is_stuck_in_rank_0() {
    let mut rig = training();
    let (writing, ahead) = ((Phase::Checkpointing, 2), (Phase::Training, 3));
    let told = pass(&mut rig, 1802, [writing, ahead, ahead]);
    assert_eq!(
        told[0],
        "rank 0 (a) is stuck: writing the checkpoint of step 2 for 1801 s, at most 1800 s"
    );
}

#[test]
fn the_coordinators_own_sleep_is_no_stuck_step() {
    let mut rig = training();
    pass(&mut rig, 20, [ON; 3]);
    rig.wait(500.0);
    assert!(pass(&mut rig, 25, [ON; 3]).is_empty());
}

#[test]
fn a_rank_that_never_forms_is_stuck_loading() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    for (conn, name) in [(1, "a"), (2, "b"), (3, "c")] {
        rig.attach(conn, name);
    }
    rig.formed(1, 1, 0);
    rig.formed(3, 1, 0);
    rig.told();
    let idle = (Phase::Training, 0);
    let told = pass(&mut rig, 1802, [idle, (Phase::Loading, 0), idle]);
    assert_eq!(
        told[0],
        "rank 1 (b) is stuck: loading for 1801 s, at most 1800 s"
    );
}

#[test]
fn a_stuck_worker_that_does_not_leave_is_dropped_and_the_others_go_on() {
    let mut rig = training();
    rig.report(1, 1, 2, 0, 3);
    rig.report(3, 1, 2, 2, 3);
    pass(&mut rig, 32, [ON; 3]);
    rig.left(1, 1, LeftReason::Void);
    rig.left(3, 1, LeftReason::Void);
    let idle = (Phase::Idle, 0);
    pass(&mut rig, 16, [idle, ON, idle]);
    assert_eq!(rig.closed, [2]);
    assert_eq!((rig.status().generation, rig.status().world), (2, 2));
}

#[test]
fn a_rank_that_hangs_in_mid_step_is_told_from_those_that_wait_for_it() {
    let mut rig = training();
    let told = pass_waiting(&mut rig, 32, [ON; 3], [true, false, true]);
    assert_eq!(
        told[0],
        "rank 1 (b) is stuck: training step 2 for 32 s, usually 0.1 s; 2 ranks wait for it"
    );
}

#[test]
fn a_network_between_ranks_that_does_not_carry_is_nobodys_blame() {
    let mut rig = training();
    let told = pass_waiting(&mut rig, 32, [ON; 3], [true; 3]);
    assert!(
        told[0].starts_with("all 3 ranks wait for each other: training step 2"),
        "{told:?}"
    );
}

#[test]
fn a_turn_in_an_exchange_that_goes_on_is_no_wait() {
    let mut rig = training();
    let mut told = Vec::new();
    while told.is_empty() {
        for (conn, waiting) in [(1, 1), (2, 0), (3, 1)] {
            beat(&mut rig, conn, ON, Duration::from_secs(waiting));
        }
        rig.wait(1.0);
        told = voids(&mut rig);
    }
    let (_, reason) = &told[0];
    assert!(reason.starts_with("none of 3 ranks is behind"), "{reason}");
}

#[test]
fn a_worker_that_hangs_again_and_again_is_put_aside_and_those_that_wait_for_it_are_not() {
    let mut rig = training();
    for (generation, b, step) in [(1, 2, 1), (2, 12, 1), (3, 22, 2)] {
        if generation > 1 {
            for conn in [1, b, 3] {
                rig.formed(conn, generation, 1);
            }
        }
        if generation == 3 {
            // A step further than the others, which keeps the run alive.
            rig.step(&[1, b, 3], 3, 2);
        }
        rig.told();
        let since = rig.now;
        while voids(&mut rig).is_empty() {
            let waited = rig.now - since;
            for (conn, waiting) in [(1, waited), (b, Duration::ZERO), (3, waited)] {
                beat(&mut rig, conn, ON, waiting);
            }
            rig.wait(1.0);
        }
        for conn in [1, 3] {
            let held = Some(held(generation, step));
            rig.left_holding(conn, generation, LeftReason::Void, held);
        }
        rig.wait(2.5);
        rig.lose(b);
        rig.event(Event::Hello {
            conn: b + 10,
            peer: "b:9".into(),
            hello: hello("b", 2),
        })
        .unwrap();
        rig.wait(1.1);
    }
    assert_eq!((rig.status().generation, rig.status().world), (4, 2));
    for worker in rig.machine.worker_list() {
        assert_eq!(worker.aside.is_empty(), worker.name != "b", "{worker:?}");
        assert!(worker.name != "b" || worker.aside.contains("rank 1 (b) is stuck"));
    }
}
