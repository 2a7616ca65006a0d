//! The session: what it does with every message, without any I/O.

use std::time::{Duration, Instant};

use supra_agent::link::{Report, Tagged};
use supra_agent::session::{Action, Input, Session, Unpublished, Unwritten};
use supra_agent::{Evaluated, FaultKind, Formed, Outcome, Phase, Unfinished};
use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{
    Assignment, CheckpointAfterStep, CheckpointWritten, CoordinatorMessage, Goodbye, Held,
    LedgerHead, OrderedFault, OrderedFaultKind, PartHolder, PublishCheckpoint, Refusal, Regroup,
    RestoreFrom, StartFromHeld, StepReport, StopAfterStep, Void, Welcome,
};

use crate::coordinator::RECIPE;

const HASH: [u8; 32] = [3; 32];

/// A session and a clock.
struct Bench {
    session: Session,
    now: Instant,
}

impl Bench {
    /// Attached, and the first heartbeat is sent.
    fn attached() -> Bench {
        let now = Instant::now();
        let mut bench = Bench {
            session: Session::new(Duration::from_secs(5), now),
            now,
        };
        bench.attach();
        bench
    }

    /// Attached and working on run/1 as rank 0 of 2.
    fn working() -> Bench {
        let mut bench = Bench::attached();
        assert_eq!(bench.says(1, assignment()), ["start job 1"]);
        bench
    }

    fn attach(&mut self) {
        assert_eq!(
            self.says(
                0,
                Down::Welcome(Welcome {
                    heartbeat_seconds: 1.0,
                    known_step: 0,
                })
            ),
            [""; 0]
        );
        assert_eq!(self.feed(Input::Tick).len(), 1);
    }

    fn feed(&mut self, input: Input) -> Vec<String> {
        self.session
            .handle(input, self.now)
            .iter()
            .map(show)
            .collect()
    }

    /// The coordinator says something of run "run".
    fn says(&mut self, generation: u64, body: Down) -> Vec<String> {
        self.says_of("run", generation, body)
    }

    fn says_of(&mut self, run: &str, generation: u64, body: Down) -> Vec<String> {
        let run = run.to_owned();
        self.feed(Input::Message(CoordinatorMessage {
            run,
            generation,
            sequence: 0,
            body: Some(body),
        }))
    }

    /// The training loop of a job says something.
    fn hears(&mut self, job: u64, report: Report) -> Vec<String> {
        self.feed(Input::Report(Tagged { job, report }))
    }

    fn done(&mut self, job: u64, outcome: Outcome) -> Vec<String> {
        self.hears(job, Report::Done(outcome))
    }

    fn published(&mut self, job: u64, step: u64, result: Result<(), Unpublished>) -> Vec<String> {
        self.feed(Input::Published {
            job,
            step,
            manifest_hash: HASH,
            result,
        })
    }

    /// A checkpoint is filled, gets its head, and is written.
    fn written(&mut self, job: u64, step: u64) -> Vec<String> {
        self.hears(job, filled(step));
        self.says(1, head(step, 32));
        self.feed(Input::Finished {
            job,
            result: Ok(CheckpointWritten {
                step,
                path: format!("step-{step}"),
                manifest_hash: HASH.to_vec(),
                ..Default::default()
            }),
        })
    }

    fn after(&mut self, seconds: f64) -> Vec<String> {
        self.now += Duration::from_secs_f64(seconds);
        self.feed(Input::Tick)
    }
}

fn show(action: &Action) -> String {
    match action {
        Action::Send {
            run,
            generation,
            body,
        } => format!("{} of {run}/{generation}", show_body(body)),
        Action::Start { job, .. } => format!("start job {job}"),
        Action::Void => "void".to_owned(),
        Action::RequestStop => "request stop".to_owned(),
        Action::RequestRegroup => "request regroup".to_owned(),
        Action::RequestCheckpoint(newest) => format!("request a checkpoint after {newest}"),
        Action::Break(kind, lasts) => format!("{kind:?} for {lasts:?}"),
        Action::Publish {
            job, step, path, ..
        } => format!("publish {path} step {step} for job {job}"),
        Action::Finish {
            job, unfinished, ..
        } => format!("finish {} for job {job}", unfinished.path),
        Action::TellPublished(step) => format!("tell published {step}"),
        Action::End(exit) => format!("end {exit:?}"),
        Action::Die(exit) => format!("die {exit:?}"),
    }
}

