//! Which checkpoints are kept, what deletes them, and what becomes of a damaged one.

use supra_proto::v1::{FaultKind, LeftReason, RunState, coordinator_message::Body as Down};

use super::super::rig::{Rig, held, submission};
use super::super::*;
use super::{halfway, training};
use crate::audit::{Options, audit};
use crate::ledger::Body;

const PROBLEM: &str = "/checkpoints/step-2-gen-1/model: its BLAKE3 is wrong";

fn damaged() -> Found {
    Found::Damaged(PROBLEM.into())
}

/// The ledger adds up.
fn sound(rig: &Rig) {
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.breaks, []);
    assert_eq!(verdict.steps, rig.run().step);
}

fn says(rig: &Rig, what: &str) -> bool {
    rig.logs.iter().any(|line| line.contains(what))
}

/// Step of the checkpoint that the last assignments name; 0 when they name none.
fn restores(rig: &mut Rig) -> u64 {
    let told = rig.told().into_iter().rev();
    let assignments = told.filter_map(|(_, _, body)| match body {
        Down::Assignment(assignment) => Some(assignment.restore),
        _ => None,
    });
    let last = assignments.map(|it| it.map_or(0, |restore| restore.step));
    last.take(1).next().expect("a generation has formed")
}

/// Stops behind step 2, whose checkpoint is published, and goes on: generation 2 is to start from it.
fn restarted(strict: bool) -> Rig {
    let mut rig = halfway();
    rig.verified(Found::Whole);
    rig.event(Event::Cancel(1)).unwrap();
    for conn in [1, 2] {
        rig.left(conn, 1, LeftReason::Stopped);
    }
    rig.event(Event::Resume { run: 1, strict }).unwrap();
    rig.wait(1.1);
    assert_eq!(restores(&mut rig), 2);
    rig
}

/// Rank `conn - 1` finds it damaged, and all leave.
fn refuse(rig: &mut Rig, conn: Conn, generation: u64) {
    rig.fault(conn, generation, FaultKind::CheckpointDamaged, PROBLEM);
    rig.left(conn, generation, LeftReason::Fault);
    rig.left(3 - conn, generation, LeftReason::Void);
    rig.wait(1.1);
}

#[test]
fn an_older_checkpoint_goes_only_when_the_newer_one_is_verified() {
    let mut rig = halfway();
    assert_eq!(rig.verified(Found::Whole), "step-2-gen-1");
    assert!(rig.run().checkpoints[0].verified);
    rig.step(&[1, 2], 1, 3);
    rig.written(1, 1, 3);
    rig.published(1, 1, 3);
    assert!(rig.deleted.is_empty(), "{:?}", rig.deleted);
    // The coordinator dies over it, and the next one reads it again.
    rig.restart(rig.facts.len());
    assert!(rig.deleted.is_empty(), "{:?}", rig.deleted);
    assert_eq!(rig.verified(Found::Whole), "step-3-gen-1");
    assert_eq!(rig.deleted, ["step-2-gen-1"]);
    assert_eq!(rig.run().checkpoints.len(), 1);
    assert!(rig.verify.is_empty(), "all is known");
}

#[test]
fn one_that_cannot_be_read_here_lets_nothing_go_and_is_tried_once() {
    let mut rig = halfway();
    rig.verified(Found::Whole);
    rig.step(&[1, 2], 1, 3);
    rig.written(1, 1, 3);
    rig.published(1, 1, 3);
    rig.verified(Found::Unread("no such storage".into()));
    rig.wait(1.0);
    assert!(rig.verify.is_empty() && rig.deleted.is_empty());
    assert!(says(&rig, "cannot verify the checkpoint of step 3"));
}

#[test]
fn what_turns_out_damaged_is_written_again_while_training_goes_on() {
    let mut rig = halfway();
    rig.verified(damaged());
    let (run, status) = (rig.run(), rig.status());
    assert_eq!((run.step, run.durable, run.recovery_step()), (2, 0, 0));
    assert_eq!(status.state(), RunState::Training);
    assert_eq!(status.damaged[0].damaged, PROBLEM);
    assert!(status.checkpoint.is_none());
    let told = rig.told();
    let [(1, 1, Down::Checkpoint(asked))] = &told[..] else {
        panic!("{told:?}");
    };
    assert_eq!(asked.newest, 2);
    rig.step(&[1, 2], 1, 3);
    rig.written(1, 1, 3);
    rig.published(1, 1, 3);
    assert_eq!(rig.status().state(), RunState::Finished);
    sound(&rig);
}

