//! Generations that start from a state that its workers have in parts.

use supra_proto::v1::{
    self, Held, LeftReason, Part, RunState, Snapshot, SnapshotTaken,
    coordinator_message::Body as Down, worker_message::Body as Up,
};

use super::super::rig::{Rig, held};
use super::super::*;
use super::{halfway, training};
use crate::audit::{Options, audit};
use crate::ledger::Body;

fn hash(step: u64, index: u32) -> Vec<u8> {
    vec![(10 * step + u64::from(index)) as u8; 32]
}

fn part(step: u64, index: u32) -> Part {
    Part {
        index,
        hash: hash(step, index),
    }
}

/// What a worker holds that has these parts of two of the state behind a step.
fn parts(generation: u64, step: u64, indices: &[u32]) -> Held {
    of(2, generation, step, indices)
}

fn of(of: u32, generation: u64, step: u64, indices: &[u32]) -> Held {
    Held {
        run: "rig-1".into(),
        snapshots: vec![Snapshot {
            generation,
            step,
            of,
            parts: indices.iter().map(|index| part(step, *index)).collect(),
        }],
        ..Held::default()
    }
}

/// Step of the state in parts that the newest generation starts from, with who hands over each part by rank; none when it
/// starts from something else.
fn start(rig: &mut Rig) -> Option<(u64, u64, Vec<u32>)> {
    let told = rig.told().into_iter();
    let mut assigned = told.filter_map(|(_, _, body)| match body {
        Down::Assignment(assignment) => Some(assignment),
        _ => None,
    });
    let first = assigned.next().expect("a generation has formed");
    assert!(assigned.all(|other| other.held == first.held));
    let held = first.held?;
    let state = held.state.unwrap();
    assert_eq!(held.holders.is_empty(), !held.parts.is_empty());
    let ranks = held.parts.iter().map(|part| part.rank).collect::<Vec<_>>();
    for (index, part) in (0..).zip(&held.parts) {
        assert_eq!(part.hash, hash(state.step, index));
    }
    (!ranks.is_empty()).then_some((state.generation, state.step, ranks))
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

/// The ledger adds up, and `replay` gives the live state.
fn sound(rig: &Rig) {
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.breaks, []);
    assert_eq!(verdict.steps, rig.run().step);
    assert_eq!(&rig.replayed(), rig.machine.state());
}

/// Worker b is lost behind step 2, and a leaves with what it holds.
fn survivor(state: Held) -> Rig {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.step(&[1, 2], 1, 2);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(state));
    rig.told();
    rig.wait(3.1);
    rig
}

#[test]
fn a_death_costs_the_steps_since_the_snapshot_and_the_ledger_says_so() {
    let mut rig = survivor(parts(1, 1, &[0, 1]));
    assert_eq!(start(&mut rig), Some((1, 1, vec![0, 0])));
    assert_eq!((voids(&rig), rig.run().step), (vec![1], 1));
    sound(&rig);
    rig.formed(1, 2, 1);
    rig.step(&[1], 2, 2);
    rig.step(&[1], 2, 3);
    rig.written(1, 2, 3);
    rig.published(1, 2, 3);
    assert_eq!(rig.status().state(), RunState::Finished);
    assert_eq!(voids(&rig), [1]);
    sound(&rig);
}

#[test]
fn a_state_of_which_a_part_is_missing_is_none() {
    let mut rig = survivor(parts(1, 1, &[0]));
    assert_eq!(start(&mut rig), None);
    assert_eq!(voids(&rig), [0]);
    sound(&rig);
}

#[test]
fn parts_are_put_together_from_those_who_have_them_and_as_few_as_it_takes_are_asked() {
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
    rig.left_holding(1, 1, LeftReason::Void, Some(of(3, 1, 1, &[0, 2])));
    rig.left_holding(3, 1, LeftReason::Void, Some(of(3, 1, 1, &[2, 1])));
    rig.told();
    rig.attach(4, "b");
    assert_eq!(
        start(&mut rig),
        Some((1, 1, vec![0, 2, 0])),
        "of a, b and c"
    );
    assert_eq!(voids(&rig), [0; 0], "nothing was trained since");
    sound(&rig);
}

