//! The account of a run's time, by example and for any sequence of events.

use proptest::prelude::*;
use supra_proto::v1;

use super::*;
use crate::ledger::Tail;
use crate::machine::{Checkpoint, Outcome};

fn formed() -> Fact {
    Fact::Formed {
        run: 1,
        generation: 1,
        members: vec!["a".into()],
        from_step: 0,
        circumstances: [0; 32],
    }
}

fn broke() -> Fact {
    Fact::Broke {
        run: 1,
        generation: 1,
        step: 0,
        counts: true,
        cause: "rank 1 (b) was lost".into(),
    }
}

fn void(after_step: u64) -> Fact {
    let body = Body::Void {
        generation: 1,
        after_step,
        reason: String::new(),
    };
    Fact::Recorded {
        run: 1,
        record: Tail::default().next(body),
    }
}

fn path(step: u64) -> String {
    format!("step-{step}")
}

fn damaged(step: u64) -> Fact {
    Fact::Damaged {
        run: 1,
        path: path(step),
        problem: "a bit has flipped".into(),
    }
}

fn retired(step: u64) -> Fact {
    Fact::Retired {
        run: 1,
        path: path(step),
    }
}

fn written(step: u64) -> Fact {
    let checkpoint = Checkpoint {
        step,
        tokens: 0,
        generation: 1,
        path: path(step),
        bytes: 0,
        manifest_hash: [0; 32],
        published: false,
        world: 1,
        at: 0,
        verified: false,
        name: String::new(),
    };
    Fact::Written { run: 1, checkpoint }
}

fn ended(at: u64) -> Fact {
    Fact::Ended {
        run: 1,
        outcome: Outcome::Finished,
        reason: String::new(),
        at,
        broken: false,
    }
}

fn step(step: u64, seconds: f64) -> StepMetrics {
    StepMetrics {
        step,
        seconds,
        data_seconds: 0.1,
        exposed_comm_ms: 200.0,
        ..StepMetrics::default()
    }
}

/// A run that was submitted at 0, forms for a second and loads for two: trains from 3000 on.
fn training() -> Account {
    let mut account = Account::new(0);
    account.decided(&formed(), 0);
    account.seen(Doing::Restoring, 1000);
    account.seen(Doing::Training, 3000);
    account
}

#[test]
fn a_quiet_run_spends_its_time_on_steps_and_checkpoints() {
    let mut account = training();
    account.measured(&step(1, 1.0), 4000);
    account.measured(&step(2, 1.0), 5000);
    account.decided(&written(2), 7000);
    account.measured(&step(3, 1.0), 8000);
    account.decided(&written(3), 8500);
    account.decided(&ended(9000), 9000);
    let parts = account.parts(100_000);
    assert_eq!(
        parts,
        Parts {
            productive: 2_100_000,
            data: 300_000,
            exposed_comm: 600_000,
            checkpoint: 3_000_000,
            restore: 2_000_000,
            forming: 1_000_000,
            ..Parts::default()
        }
    );
    let share = Goodput::from(&v1::Goodput::from(parts)).share;
    assert_eq!(share, Some(2.1 / 9.0));
}

#[test]
fn a_death_costs_the_voided_steps_and_what_was_under_way() {
    let mut account = training();
    account.measured(&step(1, 1.0), 4000);
    account.decided(&written(1), 4000);
    account.measured(&step(2, 1.0), 5000);
    account.measured(&step(3, 1.0), 6000);
    account.decided(&broke(), 6500);
    account.seen(Doing::Forming, 6500);
    account.decided(&void(1), 8000);
    account.decided(&formed(), 8000);
    account.seen(Doing::Restoring, 8000);
    account.seen(Doing::Training, 9000);
    let parts = account.parts(9000);
    assert_eq!((parts.lost, parts.productive), (2_500_000, 700_000));
    assert_eq!((parts.forming, parts.restore), (2_500_000, 3_000_000));
    let (count, listed) = account.incidents();
    assert_eq!(count, 1);
    assert_eq!(
        listed.cloned().collect::<Vec<_>>(),
        [Incident {
            generation: 1,
            cause: "rank 1 (b) was lost".into(),
            detected_unix_ms: 6500,
            training_unix_ms: Some(9000),
            lost_seconds: 2.5,
            voided_steps: 2,
        }]
    );
}