fn show_body(body: &Up) -> String {
    match body {
        Up::Heartbeat(beat) => format!(
            "{:?} step {} for {} ms",
            beat.phase(),
            beat.step,
            beat.in_phase_ms
        ),
        Up::Formed(_) => "formed".to_owned(),
        Up::Step(step) => format!("step {}", step.step),
        Up::CheckpointBegun(begun) => format!("begun {}", begun.step),
        Up::Evaluated(evaluated) => format!("evaluated {}", evaluated.step),
        Up::Gates(gates) => format!("gates {}", gates.step),
        Up::SnapshotTaken(taken) => format!("snapshot of step {}", taken.step),
        Up::CheckpointWritten(written) => format!("written {}", written.path),
        Up::CheckpointPublished(published) => format!("published {}", published.step),
        Up::Fault(fault) if fault.kind() == FaultKind::Hardware => {
            format!("Hardware fault {:?} by {:?}", fault.message, fault.culprit)
        }
        Up::Fault(fault) => format!("{:?} fault {:?}", fault.kind(), fault.message),
        Up::Left(left) => {
            let held = left.held.as_ref().map(|held| {
                let Held {
                    generation, step, ..
                } = held;
                format!(" holding step {step} of generation {generation}")
            });
            format!("left {:?}{}", left.reason(), held.unwrap_or_default())
        }
        Up::Log(line) => format!("log {}", line.text),
        Up::Hello(_) => "hello".to_owned(),
    }
}

fn place() -> Assignment {
    Assignment {
        recipe: RECIPE.to_owned(),
        rank: 0,
        world: 2,
        next_address: "127.0.0.1:1".to_owned(),
        data_key: vec![1; 32],
        restore: None,
        checkpoint_root: "/checkpoints".to_owned(),
        held: None,
    }
}

fn assignment() -> Down {
    Down::Assignment(place())
}

fn restoring(rank: u32) -> Down {
    let restore = RestoreFrom {
        step: 8,
        path: "step-8".to_owned(),
        manifest_hash: HASH.to_vec(),
    };
    Down::Assignment(Assignment {
        rank,
        restore: Some(restore),
        ..place()
    })
}

fn void() -> Down {
    Down::Void(Void {
        reason: "rank 1 died".to_owned(),
    })
}

fn stop() -> Down {
    Down::Stop(StopAfterStep {
        reason: "cancelled".to_owned(),
    })
}

fn regroup() -> Down {
    Down::Regroup(Regroup {
        reason: "a worker joins".to_owned(),
    })
}

/// Step 7 of generation 1 of run "run".
fn held() -> Held {
    Held {
        run: "run".to_owned(),
        generation: 1,
        step: 7,
        replica_hash: HASH.to_vec(),
        ..Held::default()
    }
}

fn publish(step: u64) -> Down {
    Down::Publish(PublishCheckpoint {
        step,
        manifest_hash: HASH.to_vec(),
    })
}

fn filled(step: u64) -> Report {
    Report::CheckpointFilled(Unfinished {
        step,
        path: format!("step-{step}"),
        bytes: 100,
        manifest: Default::default(),
        seconds: 0.1,
    })
}

fn head(step: u64, length: usize) -> Down {
    let hash = vec![7; length];
    Down::LedgerHead(LedgerHead { step, hash })
}

fn step(step: u64) -> Report {
    Report::Step(StepReport {
        step,
        ..Default::default()
    })
}

fn fault(message: &str) -> Outcome {
    Outcome::Fault {
        kind: FaultKind::Transient,
        message: message.to_owned(),
    }
}

#[test]
fn a_generation_from_assignment_to_end() {
    let mut bench = Bench::working();
    assert_eq!(
        bench.hears(1, Report::Formed(Formed::default())),
        ["formed of run/1"]
    );
    assert_eq!(bench.hears(1, step(1)), ["step 1 of run/1"]);
    assert_eq!(bench.done(1, Outcome::Finished), ["left Finished of run/1"]);
    assert_eq!(bench.says(2, assignment()), ["start job 2"]);
}