#[test]
fn the_newest_state_that_is_all_there_is_taken_whole_or_in_parts() {
    let both = |newer: &[u32]| {
        let mut state = parts(1, 1, &[0, 1]);
        state.snapshots.extend(parts(1, 2, newer).snapshots);
        state
    };
    let mut rig = survivor(both(&[1]));
    assert_eq!(start(&mut rig), Some((1, 1, vec![0, 0])));
    let mut rig = survivor(both(&[1, 0]));
    assert_eq!(start(&mut rig), Some((1, 2, vec![0, 0])));
    assert_eq!(voids(&rig), [0; 0]);
    let mut rig = survivor(Held {
        snapshots: parts(1, 1, &[0, 1]).snapshots,
        ..held(1, 2)
    });
    assert_eq!(start(&mut rig), None, "the whole one is newer");
    assert_eq!((voids(&rig), rig.run().step), (vec![], 2));
}

#[test]
fn a_step_that_only_the_survivor_lived_to_report_is_applied_when_a_snapshot_is_behind_it() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.report(1, 1, 2, 0, 2);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(parts(1, 2, &[0, 1])));
    rig.told();
    rig.wait(3.1);
    assert_eq!(start(&mut rig), Some((1, 2, vec![0, 0])));
    assert_eq!((voids(&rig), rig.run().step), (vec![], 2));
    sound(&rig);
}

#[test]
fn what_is_not_of_the_steps_that_stand_is_refused() {
    for (what, state) in [
        ("an unreported step", parts(1, 3, &[0, 1])),
        ("a later generation", parts(2, 1, &[0, 1])),
        (
            "another run",
            Held {
                run: "rig-0".into(),
                ..parts(1, 1, &[0, 1])
            },
        ),
        ("more parts than workers", of(4, 1, 1, &[0, 1, 2, 3])),
        ("no parts", of(0, 1, 1, &[])),
        ("a part too many", parts(1, 1, &[0, 2])),
    ] {
        let mut rig = survivor(state);
        assert_eq!(start(&mut rig), None, "{what}");
        assert_eq!(voids(&rig), [0], "{what}");
        sound(&rig);
    }
}

#[test]
fn parts_of_steps_that_were_void_and_trained_again_are_refused() {
    // b has step 1 of generation 1, but the run goes on without it, from the base.
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.lose(2);
    rig.left(1, 1, LeftReason::Void);
    rig.wait(3.1);
    rig.formed(1, 2, 0);
    rig.step(&[1], 2, 1);
    rig.lose(1);
    rig.attach_holding(3, "b", Some(parts(1, 1, &[0, 1])));
    rig.told();
    rig.wait(3.1);
    assert_eq!(start(&mut rig), None);
    assert_eq!(voids(&rig), [0, 0]);
    sound(&rig);
}

#[test]
fn a_generation_that_came_to_nothing_leaves_the_parts_of_the_one_before() {
    let mut rig = survivor(parts(1, 1, &[0, 1]));
    rig.fault(1, 2, v1::FaultKind::Transient, "no peer");
    rig.told();
    rig.left_holding(1, 2, LeftReason::Fault, Some(parts(1, 1, &[0, 1])));
    assert_eq!(start(&mut rig), Some((1, 1, vec![0, 0])));
    assert_eq!(voids(&rig), [1], "once");
    // The next one has made its own of where it started from.
    rig.formed(1, 3, 1);
    rig.step(&[1], 3, 2);
    rig.fault(1, 3, v1::FaultKind::Transient, "no peer");
    rig.told();
    rig.left_holding(1, 3, LeftReason::Fault, Some(parts(3, 1, &[0, 1])));
    assert_eq!(start(&mut rig), Some((3, 1, vec![0, 0])));
    assert_eq!(voids(&rig), [1, 1]);
    sound(&rig);
}

