//! A coordinator that starts again while its workers train on.

use supra_proto::v1::{
    self, FaultKind, Formed, LeftReason, RunState, coordinator_message::Body as Down,
    worker_message::Body as Up,
};

use super::super::rig::{MANIFEST, Rig, WINDOWS, checkpoint, held, hello};
use super::super::*;
use super::{halfway, training};
use crate::audit::{Options, audit};

fn formed() -> Formed {
    Formed {
        step: 0,
        replica_hash: vec![1; 32],
        windows: WINDOWS,
        manifest_hash: MANIFEST.to_vec(),
    }
}

fn place(rank: u32) -> v1::Place {
    v1::Place {
        run: "rig-1".into(),
        generation: 1,
        rank,
        formed: Some(formed()),
        from: None,
        left: false,
        step_seconds: 0.0,
    }
}

/// A worker attaches with a place and perhaps a state; answers with what it need not report again.
fn back(rig: &mut Rig, conn: Conn, name: &str, place: v1::Place, held: Option<v1::Held>) -> u64 {
    let hello = v1::Hello {
        place: Some(Box::new(place)),
        held,
        ..hello(name, conn)
    };
    let peer = format!("{name}:9");
    rig.event(Event::Hello { conn, peer, hello }).unwrap();
    let mut sent = rig.sent.iter().rev();
    sent.find_map(|(to, _, body)| match body {
        Down::Welcome(welcome) if *to == conn => Some(welcome.known_step),
        _ => None,
    })
    .unwrap()
}

fn broke(rig: &Rig) -> Vec<&str> {
    let facts = rig.facts.iter();
    facts
        .filter_map(|fact| match fact {
            Fact::Broke { cause, .. } => Some(cause.as_str()),
            _ => None,
        })
        .collect()
}

fn voided(rig: &mut Rig) -> Vec<Conn> {
    let told = rig.told().into_iter();
    told.filter(|(_, _, body)| matches!(body, Down::Void(_)))
        .map(|(conn, _, _)| conn)
        .collect()
}

/// The ledger adds up, and `replay` gives the live state.
fn sound(rig: &Rig) {
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.breaks.len(), 0, "{:?}", verdict.breaks);
    assert_eq!(rig.replayed(), *rig.machine.state());
}

/// a and b train; the coordinator has applied two steps, of which a crash took one and what it came to, and starts again.
fn restarted() -> Rig {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.step(&[1, 2], 1, 2);
    rig.restart(rig.facts.len() - 2);
    assert_eq!(rig.run().step, 1);
    rig
}

#[test]
fn a_generation_whose_members_are_all_back_goes_on_as_if_nothing_had_happened() {
    let mut rig = restarted();
    let reason = rig.status().reason;
    assert!(reason.contains("waiting for a, b to come back"), "{reason}");
    assert_eq!(back(&mut rig, 7, "b", place(1), None), 1);
    rig.report(7, 1, 2, 1, 2);
    rig.report(7, 1, 3, 1, 2);
    rig.wait(100.0);
    rig.heartbeat(7);
    assert_eq!(rig.run().step, 1, "a has not said so");
    assert_eq!(back(&mut rig, 8, "a", place(0), None), 1);
    assert_eq!(rig.status().state(), RunState::Training);
    rig.report(8, 1, 2, 0, 2);
    rig.report(8, 1, 3, 0, 2);
    assert_eq!((rig.run().step, rig.run().generation), (3, 1));
    assert_eq!(rig.status().world, 2);
    let facts = rig.facts.iter();
    let taken = facts.filter(|fact| matches!(fact, Fact::TakenUp { generation: 1, .. }));
    assert_eq!((taken.count(), broke(&rig)), (1, vec![]));
    sound(&rig);
}

#[test]
fn a_step_that_hung_before_the_coordinator_died_is_found_by_what_steps_took_before() {
    let mut rig = restarted();
    for (conn, name, rank) in [(7, "a", 0), (8, "b", 1)] {
        let place = v1::Place {
            step_seconds: 0.3,
            ..place(rank)
        };
        back(&mut rig, conn, name, place, None);
        rig.report(conn, 1, 2, rank, 2);
    }
    assert_eq!(rig.run().step, 2);
    for _ in 0..60 {
        rig.heartbeat(7);
        rig.heartbeat(8);
        rig.wait(1.0);
    }
    let causes = broke(&rig);
    assert!(
        causes.len() == 1 && causes[0].contains("usually 0.3 s"),
        "{causes:?}"
    );
}

