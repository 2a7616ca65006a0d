//! Accounts that are right, wrong and tampered with.

use super::*;
use proptest::prelude::*;
use supra_proto::v1;

fn opening() -> Body {
    Body::Open(Open {
        run: "quick-1".into(),
        recipe_hash: [1; 32],
        manifest_hash: [2; 32],
        windows: 100,
        sequence_length: 8,
        batch_samples: 4,
        samples: 10,
        steps: 3,
    })
}

fn step(generation: u64, step: u64) -> Body {
    let first_sample = (step - 1) * 4;
    let samples = if step == 3 { 2 } else { 4 };
    let skipped = step == 2;
    Body::Step(Step {
        generation,
        step,
        first_sample,
        samples,
        digest: [7; 32],
        skipped,
    })
}

fn evaluated(generation: u64, step: u64) -> Body {
    Body::Evaluated(Evaluation {
        generation,
        step,
        windows: 4,
        loss_bits: ledger::loss_bits(64.0),
        targets: 32,
    })
}

fn durable(generation: u64, step: u64) -> Body {
    Body::Durable {
        generation,
        step,
        manifest_hash: [9; 32],
    }
}

fn void(generation: u64, after_step: u64) -> Body {
    Body::Void {
        generation,
        after_step,
        reason: "rank 1 vanished".into(),
    }
}

fn chain(bodies: impl IntoIterator<Item = Body>) -> Vec<Record> {
    let mut tail = ledger::Tail::default();
    let mut records = Vec::new();
    for body in bodies {
        let record = tail.next(body);
        tail.advance(&record);
        records.push(record);
    }
    records
}

fn finished() -> Vec<Record> {
    chain([
        opening(),
        step(1, 1),
        step(1, 2),
        void(1, 0),
        step(2, 1),
        durable(2, 1),
        step(2, 2),
        step(2, 3),
        durable(2, 3),
        Body::Close {
            step: 3,
            samples: 10,
        },
    ])
}

fn breaks(bodies: impl IntoIterator<Item = Body>) -> Vec<String> {
    audit(chain(bodies), Options::default())
        .breaks
        .into_iter()
        .map(|broken| broken.what)
        .collect()
}

#[test]
fn a_finished_run_is_accounted_for_to_the_token() {
    let verdict = audit(finished(), Options::default());
    assert_eq!(verdict.breaks, []);
    assert!(verdict.finished);
    assert_eq!(
        (verdict.steps, verdict.samples, verdict.tokens),
        (3, 10, 80)
    );
    assert_eq!((verdict.generations, verdict.voided_steps), (2, 2));
    assert_eq!(verdict.skipped, [2]);
}

#[test]
fn the_json_shape_is_stable() {
    let json = serde_json::to_value(audit(finished(), Options::default())).unwrap();
    let mut keys: Vec<_> = json.as_object().unwrap().keys().cloned().collect();
    keys.sort();
    let expected = "breaks budget_steps budget_tokens checkpoints damaged_checkpoints durable_step evaluations files finished generations head more_breaks \
                    records run samples skipped steps tokens verdict voided_steps";
    assert_eq!(keys.join(" "), expected);
    assert_eq!(json["verdict"], "ok");
}

#[test]
fn a_checkpoint_shows_that_the_ledger_lost_its_end() {
    let records = finished();
    let checkpoints = |places: &[usize]| Options {
        checkpoints: places
            .iter()
            .map(|&place| Remembered {
                manifest: format!("step-{place}/manifest.json"),
                head: records[place].hash,
            })
            .collect(),
        ..Options::default()
    };
    let whole = audit(records.clone(), checkpoints(&[4, 7]));
    assert_eq!((whole.breaks, whole.checkpoints), (vec![], 2));
    // A shorter ledger that is sound in itself.
    let cut = audit(records[..7].to_vec(), checkpoints(&[4, 7]));
    assert_eq!((cut.verdict, cut.checkpoints), (Outcome::Broken, 1));
    let what = &cut.breaks[0].what;
    assert!(
        what.contains("step-7/manifest.json") && what.contains("records are missing"),
        "{what}"
    );
}