#[test]
fn a_checkpoint_goes_before_an_older_snapshot_and_not_before_one_of_its_step() {
    let start_from = |step| {
        let mut rig = halfway();
        rig.lose(2);
        rig.left_holding(1, 1, LeftReason::Void, Some(parts(1, step, &[0, 1])));
        rig.told();
        rig.wait(3.1);
        let start = start(&mut rig);
        assert_eq!(voids(&rig), [0; 0]);
        start
    };
    assert_eq!(start_from(1), None);
    assert_eq!(start_from(2), Some((1, 2, vec![0, 0])));
}

#[test]
fn a_restarted_coordinator_goes_on_from_the_parts_that_workers_say_they_hold() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.step(&[1, 2], 1, 2);
    // The last step, and what it came to, was not on the disk.
    rig.restart(rig.facts.len() - 2);
    let mut newer = parts(1, 1, &[0, 1]);
    newer.snapshots.extend(parts(1, 2, &[0, 1]).snapshots);
    rig.attach_holding(7, "a", Some(newer));
    rig.attach_holding(8, "b", Some(parts(1, 2, &[0, 1])));
    rig.wait(1.1);
    assert_eq!(start(&mut rig), Some((1, 1, vec![0, 0])));
    assert_eq!((voids(&rig), rig.run().step), (vec![], 1));
    sound(&rig);
}

#[test]
fn a_resumed_run_begins_from_its_checkpoint_whatever_is_in_memory() {
    let mut rig = halfway();
    rig.fault(1, 1, v1::FaultKind::Input, "the base is gone");
    rig.left(1, 1, LeftReason::Fault);
    rig.left_holding(2, 1, LeftReason::Void, Some(parts(1, 2, &[0, 1])));
    rig.told();
    rig.event(Event::Resume {
        run: 1,
        strict: false,
    })
    .unwrap();
    rig.wait(1.1);
    assert_eq!(start(&mut rig), None);
    sound(&rig);
}

#[test]
fn workers_that_hold_different_parts_of_one_state_end_the_run() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.fault(1, 1, v1::FaultKind::Transient, "a switch rebooted");
    let mut other = parts(1, 1, &[0, 1]);
    other.snapshots[0].parts[1].hash[5] ^= 1;
    rig.left_holding(1, 1, LeftReason::Fault, Some(parts(1, 1, &[0, 1])));
    rig.left_holding(2, 1, LeftReason::Void, Some(other));
    rig.wait(1.1);
    let status = rig.status();
    assert_eq!(status.state(), RunState::Failed);
    assert!(
        status
            .reason
            .contains("workers a and b hold different parts 1"),
        "{}",
        status.reason
    );
}

fn taken(step: u64, own: u32, kept: u32) -> Up {
    Up::SnapshotTaken(SnapshotTaken {
        step,
        own: Some(part(step, own)),
        kept: Some(part(step, kept)),
    })
}

fn whole(rig: &Rig) -> Option<u64> {
    rig.machine.generation.as_ref().unwrap().snapshots.whole
}

#[test]
fn a_snapshot_is_usable_when_all_ranks_have_told_of_the_same_step() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.say(1, 1, taken(1, 0, 1));
    assert_eq!(whole(&rig), None);
    rig.say(1, 1, taken(1, 0, 1));
    assert_eq!(whole(&rig), None, "a repeat is none of the other rank");
    rig.say(2, 1, taken(1, 1, 0));
    assert_eq!(whole(&rig), Some(1));
    rig.step(&[1, 2], 1, 2);
    rig.say(2, 1, taken(2, 1, 0));
    assert_eq!(whole(&rig), Some(1));
    rig.say(1, 1, taken(1, 0, 1));
    rig.say(1, 1, taken(2, 0, 1));
    assert_eq!(whole(&rig), Some(2));
}

#[test]
fn a_neighbour_that_keeps_something_else_ends_the_generation() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    rig.say(1, 1, taken(1, 0, 1));
    rig.say(2, 1, taken(1, 1, 1));
    assert!(!rig.run().alive);
    assert!(
        rig.run().reason.contains("rank 1 keeps"),
        "{}",
        rig.run().reason
    );
}