#[test]
fn a_hardware_fault_names_its_culprit_unless_the_generation_is_void_already() {
    for culprit in [Some(1), None] {
        let mut bench = Bench::working();
        let outcome = || Outcome::Hardware {
            culprit,
            message: "no two ranks agree".to_owned(),
        };
        assert_eq!(
            bench.done(1, outcome()),
            [
                format!("Hardware fault \"no two ranks agree\" by {culprit:?} of run/1"),
                "left Fault of run/1".to_owned()
            ]
        );
        let mut bench = Bench::working();
        bench.says(1, void());
        assert_eq!(bench.done(1, outcome()), ["left Void of run/1"]);
    }
}

#[test]
fn a_void_generation_is_left_when_the_loop_is_back() {
    let mut bench = Bench::working();
    assert_eq!(bench.says(1, void()), ["void"]);
    assert_eq!(
        bench.hears(1, Report::Formed(Formed::default())),
        [""; 0],
        "nobody waits for it"
    );
    assert_eq!(
        bench.hears(1, step(3)),
        ["step 3 of run/1"],
        "it may be done everywhere"
    );
    assert_eq!(
        bench.done(1, fault("lost rank 1")),
        ["left Void of run/1"],
        "an echo of the abort is no fault"
    );
}

#[test]
fn repeats_change_nothing() {
    let mut bench = Bench::working();
    assert_eq!(bench.says(1, assignment()), [""; 0]);
    assert_eq!(bench.says(1, stop()), ["request stop"]);
    assert_eq!(bench.says(1, stop()), [""; 0]);
    assert_eq!(bench.says(1, void()), ["void"]);
    assert_eq!(bench.says(1, void()), [""; 0]);
    assert_eq!(bench.done(1, Outcome::Voided), ["left Void of run/1"]);
    assert_eq!(bench.done(1, Outcome::Voided), [""; 0]);
    assert_eq!(bench.says(1, void()), [""; 0]);
    assert_eq!(bench.says(1, assignment()), [""; 0]);
}

#[test]
fn messages_of_older_generations_are_ignored() {
    let mut bench = Bench::working();
    bench.done(1, Outcome::Voided);
    assert_eq!(bench.says(3, assignment()), ["start job 2"]);
    for old in [assignment(), void(), stop(), publish(1)] {
        assert_eq!(bench.says(2, old), [""; 0]);
    }
    assert_eq!(bench.hears(1, step(9)), [""; 0]);
    assert_eq!(bench.says_of("other", 1, void()), [""; 0]);
}

#[test]
fn generations_of_another_run_count_from_one_again() {
    let mut bench = Bench::working();
    bench.done(1, Outcome::Finished);
    assert_eq!(bench.says_of("other", 1, assignment()), ["start job 2"]);
    assert_eq!(
        bench.done(2, Outcome::Finished),
        ["left Finished of other/1"]
    );
}

#[test]
fn an_assignment_waits_for_the_loop_to_leave() {
    let mut bench = Bench::working();
    bench.says(1, void());
    assert_eq!(bench.says(2, assignment()), [""; 0]);
    assert_eq!(bench.says(2, stop()), [""; 0]);
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["left Void of run/1", "start job 2", "request stop"]
    );
}

#[test]
fn an_assignment_that_waits_can_become_void() {
    let mut bench = Bench::working();
    bench.says(1, void());
    bench.says(2, assignment());
    assert_eq!(bench.says(2, void()), ["left Void of run/2"]);
    assert_eq!(bench.done(1, Outcome::Voided), ["left Void of run/1"]);
}

#[test]
fn an_assignment_without_void_before_it_voids() {
    let mut bench = Bench::working();
    assert_eq!(bench.says(2, assignment()), ["void"]);
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["left Void of run/1", "start job 2"]
    );
}