#[test]
fn a_member_that_has_left_ends_it_and_what_it_says_is_accounted_for() {
    let mut rig = restarted();
    let left = v1::Place {
        left: true,
        ..place(0)
    };
    assert_eq!(back(&mut rig, 7, "a", left, Some(held(1, 3))), 1);
    rig.report(7, 1, 2, 0, 2);
    rig.report(7, 1, 3, 0, 2);
    rig.left_holding(7, 1, LeftReason::Void, Some(held(1, 3)));
    assert_eq!(
        broke(&rig),
        ["the coordinator was restarted, and rank 0 (a) left meanwhile"]
    );
    assert_eq!(rig.run().failures.count, 0);
    // b still works there.
    back(&mut rig, 8, "b", place(1), None);
    assert_eq!(voided(&mut rig), [8]);
    rig.wait(1.1);
    assert_eq!(rig.run().generation, 1, "b has not left");
    rig.left_holding(8, 1, LeftReason::Void, Some(held(1, 3)));
    rig.wait(1.1);
    assert_eq!((rig.run().generation, rig.run().step), (2, 3));
    assert_eq!(rig.status().world, 2);
    sound(&rig);
}

#[test]
fn a_member_that_was_restarted_ends_it_at_once_and_the_others_have_a_moment() {
    let mut rig = restarted();
    rig.attach(7, "a");
    assert_eq!(
        broke(&rig),
        ["the coordinator was restarted, and a left generation 1 meanwhile"]
    );
    rig.wait(3.1);
    assert_eq!(rig.run().generation, 2, "b does not come back");
    rig.told();
    // Then it does, and is told. It is taken when it has left.
    assert_eq!(back(&mut rig, 8, "b", place(1), None), u64::MAX);
    assert_eq!(voided(&mut rig), [8]);
    rig.formed(7, 2, 0);
    rig.wait(1.1);
    assert!(rig.told().is_empty(), "nobody waits that could join");
    rig.left_holding(8, 1, LeftReason::Void, Some(held(1, 1)));
    rig.heartbeat(8);
    rig.wait(1.1);
    let regroups = |(_, _, body): &(_, _, Down)| matches!(body, Down::Regroup(_));
    assert!(rig.told().iter().any(regroups));
    sound(&rig);
}

#[test]
fn members_that_do_not_come_back_are_given_up_after_the_recipes_time() {
    let mut rig = restarted();
    back(&mut rig, 7, "a", place(0), None);
    for _ in 0..12 {
        rig.wait(9.9);
        rig.heartbeat(7);
    }
    assert_eq!(broke(&rig), [""; 0]);
    rig.wait(1.3);
    assert_eq!(
        broke(&rig),
        ["the coordinator was restarted, and b did not come back within 120 s"]
    );
    assert_eq!(voided(&mut rig), [7]);
    rig.left(7, 1, LeftReason::Void);
    rig.wait(3.1);
    assert_eq!(rig.status().world, 1);
    sound(&rig);
}

#[test]
fn a_stream_that_breaks_meanwhile_is_waited_for_like_the_others() {
    let mut rig = restarted();
    back(&mut rig, 7, "a", place(0), None);
    rig.lose(7);
    back(&mut rig, 8, "b", place(1), None);
    assert_eq!(rig.status().state(), RunState::Forming);
    back(&mut rig, 9, "a", place(0), None);
    assert_eq!(rig.status().state(), RunState::Training);
    rig.lose(9);
    assert_eq!(voided(&mut rig), [8], "told at once");
    sound(&rig);
}

#[test]
fn a_stop_that_a_crash_interrupted_is_asked_for_again() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.event(Event::Cancel(1)).unwrap();
    rig.restart(usize::MAX);
    assert_eq!(rig.status().state(), RunState::Stopping);
    back(&mut rig, 7, "a", place(0), None);
    back(&mut rig, 8, "b", place(1), None);
    let stops = rig.told().into_iter();
    let stops = stops.filter(|(_, _, body)| matches!(body, Down::Stop(_)));
    assert_eq!(stops.count(), 2);
    rig.step(&[7, 8], 1, 2);
    rig.written(7, 1, 2);
    rig.published(7, 1, 2);
    rig.left(7, 1, LeftReason::Stopped);
    rig.left(8, 1, LeftReason::Stopped);
    assert_eq!(rig.status().state(), RunState::Cancelled);
    assert_eq!((rig.run().step, rig.run().recovery_step()), (2, 2));
    sound(&rig);
}

#[test]
fn a_cancel_while_members_are_waited_for_is_told_as_they_come() {
    let mut rig = restarted();
    back(&mut rig, 7, "a", place(0), None);
    rig.told();
    rig.event(Event::Cancel(1)).unwrap();
    back(&mut rig, 8, "b", place(1), None);
    let stops = rig.told().into_iter();
    let stops = stops.filter(|(_, _, body)| matches!(body, Down::Stop(_)));
    assert_eq!(stops.map(|(conn, ..)| conn).collect::<Vec<_>>(), [7, 8]);
}