#[test]
fn a_generation_that_cannot_start_from_a_damaged_checkpoint_starts_from_an_older_one() {
    let mut rig = restarted(false);
    refuse(&mut rig, 1, 2);
    let told = rig.told();
    let forms = |body: &Down| matches!(body, Down::Assignment(_));
    assert!(
        !told.iter().any(|(_, _, body)| forms(body)),
        "nothing forms before it is read again: {told:?}"
    );
    let reason = rig.status().reason;
    assert!(
        reason.contains("reading the checkpoint of step 2 again, which a has found damaged"),
        "{reason}"
    );
    assert_eq!(rig.verified(damaged()), "step-2-gen-1");
    assert_eq!(restores(&mut rig), 0, "there is no other");
    assert!(says(&rig, "from the beginning"));
    let bodies: Vec<Body> = rig.ledger().into_iter().map(|it| it.body).collect();
    assert!(
        matches!(&bodies[bodies.len() - 2..], [
            Body::Lost { step: 2, durable: 0, reason, .. },
            Body::Void { after_step: 0, .. },
        ] if reason == PROBLEM),
        "{bodies:?}"
    );
    for step in 1..=3 {
        if step == 1 {
            rig.formed(1, 3, 0);
            rig.formed(2, 3, 0);
        }
        rig.step(&[1, 2], 3, step);
    }
    rig.written(1, 3, 3);
    rig.published(1, 3, 3);
    assert_eq!(rig.status().state(), RunState::Finished);
    sound(&rig);
}

#[test]
fn what_only_the_worker_can_see_is_as_the_worker_says() {
    let mut rig = restarted(false);
    refuse(&mut rig, 2, 2);
    rig.verified(Found::Unread("no such storage".into()));
    assert_eq!(restores(&mut rig), 0);
    let problem = &rig.run().damaged[0].problem;
    assert!(problem.contains("read by b, and not here"), "{problem}");
}

#[test]
fn a_worker_that_misreads_a_whole_checkpoint_is_put_aside_and_nothing_is_lost() {
    let mut rig = restarted(false);
    refuse(&mut rig, 2, 2);
    rig.verified(Found::Whole);
    rig.wait(3.1);
    assert_eq!(restores(&mut rig), 2);
    assert_eq!(rig.run().members, ["a"]);
    assert!(rig.machine.state().aside["b"].reason.contains("otherwise"));
    assert!(rig.run().damaged.is_empty());
    // Alone it is tried again, until the run has failed often enough.
    for generation in 3..5 {
        rig.fault(1, generation, FaultKind::CheckpointDamaged, PROBLEM);
        rig.left(1, generation, LeftReason::Fault);
        if rig.status().state() != RunState::Failed {
            rig.verified(Found::Whole);
            rig.wait(3.1);
        }
    }
    assert_eq!(rig.status().state(), RunState::Failed);
    assert!(rig.status().reason.contains(PROBLEM));
    assert_eq!(rig.run().recovery_step(), 2);
}

#[test]
fn a_strict_run_fails_and_keeps_what_it_has_until_it_is_resumed_otherwise() {
    let mut rig = restarted(true);
    refuse(&mut rig, 1, 2);
    rig.verified(damaged());
    let status = rig.status();
    assert_eq!((status.state(), status.broken), (RunState::Failed, true));
    assert!(status.reason.contains(PROBLEM), "{}", status.reason);
    assert_eq!((rig.run().step, rig.run().durable), (2, 2));
    sound(&rig);
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    rig.wait(1.1);
    assert!(!rig.status().broken);
    assert_eq!(restores(&mut rig), 2, "the file may have been put back");
    refuse(&mut rig, 1, 3);
    rig.verified(damaged());
    assert_eq!(restores(&mut rig), 0);
}

#[test]
fn a_run_that_is_under_way_does_not_become_strict_and_whoever_asks_for_it_is_told() {
    let strictly = Event::Resume {
        run: 1,
        strict: true,
    };
    let mut rig = restarted(false);
    let refused = rig.event(strictly.clone()).unwrap_err();
    assert!(matches!(refused, Refused::NotStrict(_)), "{refused}");
    assert!(refused.to_string().contains("supra cancel"), "{refused}");
    assert!(!rig.run().strict);
    let mut rig = restarted(true);
    rig.event(strictly).unwrap();
    assert!(rig.run().strict);
}

#[test]
fn survivors_go_on_from_memory_when_the_checkpoint_cannot_be_published() {
    let mut rig = halfway();
    rig.verified(Found::Whole);
    rig.step(&[1, 2], 1, 3);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 3)));
    rig.wait(3.1);
    assert_eq!(restores(&mut rig), 2);
    rig.fault(1, 2, FaultKind::CheckpointDamaged, PROBLEM);
    rig.left_holding(1, 2, LeftReason::Fault, Some(held(1, 3)));
    rig.verified(damaged());
    rig.wait(3.1);
    let told = rig.told();
    let assignment = told.iter().find_map(|(_, _, body)| match body {
        Down::Assignment(assignment) => Some(assignment),
        _ => None,
    });
    let assignment = assignment.expect("a generation has formed");
    assert!(assignment.held.is_some() && assignment.restore.is_none());
    assert_eq!(rig.run().step, 3, "no step is void");
    sound(&rig);
}