#[test]
fn an_assignment_that_cannot_be_read_is_an_input_fault() {
    let mut bench = Bench::attached();
    let bad = [
        Assignment {
            data_key: vec![1; 31],
            ..place()
        },
        Assignment { rank: 2, ..place() },
        Assignment {
            checkpoint_root: "relative".to_owned(),
            ..place()
        },
        Assignment {
            checkpoint_root: "ftp://host/checkpoints".to_owned(),
            ..place()
        },
        Assignment {
            recipe: "name: [".to_owned(),
            ..place()
        },
    ];
    for (generation, bad) in (1..).zip(bad) {
        let actions = bench.says(generation, Down::Assignment(bad));
        assert_eq!(actions.len(), 2, "{actions:?}");
        assert!(actions[0].starts_with("Input fault"), "{actions:?}");
        assert_eq!(actions[1], format!("left Fault of run/{generation}"));
    }
}

#[test]
fn what_the_loop_keeps_is_told_until_it_gets_the_next_job() {
    let mut bench = Bench::working();
    bench.says(1, void());
    assert_eq!(bench.hears(1, Report::Held(held())), [""; 0]);
    assert!(bench.session.leaving());
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["left Void holding step 7 of generation 1 of run/1"]
    );
    assert!(!bench.session.leaving());
    assert_eq!(bench.session.held(), Some(&held()));
    // It comes to nothing before the loop hears of it.
    assert_eq!(
        bench.says(2, restoring(0)),
        ["publish step-8 step 8 for job 2"]
    );
    assert_eq!(
        bench.says(2, void()),
        ["left Void holding step 7 of generation 1 of run/2"]
    );
    assert_eq!(bench.says(3, assignment()), ["start job 3"]);
    assert_eq!(bench.session.held(), None);
    bench.hears(1, Report::Held(held()));
    assert_eq!(bench.session.held(), None, "an older job's");
    assert_eq!(bench.done(3, Outcome::Voided), ["left Void of run/3"]);
}

#[test]
fn what_is_kept_outlives_the_stream_on_which_nobody_hears_of_it() {
    let mut bench = Bench::working();
    bench.feed(Input::Detached);
    assert!(bench.session.leaving(), "too early to say hello");
    bench.hears(1, Report::Held(held()));
    assert_eq!(bench.done(1, Outcome::Voided), [""; 0]);
    assert!(!bench.session.leaving());
    bench.attach();
    assert_eq!(bench.session.held(), Some(&held()));
}

#[test]
fn a_regrouping_is_asked_for_once_and_left_with_its_reason() {
    let mut bench = Bench::working();
    assert_eq!(bench.says(1, regroup()), ["request regroup"]);
    assert_eq!(bench.says(1, regroup()), [""; 0]);
    bench.hears(1, Report::Held(held()));
    assert_eq!(
        bench.done(1, Outcome::Regrouped),
        ["left Regrouped holding step 7 of generation 1 of run/1"]
    );
    assert_eq!(bench.says(1, regroup()), [""; 0]);
    // One that comes early waits for the loop, as a stop does.
    let mut bench = Bench::working();
    bench.says(1, void());
    bench.says(2, assignment());
    assert_eq!(bench.says(2, regroup()), [""; 0]);
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["left Void of run/1", "start job 2", "request regroup"]
    );
}

#[test]
fn a_checkpoint_is_asked_of_the_loop_that_works_and_of_no_other() {
    let mut bench = Bench::working();
    let checkpoint = || Down::Checkpoint(CheckpointAfterStep { newest: 4 });
    assert_eq!(
        bench.says(1, checkpoint()),
        ["request a checkpoint after 4"]
    );
    assert_eq!(bench.says(2, checkpoint()), [""; 0]);
}

#[test]
fn an_ordered_fault_is_obeyed_once_and_only_in_its_generation() {
    let mut bench = Bench::working();
    let fault = |number| {
        Down::OrderedFault(OrderedFault {
            kind: OrderedFaultKind::Stop.into(),
            seconds: 1.5,
            number,
        })
    };
    assert_eq!(bench.says(2, fault(1)), [""; 0]);
    assert_eq!(bench.says(1, fault(1)), ["Stop for 1.5s"]);
    assert_eq!(bench.says(1, fault(1)), [""; 0], "a repeat");
    assert_eq!(bench.says(1, fault(2)), ["Stop for 1.5s"]);
}