#[test]
fn a_checkpoint_due_meanwhile_is_offered_on_return() {
    let mut rig = restarted();
    let begun = Up::CheckpointBegun(v1::CheckpointBegun { step: 2 });
    back(&mut rig, 7, "a", place(0), None);
    rig.report(7, 1, 2, 0, 2);
    rig.say(7, 1, begun);
    rig.report(7, 1, 3, 0, 2);
    back(&mut rig, 8, "b", place(1), None);
    rig.told();
    rig.report(8, 1, 2, 1, 2);
    let head = rig.ledger().last().unwrap().hash.to_vec();
    let expected = Down::LedgerHead(v1::LedgerHead {
        step: 2,
        hash: head,
    });
    assert_eq!(rig.told(), [(7, 1, expected)], "behind its own step");
    rig.report(8, 1, 3, 1, 2);
    rig.written(7, 1, 2);
    rig.published(7, 1, 2);
    assert_eq!((rig.run().durable, rig.run().step), (2, 3));
    sound(&rig);
}

#[test]
fn a_checkpoint_that_was_to_be_published_when_the_coordinator_died_is_to_be_published() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.step(&[1, 2], 1, 2);
    rig.written(1, 1, 2);
    rig.restart(usize::MAX);
    back(&mut rig, 7, "a", place(0), None);
    back(&mut rig, 8, "b", place(1), None);
    assert_eq!(rig.run().durable, 0, "nobody has said that it is");
    let publish = Down::Publish(v1::PublishCheckpoint {
        step: 2,
        manifest_hash: checkpoint(1, 2).manifest_hash,
    });
    assert!(rig.told().contains(&(7, 1, publish)));
    rig.written(7, 1, 2);
    rig.published(7, 1, 2);
    assert_eq!(rig.run().durable, 2);
    sound(&rig);
}

#[test]
fn a_worker_with_another_place_has_left_its_own() {
    for wrong in [
        v1::Place {
            generation: 2,
            ..place(0)
        },
        v1::Place {
            run: "another".into(),
            ..place(0)
        },
        place(1),
    ] {
        let mut rig = restarted();
        assert_eq!(back(&mut rig, 7, "a", wrong, None), u64::MAX);
        assert_eq!(broke(&rig).len(), 1);
        assert_eq!(voided(&mut rig), [7]);
    }
}

#[test]
fn a_regrouping_that_the_dead_coordinator_had_asked_for_is_no_failure() {
    let mut rig = restarted();
    for (conn, name, rank) in [(7, "a", 0), (8, "b", 1)] {
        let left = v1::Place {
            left: true,
            ..place(rank)
        };
        back(&mut rig, conn, name, left, Some(held(1, 2)));
        rig.report(conn, 1, 2, rank, 2);
        rig.left_holding(conn, 1, LeftReason::Regrouped, Some(held(1, 2)));
    }
    assert!(broke(&rig)[0].starts_with("regrouped"), "{:?}", broke(&rig));
    rig.wait(1.1);
    assert_eq!((rig.run().generation, rig.run().step), (2, 2));
    assert_eq!(rig.run().failures.count, 0);
    sound(&rig);
}

#[test]
fn a_fault_of_that_time_is_heard_with_its_cause() {
    let mut rig = restarted();
    let left = v1::Place {
        left: true,
        ..place(1)
    };
    back(&mut rig, 8, "b", left, None);
    rig.fault(8, 1, FaultKind::Input, "the data is damaged");
    assert_eq!(rig.status().state(), RunState::Failed);
    let reason = rig.status().reason;
    assert!(
        reason.contains("rank 1 (b)") && reason.contains("damaged"),
        "{reason}"
    );
}

#[test]
fn a_coordinator_that_is_to_end_waits_for_nobody() {
    let mut rig = restarted();
    rig.event(Event::Shutdown("a user asked".into())).unwrap();
    assert!(rig.exited);
    assert!(!rig.run().ended(), "the next coordinator goes on with it");
    sound(&rig);
}

#[test]
fn without_patience_a_restart_ends_the_generation() {
    let mut rig = Rig::new();
    let mut submission = super::super::rig::submission("rig-1");
    submission.recipe += "coordinator: { away: 0 s }\n";
    rig.event(Event::Submit(submission)).unwrap();
    rig.attach(1, "a");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    rig.restart(usize::MAX);
    assert_eq!(broke(&rig), ["the coordinator was restarted"]);
}

#[test]
fn with_little_patience_members_still_have_the_time_for_another_look() {
    let mut rig = Rig::new();
    let mut submission = super::super::rig::submission("rig-1");
    submission.recipe += "coordinator: { away: 500 ms }\n";
    rig.event(Event::Submit(submission)).unwrap();
    rig.attach(1, "a");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    rig.restart(usize::MAX);
    rig.wait(supra_proto::AWAITED_PAUSE.as_secs_f64());
    assert_eq!(broke(&rig), [""; 0]);
    rig.wait(1.1);
    assert_eq!(
        broke(&rig),
        ["the coordinator was restarted, and a did not come back within 3 s"]
    );
}

#[test]
fn data_that_changed_meanwhile_is_noticed() {
    let mut rig = halfway();
    rig.restart(usize::MAX);
    back(&mut rig, 7, "a", place(0), None);
    let mut other = place(1);
    other.formed.as_mut().unwrap().windows += 1;
    back(&mut rig, 8, "b", other, None);
    assert_eq!(rig.status().state(), RunState::Failed);
}