#[test]
fn an_altered_manifest_is_found_at_the_record_that_names_it() {
    let records = finished();
    let (place, generation, step, manifest_hash) = records
        .iter()
        .find_map(|record| match record.body {
            Body::Durable {
                generation,
                step,
                manifest_hash,
            } => Some((record.index, generation, step, manifest_hash)),
            _ => None,
        })
        .unwrap();
    let with = |generation, hash| Options {
        manifests: vec![Manifest {
            path: "a/manifest.json".to_owned(),
            generation,
            step,
            hash,
        }],
        ..Options::default()
    };
    let whole = audit(records.clone(), with(generation, manifest_hash));
    assert_eq!(whole.breaks, []);
    // One that no record names says nothing: it was published after the last.
    let unnamed = audit(records.clone(), with(generation + 9, [1; 32]));
    assert_eq!(unnamed.breaks, []);
    let altered = audit(records, with(generation, [1; 32]));
    assert_eq!(altered.breaks[0].record, place);
    let what = &altered.breaks[0].what;
    assert!(
        what.contains("a/manifest.json") && what.contains("altered"),
        "{what}"
    );
}

#[test]
fn files_that_are_not_what_was_written_break_the_account() {
    let options = Options {
        files: (vec!["model has 1 byte".to_owned()], 3),
        ..Options::default()
    };
    let verdict = audit(finished(), options);
    assert_eq!((verdict.verdict, verdict.files), (Outcome::Broken, 3));
    assert_eq!(verdict.breaks[0].what, "model has 1 byte");
}

#[test]
fn each_wrong_account_is_named() {
    let has = |bodies: Vec<Body>, text: &str| {
        let found = breaks(bodies);
        assert!(
            found.iter().any(|what| what.contains(text)),
            "{text}: {found:?}"
        );
    };
    has(vec![step(1, 1)], "does not begin with an opening");
    has(vec![opening(), opening()], "a second time");
    has(vec![opening(), step(1, 2)], "samples are missing");
    has(vec![opening(), step(1, 1), step(1, 1)], "trained twice");
    has(
        vec![opening(), step(1, 1), void(1, 0), step(1, 1)],
        "took its place",
    );
    has(vec![opening(), step(2, 1), step(1, 2)], "took its place");
    has(
        vec![opening(), step(1, 1), durable(1, 1), void(1, 0)],
        "is durable",
    );
    has(vec![opening(), durable(1, 1)], "durable, but the last step");
    has(
        vec![
            opening(),
            Body::Close {
                step: 3,
                samples: 10,
            },
        ],
        "only 0 of 3 steps",
    );
    has(
        vec![
            opening(),
            Body::Close {
                step: 2,
                samples: 8,
            },
        ],
        "the budget is step 3 with 10",
    );
    let short = Body::Step(Step {
        generation: 1,
        step: 1,
        first_sample: 0,
        samples: 3,
        digest: [7; 32],
        skipped: false,
    });
    has(
        vec![opening(), short],
        "holds samples 0..3, the plan says 0..4",
    );
}

#[test]
fn steps_that_only_a_damaged_checkpoint_held_may_be_trained_again() {
    let lost = |step, durable| Body::Lost {
        generation: 1,
        step,
        manifest_hash: [9; 32],
        durable,
        reason: "model.safetensors: the file is missing".into(),
    };
    let begun = vec![opening(), step(1, 1), step(1, 2), durable(1, 2)];
    let again = [
        lost(2, 0),
        void(1, 0),
        step(2, 1),
        step(2, 2),
        durable(2, 2),
    ];
    let verdict = audit(
        chain([begun.clone(), again.to_vec()].concat()),
        Options::default(),
    );
    assert_eq!(verdict.breaks, []);
    assert_eq!((verdict.damaged_checkpoints, verdict.voided_steps), (1, 2));
    for (wrong, rest) in [
        (lost(1, 0), void(1, 0)),
        (lost(2, 2), void(1, 1)),
        (lost(2, 1), void(1, 0)),
    ] {
        let bodies = [begun.clone(), vec![wrong, rest]].concat();
        assert_ne!(audit(chain(bodies), Options::default()).breaks, []);
    }
}