#[test]
fn an_assignment_to_start_from_memory_names_the_state_and_who_holds_it() {
    let from = |state: Option<Held>, holders: &[u32]| {
        Down::Assignment(Assignment {
            held: Some(StartFromHeld {
                state,
                holders: holders.to_vec(),
                parts: Vec::new(),
            }),
            ..place()
        })
    };
    let mut bench = Bench::attached();
    let body = from(Some(held()), &[1]);
    let actions = bench.session.handle(
        Input::Message(CoordinatorMessage {
            run: "run".to_owned(),
            generation: 1,
            sequence: 0,
            body: Some(body),
        }),
        bench.now,
    );
    let [Action::Start { place, .. }] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    let donation = place.donation.as_ref().unwrap();
    assert_eq!(
        (&donation.state, donation.holders.as_slice()),
        (&held(), &[1][..])
    );

    let other_run = Held {
        run: "other".to_owned(),
        ..held()
    };
    let short = Held {
        replica_hash: vec![3; 31],
        ..held()
    };
    let bad = [
        (None, &[0][..], "but no state"),
        (Some(other_run), &[0], "another one"),
        (Some(short), &[0], "31 bytes"),
        (Some(held()), &[], "in order"),
        (Some(held()), &[0, 2], "in order"),
        (Some(held()), &[1, 0], "in order"),
    ];
    for (generation, (state, holders, why)) in (1..).zip(bad) {
        let actions = Bench::attached().says(generation, from(state, holders));
        assert!(
            actions[0].starts_with("Input fault") && actions[0].contains(why),
            "{actions:?}"
        );
    }
}

#[test]
fn an_assignment_to_start_from_parts_names_who_hands_over_each() {
    let from = |parts: &[(u32, usize)]| {
        let part = |(rank, bytes): &(u32, usize)| PartHolder {
            rank: *rank,
            hash: vec![4; *bytes],
        };
        Down::Assignment(Assignment {
            held: Some(StartFromHeld {
                state: Some(Held {
                    replica_hash: Vec::new(),
                    ..held()
                }),
                holders: Vec::new(),
                parts: parts.iter().map(part).collect(),
            }),
            ..place()
        })
    };
    let mut bench = Bench::attached();
    let actions = bench.session.handle(
        Input::Message(CoordinatorMessage {
            run: "run".to_owned(),
            generation: 1,
            sequence: 0,
            body: Some(from(&[(1, 32), (0, 32), (1, 32)])),
        }),
        bench.now,
    );
    let [Action::Start { place, .. }] = actions.as_slice() else {
        panic!("{actions:?}")
    };
    let donation = place.donation.as_ref().unwrap();
    let ranks: Vec<u32> = donation.parts.iter().map(|part| part.rank).collect();
    assert_eq!((ranks, donation.holders.len()), (vec![1, 0, 1], 0));
    for (generation, (part, why)) in
        (1..).zip([((2, 32), "there are 2 ranks"), ((0, 31), "31 bytes")])
    {
        let actions = Bench::attached().says(generation, from(&[(0, 32), part]));
        assert!(actions[0].contains(why), "{actions:?}");
    }
}

#[test]
fn a_fault_is_told_before_leaving() {
    let mut bench = Bench::working();
    let actions = bench.done(1, fault("disk full"));
    assert_eq!(
        actions,
        [
            "Transient fault \"disk full\" of run/1",
            "left Fault of run/1"
        ]
    );
}

#[test]
fn a_checkpoint_is_published_when_it_is_journalled() {
    let mut bench = Bench::working();
    assert_eq!(bench.written(1, 8), ["written step-8 of run/1"]);
    assert_eq!(
        bench.says(1, publish(8)),
        ["publish step-8 step 8 for job 1"]
    );
    assert_eq!(
        bench.published(1, 8, Ok(())),
        ["tell published 8", "published 8 of run/1"]
    );
    assert_eq!(
        bench.says(1, publish(8)),
        ["published 8 of run/1"],
        "a repeat is told again"
    );
}