/// Steps 1 to 4 of a second each, with checkpoints behind 1, 2 and 3.
fn with_three_checkpoints() -> Account {
    let mut account = training();
    for number in 1..=4 {
        let at = 3000 + 1000 * number;
        account.measured(&step(number, 1.0), at);
        if number < 4 {
            account.decided(&written(number), at);
        }
    }
    account
}

#[test]
fn a_damaged_checkpoint_costs_the_steps_behind_it_and_after_it() {
    // Whether the coordinator has started again since makes no difference, nor that an old one is gone.
    for restarted in [false, true] {
        let mut account = with_three_checkpoints();
        account.decided(&retired(1), 7000);
        if restarted {
            let note = serde_json::to_string(&account).unwrap();
            account = serde_json::from_str(&note).unwrap();
        }
        account.decided(&broke(), 7000);
        account.decided(&damaged(3), 7000);
        assert_eq!(account.parts(7000).lost, 0, "nothing is void yet");
        account.decided(&void(2), 7000);
        assert_eq!(account.parts(7000).lost, 2_000_000);
        let (_, mut listed) = account.incidents();
        assert_eq!(listed.next().map(|incident| incident.voided_steps), Some(2));
    }
}

#[test]
fn when_no_checkpoint_is_whole_all_that_was_trained_is_lost() {
    let mut account = with_three_checkpoints();
    account.decided(&retired(1), 7000);
    account.decided(&broke(), 7000);
    account.decided(&damaged(3), 7000);
    account.decided(&damaged(2), 7000);
    account.decided(&void(0), 7000);
    let parts = account.parts(7000);
    assert_eq!((parts.lost, parts.productive), (4_000_000, 0));
}

#[test]
fn an_account_without_durable_steps_is_read() {
    let mut note = serde_json::to_value(training()).unwrap();
    note.as_object_mut().unwrap().remove("durable");
    let account: Account = serde_json::from_value(note).unwrap();
    assert_eq!(account, training());
}

#[test]
fn reports_that_come_late_and_together_spend_the_time_that_they_took() {
    let mut account = training();
    for number in 1..=4 {
        account.measured(&step(number, 1.0), 7000);
    }
    let parts = account.parts(7000);
    assert_eq!((parts.productive, parts.data), (2_800_000, 400_000));
    assert_eq!(account.unspent, 0);
}

#[test]
fn a_run_that_ended_stands_still_and_idles_until_it_is_queued_again() {
    let mut account = training();
    account.decided(&ended(3000), 3000);
    assert_eq!(account.parts(50_000), account.parts(3000));
    account.decided(
        &Fact::Queued {
            run: 1,
            strict: false,
            at: 10_000,
        },
        10_000,
    );
    assert_eq!(account.parts(11_000).idle, 8_000_000);
}

#[test]
fn an_account_goes_on_after_a_restart_and_the_gap_is_lost() {
    let mut account = training();
    account.measured(&step(1, 1.0), 4000);
    account.measured(&step(2, 1.0), 5000);
    let note = serde_json::to_string(&account).unwrap();
    let mut account: Account = serde_json::from_str(&note).unwrap();
    account.resumed(8000);
    account.decided(&broke(), 8000);
    account.decided(&void(0), 8000);
    let parts = account.parts(8000);
    assert_eq!((parts.lost, parts.productive), (5_000_000, 0));
    let (_, mut listed) = account.incidents();
    assert_eq!(listed.next().map(|incident| incident.voided_steps), Some(2));
}

#[test]
fn a_run_of_which_nothing_was_noted_has_an_account_from_its_submission_on() {
    let taken_up = Fact::TakenUp {
        run: 1,
        generation: 1,
        at: 3000,
    };
    let mut account = Account::unnoted(1000, true);
    account.resumed(3000);
    account.decided(&taken_up, 3000);
    account.measured(&step(1, 1.5), 3500);
    let parts = v1::Goodput::from(account.parts(3500));
    assert_eq!((parts.lost, parts.idle), (0.0, 0.0));
    assert!(parts.productive > 0.0, "{parts:?}");
    let (count, mut incidents) = account.incidents();
    let since = incidents.next().map(|incident| incident.detected_unix_ms);
    assert_eq!((count, since), (1, Some(1000)));

    let mut between = Account::unnoted(1000, false);
    between.resumed(3000);
    assert_eq!(v1::Goodput::from(between.parts(3000)).idle, 2.0);
}