#[test]
fn a_cut_tail_shows_against_the_known_head() {
    let records = finished();
    let head = records.last().map(|record| record.hash);
    let cut = records[..6].to_vec();
    assert_eq!(audit(cut.clone(), Options::default()).verdict, Outcome::Ok);
    assert_eq!(
        audit(
            cut,
            Options {
                head,
                ..Options::default()
            }
        )
        .verdict,
        Outcome::Broken
    );
    assert_eq!(
        audit(
            [],
            Options {
                head,
                ..Options::default()
            }
        )
        .verdict,
        Outcome::Broken
    );
}

#[test]
fn data_that_differs_from_what_was_fed_is_found() {
    let mut other = |_: Range<u64>| Ok(Digest::ZERO);
    let options = Options {
        recompute: Some(&mut other),
        ..Options::default()
    };
    assert!(
        audit(finished(), options).breaks[0]
            .what
            .contains("not what the data holds")
    );
}

#[derive(Clone, Debug)]
enum Tamper {
    Flip { record: usize, bit: usize },
    Drop(usize),
    Duplicate(usize),
    Swap(usize),
}

fn tampers() -> impl Strategy<Value = Tamper> {
    prop_oneof![
        (0..10usize, 0..20_000usize).prop_map(|(record, bit)| Tamper::Flip { record, bit }),
        (0..10usize).prop_map(Tamper::Drop),
        (0..10usize).prop_map(Tamper::Duplicate),
        (0..9usize).prop_map(Tamper::Swap),
    ]
}

/// The stored form of a record with one bit turned; `None` when it cannot be read any more.
fn flipped(record: &Record, bit: usize) -> Option<Record> {
    let mut bytes = record.index.to_le_bytes().to_vec();
    bytes.extend(record.previous);
    bytes.extend(record.hash);
    bytes.extend(record.body.encode());
    let place = bit / 8 % bytes.len();
    bytes[place] ^= 1 << (bit % 8);
    Some(Record {
        index: u64::from_le_bytes(bytes[..8].try_into().ok()?),
        previous: bytes[8..40].try_into().ok()?,
        hash: bytes[40..72].try_into().ok()?,
        body: Body::decode(&bytes[72..])?,
    })
}

proptest! {
    #[test]
    fn any_tampering_is_found(tamper in tampers()) {
        let mut records = finished();
        let head = records.last().map(|record| record.hash);
        match tamper {
            Tamper::Flip { record, bit } => match flipped(&records[record], bit) {
                Some(changed) => records[record] = changed,
                None => return Ok(()),
            },
            Tamper::Drop(record) => { records.remove(record); }
            Tamper::Duplicate(record) => records.insert(record, records[record].clone()),
            Tamper::Swap(record) => records.swap(record, record + 1),
        }
        let wire: Vec<v1::LedgerRecord> = records.iter().map(Into::into).collect();
        let read = wire.into_iter().map(|record| Record::try_from(record).unwrap());
        prop_assert_eq!(audit(read, Options { head, ..Options::default() }).verdict, Outcome::Broken);
    }
}

#[test]
fn what_is_evaluated_stands_and_is_evaluated_once() {
    let right = [
        opening(),
        evaluated(1, 0),
        step(1, 1),
        evaluated(1, 1),
        void(1, 0),
        step(2, 1),
        evaluated(2, 1),
    ];
    let verdict = audit(chain(right), Options::default());
    assert_eq!(
        (verdict.breaks.as_slice(), verdict.evaluations),
        (&[][..], 2)
    );
    for (wrong, says) in [
        (vec![evaluated(1, 1)], "the last step is 0"),
        (vec![evaluated(1, 0), evaluated(1, 0)], "a second time"),
        (vec![step(2, 1), evaluated(1, 1)], "took its place"),
    ] {
        let found = breaks([opening()].into_iter().chain(wrong));
        assert!(found.len() == 1 && found[0].contains(says), "{found:?}");
    }
}