#[test]
fn a_manifest_is_finished_with_the_ledgers_head_once() {
    let mut bench = Bench::working();
    assert_eq!(bench.hears(1, filled(8)), ["begun 8 of run/1"]);
    assert_eq!(bench.says(2, head(8, 32)), [""; 0], "another generation's");
    assert_eq!(bench.says(1, head(7, 32)), [""; 0], "another step's");
    assert_eq!(bench.says(1, head(8, 32)), ["finish step-8 for job 1"]);
    assert_eq!(bench.says(1, head(8, 32)), [""; 0], "a repeat");
    let full = Input::Finished {
        job: 1,
        result: Err(Unwritten::Refused("disk full".to_owned())),
    };
    let actions = bench.feed(full);
    assert_eq!(actions, ["Transient fault \"disk full\" of run/1", "void"]);
    let mut bench = Bench::working();
    let actions = bench.says(1, head(8, 31));
    assert!(
        actions[0].contains("31 bytes") && actions[1] == "void",
        "{actions:?}"
    );
}

#[test]
fn a_coordinator_that_did_not_give_the_ledger_is_asked_again() {
    let mut bench = Bench::working();
    bench.hears(1, filled(8));
    bench.says(1, head(8, 32));
    let Report::CheckpointFilled(unfinished) = filled(8) else {
        unreachable!("it is one");
    };
    let again = bench.feed(Input::Finished {
        job: 1,
        result: Err(Unwritten::NoLedger(Box::new(unfinished))),
    });
    assert_eq!(again, ["begun 8 of run/1"]);
    assert_eq!(bench.says(1, head(8, 32)), ["finish step-8 for job 1"]);
}

#[test]
fn a_failed_publication_ends_the_generation() {
    let mut bench = Bench::working();
    bench.written(1, 8);
    bench.says(1, publish(8));
    let full = Unpublished {
        kind: FaultKind::Input,
        message: "disk full".to_owned(),
    };
    let actions = bench.published(1, 8, Err(full));
    assert_eq!(actions, ["Transient fault \"disk full\" of run/1", "void"]);
    assert_eq!(bench.done(1, Outcome::Voided), ["left Fault of run/1"]);
}

#[test]
fn an_unknown_checkpoint_is_not_published() {
    let mut bench = Bench::working();
    bench.written(1, 8);
    let actions = bench.says(1, publish(9));
    assert!(
        actions[0].contains("did not write") && actions[1] == "void",
        "{actions:?}"
    );
}

#[test]
fn rank_0_publishes_the_checkpoint_to_start_from() {
    let mut bench = Bench::attached();
    assert_eq!(
        bench.says(1, restoring(0)),
        ["publish step-8 step 8 for job 1"]
    );
    assert_eq!(bench.published(1, 8, Ok(())), ["start job 1"]);
    let mut bench = Bench::attached();
    assert_eq!(bench.says(1, restoring(1)), ["start job 1"]);
}

#[test]
fn a_missing_checkpoint_to_start_from_is_damage_and_a_silent_store_is_none() {
    for (kind, shown) in [
        (FaultKind::CheckpointDamaged, "CheckpointDamaged"),
        (FaultKind::Transient, "Transient"),
    ] {
        let mut bench = Bench::attached();
        bench.says(1, restoring(0));
        let message = "no manifest".to_owned();
        let actions = bench.published(1, 8, Err(Unpublished { kind, message }));
        let fault = format!("{shown} fault \"no manifest\" of run/1");
        assert_eq!(actions, [fault.as_str(), "left Fault of run/1"]);
    }
}

#[test]
fn a_void_while_preparing_is_left_at_once() {
    let mut bench = Bench::attached();
    bench.says(1, restoring(0));
    assert_eq!(bench.says(1, void()), ["left Void of run/1"]);
    assert_eq!(bench.published(1, 8, Ok(())), [""; 0]);
    assert_eq!(bench.says(2, assignment()), ["start job 2"]);
}

