//! A coordinator that knows nothing takes over what a checkpoint tells.

use supra_proto::v1::{LeftReason, RunState, coordinator_message::Body as Down};

use super::super::rig::{self, Rig, held, submission};
use super::super::{Event, Outcome};
use super::*;
use crate::audit::{Options, audit};

/// The checkpoint of a step as the rig's workers write it.
fn kept(generation: u64, step: u64) -> Checkpoint {
    let written = rig::checkpoint(generation, step);
    Checkpoint {
        step,
        tokens: 40 * step,
        generation,
        path: written.path,
        bytes: written.bytes,
        manifest_hash: written.manifest_hash.try_into().unwrap(),
        published: false,
        world: 1,
        at: 0,
        verified: false,
        name: String::new(),
    }
}

/// What the checkpoint of step 1 or 2 tells, when step 2 was applied before the ledger's head was given.
fn adoption(step: u64) -> Adoption {
    let mut lost = Rig::new();
    lost.submit("rig-1");
    lost.attach(1, "a");
    lost.wait(1.1);
    lost.formed(1, 1, 0);
    lost.step(&[1], 1, 1);
    lost.step(&[1], 1, 2);
    Adoption {
        submission: submission("rig-1"),
        ledger: lost.ledger(),
        checkpoint: kept(1, step),
        older: Vec::new(),
        passed_over: Vec::new(),
        replica_hash: [1; 32],
        generation: 1,
    }
}

fn adopt(adoption: Adoption) -> Rig {
    let mut rig = Rig::new();
    rig.event(Event::Adopt(Box::new(adoption))).unwrap();
    rig
}

#[test]
fn an_adopted_run_goes_on_from_its_checkpoint_to_a_ledger_that_proves_all() {
    let mut rig = adopt(adoption(1));
    let run = rig.run();
    assert_eq!((run.step, run.durable, run.generation), (1, 1, 1000));
    assert_eq!(rig.replayed(), *rig.machine.state());
    rig.attach(1, "a");
    rig.wait(1.1);
    let told = rig.told();
    let restore = told.iter().find_map(|(_, generation, body)| match body {
        Down::Assignment(it) => Some((*generation, it.restore.clone()?.path)),
        _ => None,
    });
    assert_eq!(restore, Some((1001, "step-1-gen-1".to_owned())));
    rig.formed(1, 1001, 1);
    for step in 2..=3 {
        rig.step(&[1], 1001, step);
    }
    rig.written(1, 1001, 3);
    rig.published(1, 1001, 3);
    rig.left(1, 1001, LeftReason::Finished);
    assert_eq!(rig.status().state(), RunState::Finished);
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.breaks, []);
    assert!(verdict.finished);
    assert_eq!(verdict.voided_steps, 1, "step 2 was trained again");
}

#[test]
fn what_workers_of_the_old_coordinator_hold_is_not_taken() {
    let mut rig = adopt(adoption(2));
    rig.attach_holding(1, "a", Some(held(1, 2)));
    rig.wait(1.1);
    let told = rig.told();
    let assigned = told.iter().find_map(|(_, _, body)| match body {
        Down::Assignment(assignment) => Some(assignment),
        _ => None,
    });
    let assigned = assigned.expect("a generation forms");
    assert!(assigned.held.is_none() && assigned.restore.is_some());
}

#[test]
fn ranks_have_to_load_the_state_that_the_manifest_states() {
    let mut rig = adopt(adoption(2));
    rig.attach(1, "a");
    rig.wait(1.1);
    rig.formed_with(1, 1001, 2, vec![6; 32]);
    let status = rig.status();
    assert_eq!(status.state(), RunState::Failed);
    for words in ["step-2-gen-1", "its manifest says 0101"] {
        assert!(status.reason.contains(words), "{}", status.reason);
    }
}

#[test]
fn a_known_run_is_refused_and_nothing_changes() {
    let mut rig = adopt(adoption(2));
    let before = rig.facts.len();
    let again = rig.event(Event::Adopt(Box::new(adoption(2)))).unwrap_err();
    assert_eq!(again, Refused::Known("rig-1".to_owned()));
    assert!(again.to_string().contains("supra resume rig-1"), "{again}");
    assert_eq!(rig.facts.len(), before);
}

#[test]
fn older_checkpoints_are_kept_by_name_and_others_are_named_damaged() {
    let problem = "model: its BLAKE3 is another".to_owned();
    let rig = adopt(Adoption {
        older: vec![kept(1, 1)],
        passed_over: vec![Damaged {
            checkpoint: kept(2, 3),
            problem: problem.clone(),
        }],
        generation: 2,
        ..adoption(2)
    });
    let run = rig.run();
    let names: Vec<&str> = run.checkpoints.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["adopted-1-gen-1", ""]);
    assert!(run.checkpoints.iter().all(|known| known.published));
    assert!(run.checkpoints[1].verified, "all of it was read");
    assert!(rig.deleted.is_empty(), "only one is kept by the recipe");
    assert_eq!(run.damaged[0].problem, problem);
    assert!(rig.logs.iter().any(|line| line.contains(&problem)));
}

#[test]
fn the_last_checkpoint_of_a_run_makes_it_a_finished_one() {
    let mut lost = adoption(2);
    let mut tail = crate::ledger::Tail::default();
    lost.ledger.iter().for_each(|record| tail.advance(record));
    let plan = rig::plan();
    let samples = plan.step_samples(3);
    let last = tail.next(Body::Step(crate::ledger::Step {
        generation: 1,
        step: 3,
        first_sample: samples.start,
        samples: samples.end - samples.start,
        digest: [3; 32],
        skipped: false,
    }));
    lost.ledger.push(last);
    let rig = adopt(Adoption {
        checkpoint: kept(1, 3),
        ..lost
    });
    assert_eq!(rig.status().state(), RunState::Finished);
    let ended = |fact: &Fact| {
        matches!(
            fact,
            Fact::Ended {
                outcome: Outcome::Finished,
                ..
            }
        )
    };
    assert!(rig.facts.iter().any(ended));
    assert!(audit(rig.ledger(), Options::default()).finished);
}