#[test]
fn a_named_checkpoint_stays_and_goes_when_its_name_is_dropped() {
    let mut rig = halfway();
    rig.verified(Found::Whole);
    let name = |step, name: &str| Event::NameCheckpoint {
        run: 1,
        step,
        name: name.into(),
    };
    assert!(matches!(
        rig.event(name(1, "best")),
        Err(Refused::NoCheckpoint { .. })
    ));
    assert!(matches!(
        rig.event(name(2, "a b")),
        Err(Refused::BadName(_))
    ));
    rig.event(name(2, "best")).unwrap();
    rig.step(&[1, 2], 1, 3);
    rig.written(1, 1, 3);
    rig.published(1, 1, 3);
    rig.verified(Found::Whole);
    assert!(rig.deleted.is_empty());
    assert!(matches!(
        rig.event(name(3, "best")),
        Err(Refused::NameTaken { step: 2, .. })
    ));
    let listed = rig.machine.checkpoints(1);
    assert_eq!(
        (listed[0].name.as_str(), listed[0].kept.as_str()),
        ("best", "named")
    );
    let drop = |name: &str| Event::DropName {
        run: 1,
        name: name.into(),
    };
    assert!(rig.event(drop("worst")).is_err());
    rig.event(drop("best")).unwrap();
    assert_eq!(rig.deleted, ["step-2-gen-1"]);
}

#[test]
fn pruning_takes_the_damaged_and_the_old_and_never_the_last_good_one() {
    let mut rig = Rig::new();
    let submission = Submission {
        keep: 9,
        ..submission("rig-1")
    };
    rig.event(Event::Submit(submission)).unwrap();
    rig.attach(1, "a");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    for step in 1..=2 {
        rig.step(&[1], 1, step);
        rig.written(1, 1, step);
        rig.published(1, 1, step);
    }
    let would_go = |rig: &Rig| {
        let all = rig.machine.prunable(1, Some(1)).into_iter();
        all.map(|known| known.step).collect::<Vec<_>>()
    };
    // The first is not read any more before the second is there.
    rig.verify.retain(|(attempt, _)| *attempt == 1);
    rig.verified(Found::Whole);
    assert!(would_go(&rig).is_empty(), "the second is not verified");
    rig.verified(Found::Whole);
    assert_eq!(would_go(&rig), [1]);
    assert!(rig.machine.prunable(1, None).is_empty());
    rig.event(Event::Prune {
        run: 1,
        keep: Some(1),
    })
    .unwrap();
    assert_eq!(rig.deleted, ["step-1-gen-1"]);
    rig.step(&[1], 1, 3);
    rig.written(1, 1, 3);
    rig.published(1, 1, 3);
    rig.verified(damaged());
    assert_eq!(would_go(&rig), [3]);
    rig.event(Event::Prune { run: 1, keep: None }).unwrap();
    assert_eq!(rig.deleted, ["step-1-gen-1", "step-3-gen-1"]);
    assert_eq!(rig.run().recovery_step(), 2);
    assert!(rig.status().damaged.is_empty());
}

#[test]
fn a_journal_of_an_older_build_still_replays() {
    let written = r#"{"fact":"written","run":1,"checkpoint":{"step":2,"tokens":80,"generation":1,"path":"p","bytes":9,
        "manifest_hash":"0101010101010101010101010101010101010101010101010101010101010101","published":false}}"#;
    let Ok(Fact::Written { checkpoint, .. }) = serde_json::from_str(written) else {
        panic!("an old fact is read");
    };
    assert!(!checkpoint.verified && checkpoint.name.is_empty() && checkpoint.world == 0);
    let queued = serde_json::from_str(r#"{"fact":"queued","run":1,"at":5}"#);
    assert!(matches!(queued, Ok(Fact::Queued { strict: false, .. })));
}

#[test]
fn a_damaged_checkpoint_costs_its_logged_results_too() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    assert_eq!(rig.run().logged.len(), 1);
    rig.step(&[1, 2], 1, 2);
    rig.written(1, 1, 2);
    rig.published(1, 1, 2);
    rig.step(&[1, 2], 1, 3);
    assert_eq!(rig.run().logged.len(), 1);
    rig.verified(damaged());
    assert!(rig.run().logged.is_empty() && !rig.run().uniform);
}