#[test]
fn a_broken_stream_voids_a_place_that_has_not_formed_and_the_next_begins_afresh() {
    let mut bench = Bench::working();
    assert_eq!(bench.feed(Input::Detached), ["void"]);
    assert_eq!(bench.after(1.0), [""; 0], "nobody to send a heartbeat to");
    bench.attach();
    assert_eq!(bench.says(2, assignment()), [""; 0]);
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["start job 2"],
        "the new stream knows of nothing to leave"
    );
}

#[test]
fn a_break_after_a_void_does_not_leave_on_the_next_stream() {
    let mut bench = Bench::working();
    bench.says(1, void());
    assert_eq!(bench.feed(Input::Detached), [""; 0]);
    bench.attach();
    assert_eq!(bench.done(1, Outcome::Voided), [""; 0]);
}

#[test]
fn heartbeats_tell_how_long_the_training_loop_waits_for_others() {
    let mut bench = Bench::working();
    for waited in [Duration::from_secs(3), Duration::ZERO] {
        assert_eq!(bench.feed(Input::Waited(waited)), [""; 0]);
        bench.now += Duration::from_secs(1);
        let actions = bench.session.handle(Input::Tick, bench.now);
        let [Action::Send { body, .. }] = actions.as_slice() else {
            panic!("one heartbeat, not {actions:?}");
        };
        let Up::Heartbeat(beat) = body.as_ref() else {
            panic!("one heartbeat, not {body:?}");
        };
        assert_eq!(u128::from(beat.waiting_ms), waited.as_millis());
    }
}

#[test]
fn heartbeats_tell_phase_step_and_time() {
    let mut bench = Bench::attached();
    assert_eq!(bench.after(0.5), [""; 0]);
    assert_eq!(bench.after(0.5), ["Idle step 0 for 1000 ms of /0"]);
    bench.says(1, assignment());
    bench.hears(1, Report::Phase(Phase::Training, 7));
    assert_eq!(bench.after(1.0), ["Training step 7 for 1000 ms of run/1"]);
    bench.says(1, void());
    assert_eq!(bench.after(1.0), ["Leaving step 0 for 1000 ms of run/1"]);
}

#[test]
fn a_loop_that_does_not_come_back_ends_the_process() {
    let mut bench = Bench::working();
    bench.says(1, void());
    assert!(!bench.after(4.9).contains(&"die None".to_owned()));
    assert!(bench.after(0.2).contains(&"die None".to_owned()));
}

#[test]
fn goodbye_ends_an_idle_worker_at_once_and_a_busy_one_when_it_has_left() {
    let goodbye = || {
        Down::Goodbye(Goodbye {
            reason: "done".to_owned(),
        })
    };
    assert_eq!(Bench::attached().says(0, goodbye()), ["end Goodbye"]);
    let mut bench = Bench::working();
    assert_eq!(bench.says(0, goodbye()), ["void"]);
    assert_eq!(bench.says(2, assignment()), [""; 0]);
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["left Void of run/1", "end Goodbye"]
    );
    let mut bench = Bench::working();
    bench.says(0, goodbye());
    assert!(bench.after(5.0).contains(&"die Some(Goodbye)".to_owned()));
}

#[test]
fn a_refusal_ends_the_worker_with_its_reason() {
    let refusal = Down::Refusal(Refusal {
        message: "another build".to_owned(),
    });
    assert_eq!(
        Bench::attached().says(0, refusal),
        ["end Refused(\"another build\")"]
    );
}

#[test]
fn an_interrupted_worker_leaves_its_generation_first() {
    let mut bench = Bench::working();
    let actions = bench.feed(Input::Interrupted("stopped by SIGTERM".to_owned()));
    assert_eq!(
        actions,
        ["Transient fault \"stopped by SIGTERM\" of run/1", "void"]
    );
    assert_eq!(
        bench.done(1, Outcome::Voided),
        ["left Fault of run/1", "end Interrupted"]
    );
    assert_eq!(
        Bench::attached().feed(Input::Interrupted("SIGINT".to_owned())),
        ["end Interrupted"]
    );
}

/// Working, formed, and the stream is broken after step 1.
fn away() -> Bench {
    let mut bench = Bench::working();
    bench.hears(1, Report::Formed(Formed::default()));
    bench.hears(1, step(1));
    assert_eq!(bench.feed(Input::Detached), [""; 0]);
    bench
}