#[test]
fn a_coordinator_that_was_away_is_an_incident_that_cost_nothing() {
    let mut account = training();
    account.measured(&step(1, 1.0), 4000);
    account.resumed(9000);
    account.decided(
        &Fact::TakenUp {
            run: 1,
            generation: 1,
            at: 9500,
        },
        9500,
    );
    // What the workers did meanwhile is known now.
    for number in 2..=6 {
        account.measured(&step(number, 1.0), 9600);
    }
    let (count, incidents) = account.incidents();
    let incident = incidents.last().unwrap().clone();
    assert_eq!((count, incident.lost_seconds), (1, 0.0));
    assert_eq!(
        (incident.detected_unix_ms, incident.training_unix_ms),
        (4000, Some(9500))
    );
    let parts = v1::Goodput::from(account.parts(9600));
    assert_eq!(parts.lost, 0.0);
    assert!((parts.productive - 4.8).abs() < 1e-9, "{parts:?}");
}

#[test]
fn incidents_are_counted_and_the_newest_are_listed() {
    let mut account = training();
    for _ in 0..MAX_INCIDENTS + 10 {
        account.decided(&broke(), 4000);
    }
    let (count, listed) = account.incidents();
    assert_eq!(
        (count, listed.count()),
        (MAX_INCIDENTS as u64 + 10, MAX_INCIDENTS)
    );
}

/// What may happen, and how long after what was before it, milliseconds; clocks go back, too.
#[derive(Clone, Debug)]
enum Happening {
    Decided(Fact),
    Seen(Doing),
    Measured(StepMetrics),
    StoodStill(f64),
    Restarted,
}

fn happening() -> impl Strategy<Value = Happening> {
    let doing = prop_oneof![
        Just(Doing::Idle),
        Just(Doing::Forming),
        Just(Doing::Restoring),
        Just(Doing::Training),
    ];
    let number = prop_oneof![-1.0..10.0f64, Just(f64::NAN), Just(f64::INFINITY)];
    let metrics =
        (1..20u64, number.clone(), number.clone()).prop_map(|(step, seconds, other)| StepMetrics {
            step,
            seconds,
            data_seconds: other,
            exposed_comm_ms: 1e3 * other,
            ..StepMetrics::default()
        });
    prop_oneof![
        1 => Just(Happening::Decided(formed())),
        1 => Just(Happening::Decided(broke())),
        1 => Just(Happening::Decided(ended(0))),
        1 => Just(Happening::Decided(Fact::Queued { run: 1, strict: false, at: 0 })),
        1 => (0..20u64).prop_map(|step| Happening::Decided(void(step))),
        1 => (0..20u64).prop_map(|step| Happening::Decided(written(step))),
        1 => (0..20u64).prop_map(|step| Happening::Decided(damaged(step))),
        1 => (0..20u64).prop_map(|step| Happening::Decided(retired(step))),
        1 => Just(Happening::Restarted),
        1 => number.prop_map(Happening::StoodStill),
        4 => doing.prop_map(Happening::Seen),
        6 => metrics.prop_map(Happening::Measured),
    ]
}

proptest! {
    #[test]
    fn the_parts_always_add_up_to_the_whole(
        events in prop::collection::vec((happening(), -500..5000i64), 0..200),
        start in 0..2_000_000_000_000u64,
    ) {
        let mut account = Account::new(start);
        let mut at = start;
        for (event, after) in events {
            at = at.saturating_add_signed(after);
            match event {
                Happening::Decided(fact) => account.decided(&fact, at),
                Happening::Seen(doing) => account.seen(doing, at),
                Happening::Measured(metrics) => account.measured(&metrics, at),
                Happening::StoodStill(seconds) => account.stood_still(seconds, at),
                Happening::Restarted => {
                    let note = serde_json::to_string(&account).unwrap();
                    account = serde_json::from_str(&note).unwrap();
                    account.resumed(at);
                }
            }
            let v1::Goodput { productive, data, exposed_comm, checkpoint, restore, lost, forming, idle, evaluation } =
                account.parts(at).into();
            let working = [productive, data, exposed_comm, checkpoint, evaluation];
            let parts = [&working[..], &[restore, lost, forming, idle]].concat();
            prop_assert!(parts.iter().all(|part| *part >= 0.0), "{:?}", parts);
            let spent = if account.ended { account.at } else { account.at.max(at) } - start;
            let sum: f64 = parts.iter().sum();
            prop_assert!((sum - spent as f64 / 1e3).abs() < 1e-6, "{} of {} ms", sum, spent);
        }
    }
}
