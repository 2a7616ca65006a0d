//! What ranks measure between steps, and how it comes into the ledger.

use supra_proto::v1::{self, LeftReason, worker_message::Body as Up};

use super::super::rig::{Rig, held, plan, report};
use super::super::*;
use super::training;
use crate::audit::{Options, Outcome as Verdict, audit};
use crate::ledger::Body;

fn evaluated(rig: &mut Rig, conn: Conn, generation: u64, step: u64, loss_sum: f64) {
    let evaluated = v1::Evaluated {
        step,
        windows: 4,
        loss_sum,
        targets: 40,
        seconds: 0.5,
    };
    rig.say(conn, generation, Up::Evaluated(evaluated));
}

fn gates(rig: &mut Rig, generation: u64, step: u64, dead_keys: f64) {
    let gates = v1::Gates {
        step,
        form_error: 1e-6,
        logit_rms: 1.0,
        layers: vec![v1::LayerGates {
            dead_keys,
            ..v1::LayerGates::default()
        }],
        ..v1::Gates::default()
    };
    rig.say(1, generation, Up::Gates(gates));
}

/// Steps and losses on record, in the ledger's order.
fn recorded(rig: &Rig) -> Vec<(u64, f64)> {
    let records = rig.ledger().into_iter();
    records
        .filter_map(|record| match record.body {
            Body::Evaluated(evaluation) => Some((evaluation.step, evaluation.loss_sum())),
            _ => None,
        })
        .collect()
}

/// Those that stand, as clients see the newest.
fn shown(rig: &Rig) -> Option<(u64, f64)> {
    let newest = rig.status().evaluation?;
    Some((newest.step, newest.loss))
}

fn sound(rig: &Rig) {
    let verdict = audit(rig.ledger(), Options::default());
    assert_eq!(verdict.verdict, Verdict::Ok, "{:?}", verdict.breaks);
    assert_eq!(&rig.replayed(), rig.machine.state());
}

#[test]
fn the_first_word_on_a_step_counts_once_the_step_is_applied() {
    let mut rig = training();
    evaluated(&mut rig, 1, 1, 0, 100.0);
    evaluated(&mut rig, 2, 1, 0, 100.0);
    assert_eq!(shown(&rig), Some((0, 2.5)));
    rig.report(1, 1, 1, 0, 2);
    evaluated(&mut rig, 1, 1, 1, 80.0);
    assert_eq!(recorded(&rig), [(0, 100.0)], "rank 1 has not reported it");
    rig.report(2, 1, 1, 1, 2);
    evaluated(&mut rig, 2, 1, 1, 80.0);
    assert_eq!(recorded(&rig), [(0, 100.0), (1, 80.0)]);
    assert_eq!(shown(&rig), Some((1, 2.0)));
    let mut rows = [1, 2].map(|step| v1::StepMetrics {
        step,
        ..v1::StepMetrics::default()
    });
    rig.run().add_heldout_losses(&mut rows);
    assert_eq!(rows.map(|row| row.heldout_loss), [Some(2.0), None]);
    sound(&rig);
}

#[test]
fn a_rank_that_evaluates_before_all_have_formed_is_heard() {
    let mut rig = Rig::new();
    rig.submit("rig-1");
    rig.attach(1, "a");
    rig.attach(2, "b");
    rig.wait(1.1);
    rig.formed(1, 1, 0);
    evaluated(&mut rig, 1, 1, 0, 100.0);
    assert_eq!(recorded(&rig), []);
    rig.formed(2, 1, 0);
    assert_eq!(recorded(&rig), [(0, 100.0)]);
    sound(&rig);
}

#[test]
fn what_was_measured_of_void_steps_is_void_and_is_measured_again() {
    let mut rig = training();
    evaluated(&mut rig, 1, 1, 0, 100.0);
    rig.step(&[1, 2], 1, 1);
    evaluated(&mut rig, 1, 1, 1, 80.0);
    gates(&mut rig, 1, 1, 0.9);
    assert_eq!(rig.status().gate_warnings.len(), 1);
    rig.lose(1);
    rig.lose(2);
    rig.attach(3, "a");
    rig.attach(4, "b");
    rig.wait(1.1);
    assert_eq!(shown(&rig), Some((0, 2.5)));
    assert!(rig.status().gates.is_none() && rig.status().gate_warnings.is_empty());
    rig.formed(3, 2, 0);
    rig.formed(4, 2, 0);
    evaluated(&mut rig, 3, 2, 0, 100.0);
    rig.step(&[3, 4], 2, 1);
    evaluated(&mut rig, 3, 2, 1, 80.0);
    assert_eq!(recorded(&rig), [(0, 100.0), (1, 80.0), (1, 80.0)]);
    sound(&rig);
}

#[test]
fn the_last_words_of_a_void_generation_count_with_the_step_that_a_survivor_holds() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    // Both have trained step 2, and only a lives to say so.
    rig.say(1, 1, Up::Step(report(&plan(), 2, 0, 2)));
    evaluated(&mut rig, 1, 1, 2, 60.0);
    rig.lose(2);
    rig.left_holding(1, 1, LeftReason::Void, Some(held(1, 2)));
    rig.wait(4.0);
    assert_eq!(recorded(&rig), [(2, 60.0)]);
    sound(&rig);
    // The next one starts from there and measures it again.
    rig.formed(1, 2, 2);
    evaluated(&mut rig, 1, 2, 2, 60.0);
    assert_eq!(recorded(&rig), [(2, 60.0)]);
    sound(&rig);
}

#[test]
fn a_crash_that_loses_an_evaluation_hears_it_again() {
    let mut rig = training();
    rig.step(&[1, 2], 1, 1);
    let kept = rig.facts.len();
    evaluated(&mut rig, 1, 1, 1, 80.0);
    assert_eq!(shown(&rig), Some((1, 2.0)));
    rig.restart(kept);
    assert_eq!(shown(&rig), None);
    sound(&rig);
}