fn welcome(known_step: u64) -> Down {
    Down::Welcome(Welcome {
        heartbeat_seconds: 1.0,
        known_step,
    })
}

#[test]
fn a_formed_worker_goes_on_without_a_coordinator_and_says_it_again_in_order() {
    let mut bench = away();
    assert_eq!(bench.after(100.0), [""; 0]);
    let place = bench.session.place().unwrap();
    assert_eq!((place.generation, place.rank, place.left), (1, 0, false));
    assert_eq!(bench.hears(1, step(2)), [""; 0]);
    assert_eq!(bench.hears(1, filled(2)), [""; 0]);
    let evaluated = Evaluated {
        step: 2,
        ..Evaluated::default()
    };
    assert_eq!(bench.hears(1, Report::Evaluated(evaluated)), [""; 0]);
    assert_eq!(bench.hears(1, step(3)), [""; 0]);
    assert_eq!(
        bench.says(0, welcome(1)),
        [
            "step 2 of run/1",
            "begun 2 of run/1",
            "evaluated 2 of run/1",
            "step 3 of run/1"
        ]
    );
    assert_eq!(bench.says(0, welcome(1)), [""; 0], "a repeat");
    assert_eq!(bench.after(100.0).len(), 1, "only a heartbeat");
    assert_eq!(bench.says(1, head(2, 32)), ["finish step-2 for job 1"]);
    assert_eq!(bench.says(1, stop()), ["request stop"]);
}

#[test]
fn a_worker_leaves_when_its_coordinator_is_away_for_too_long_and_says_so_when_it_is_back() {
    let mut bench = away();
    assert_eq!(bench.after(119.0), [""; 0]);
    bench.hears(1, step(2));
    assert_eq!(bench.after(1.0), ["void"]);
    assert!(bench.session.leaving(), "too early to say hello");
    bench.hears(1, Report::Held(held()));
    assert_eq!(bench.done(1, Outcome::Voided), [""; 0]);
    assert!(bench.session.place().unwrap().left);
    let left = "left Void holding step 7 of generation 1 of run/1";
    for _ in 0..2 {
        // Whoever hears it may die before it is written down.
        assert_eq!(bench.says(0, welcome(1)), ["step 2 of run/1", left]);
        bench.feed(Input::Detached);
    }
    bench.says(0, welcome(1));
    assert_eq!(bench.says(2, assignment()), ["start job 2"]);
    assert_eq!(bench.session.place(), None, "it has not formed");
}

#[test]
fn a_fault_of_the_time_without_a_coordinator_is_told_when_it_is_back() {
    let mut bench = away();
    assert_eq!(bench.done(1, fault("disk full")), [""; 0]);
    assert_eq!(
        bench.says(0, welcome(1)),
        [
            "Transient fault \"disk full\" of run/1",
            "left Fault of run/1"
        ]
    );
}

#[test]
fn a_checkpoint_that_a_dead_coordinator_knew_of_is_told_of_again() {
    let mut bench = Bench::working();
    bench.hears(1, Report::Formed(Formed::default()));
    bench.written(1, 8);
    bench.feed(Input::Detached);
    assert_eq!(bench.says(0, welcome(8)), ["written step-8 of run/1"]);
    bench.says(1, publish(8));
    bench.feed(Input::Detached);
    bench.published(1, 8, Ok(()));
    assert_eq!(bench.says(0, welcome(8)), ["published 8 of run/1"]);
}

#[test]
fn a_worker_that_comes_back_too_late_is_told_and_leaves() {
    let mut bench = away();
    bench.says(0, welcome(u64::MAX));
    assert_eq!(bench.says(1, void()), ["void"]);
    assert_eq!(bench.done(1, Outcome::Voided), ["left Void of run/1"]);
}

#[test]
fn leaving_while_the_answer_to_hello_is_under_way_is_told() {
    let mut bench = away();
    assert_eq!(bench.after(120.0), ["void"]);
    assert_eq!(bench.says(0, welcome(1)), [""; 0]);
    assert_eq!(bench.done(1, Outcome::Voided), ["left Void of run/1"]);
}
