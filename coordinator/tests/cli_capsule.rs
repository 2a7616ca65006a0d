//! `supra capsule` and `supra diff`: what is known of runs, packed and compared.

use std::fs;
use std::path::Path;

use supra_coordinator::journal::Journal;
use supra_coordinator::ledger::{Body, Open, Step, Tail};
use supra_coordinator::machine::{Fact, RunNumber, Workers};
use supra_coordinator::telemetry::Telemetry;
use supra_proto::v1::{RunState, StepMetrics};
use supra_recipes::Recipe;

use crate::server_rig::{self, Worker, coordinator, submit, wait_for_state};
use crate::support::{Output, recipe, run, wait_until};

/// The facts of a run of three steps, the last two of a second generation of `world` workers.
fn facts(state: &Path, number: RunNumber, recipe: &Recipe, world: usize) -> Vec<Fact> {
    let id = format!("small-{number}");
    let recipe = recipe.clone().resolved(state).to_yaml();
    let open = Body::Open(Open {
        run: id.clone(),
        recipe_hash: *blake3::hash(recipe.as_bytes()).as_bytes(),
        manifest_hash: [2; 32],
        windows: 100,
        sequence_length: 8,
        batch_samples: 4,
        samples: 12,
        steps: 3,
    });
    let step = |generation: u64, step: u64| {
        Body::Step(Step {
            generation,
            step,
            first_sample: 4 * (step - 1),
            samples: 4,
            digest: [step as u8; 32],
            skipped: false,
        })
    };
    let formed = |generation: u64, world: usize| Fact::Formed {
        run: number,
        generation,
        members: (0..world).map(|rank| format!("w{rank}")).collect(),
        from_step: 0,
        circumstances: [0; 32],
    };
    let submitted = Fact::Submitted {
        run: number,
        id,
        name: "small".to_owned(),
        recipe,
        checkpoint_root: state.join("checkpoints"),
        keep: 3,
        keep_every: 0,
        strict: false,
        budget_tokens: 96,
        workers: Workers {
            min: 1,
            max: 4,
            grace: std::time::Duration::from_secs(1),
        },
        at: 1,
    };
    let mut tail = Tail::default();
    let mut recorded = |body| {
        let record = tail.next(body);
        tail.advance(&record);
        Fact::Recorded {
            run: number,
            record,
        }
    };
    vec![
        submitted,
        formed(1, 4),
        recorded(open),
        recorded(step(1, 1)),
        formed(2, world),
        recorded(step(2, 2)),
        recorded(step(2, 3)),
    ]
}

/// A state directory of two runs: from step 2 on the second has other workers, and comes to other losses.
fn state() -> tempfile::TempDir {
    let state = tempfile::tempdir().expect("a directory");
    let recipe = Recipe::load(&recipe(state.path())).expect("a valid recipe");
    let (journal, _) = Journal::open(state.path()).expect("a journal");
    let telemetry = Telemetry::open(state.path()).expect("telemetry");
    for (number, world, drift) in [(1, 4, 0.0), (2, 3, 0.25)] {
        journal
            .append(facts(state.path(), number, &recipe, world))
            .expect("appended");
        for step in 1..=3 {
            let metrics = StepMetrics {
                step,
                generation: 1 + u64::from(step > 1),
                loss: 2.0 + if step > 1 { drift } else { 0.0 },
                ..StepMetrics::default()
            };
            telemetry.measured(number, metrics);
        }
    }
    state
}

fn supra(state: &Path, arguments: &[&str]) -> Output {
    let state = state.to_str().expect("UTF-8");
    run(&[arguments, &["--state", state]].concat())
}

#[test]
fn a_capsule_is_packed_twice_alike_never_over_another_and_audited_anywhere() {
    let state = state();
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().expect("UTF-8").to_owned();
    let (one, two, folder) = (path("one.tar.zst"), path("two.tar.zst"), path("folder"));
    let told = supra(state.path(), &["capsule", "small-1", "--out", &one]).expect_code(0);
    for word in [
        "Run small-1 is packed",
        "without receipt.json: the run has not ended",
    ] {
        assert!(told.stdout.contains(word), "{}", told.stdout);
    }
    let json = supra(
        state.path(),
        &["capsule", "small-1", "--out", &two, "--json"],
    );
    let json: serde_json::Value = serde_json::from_str(&json.expect_code(0).stdout).unwrap();
    assert!(
        json["members"]["ledger.jsonl"]["bytes"].as_u64() > Some(100),
        "{json}"
    );
    assert!(json["missing"]["base.json"].is_string(), "{json}");
    assert_eq!(fs::read(&one).unwrap(), fs::read(&two).unwrap());
    let taken = supra(state.path(), &["capsule", "small-1", "--out", &one]).expect_code(2);
    assert!(
        taken.stderr.contains("nothing is overwritten"),
        "{}",
        taken.stderr
    );

    supra(state.path(), &["capsule", "small-1", "--out", &folder]).expect_code(0);
    for capsule in [&one, &folder] {
        let answer = run(&["audit", "--capsule", capsule]).expect_code(0);
        let verdict = "OK: run small-1 trained 96 of 96 tokens so far, every sample exactly once.";
        assert!(answer.stdout.starts_with(verdict), "{}", answer.stdout);
    }
    let ledger = place.path().join("folder/ledger.jsonl");
    let altered = fs::read_to_string(&ledger)
        .unwrap()
        .replace("\"samples\":4", "\"samples\":5");
    fs::write(&ledger, altered).unwrap();
    let answer = run(&["audit", "--capsule", &folder]).expect_code(4);
    assert!(
        answer
            .stderr
            .contains("ledger.jsonl is not what was packed"),
        "{}",
        answer.stderr
    );
}

#[test]
fn two_runs_differ_from_the_step_at_which_their_workers_do() {
    let state = state();
    let same = supra(state.path(), &["diff", "small-1", "small-1"]).expect_code(0);
    assert!(
        same.stdout.starts_with("The same bits in all 3 steps."),
        "{}",
        same.stdout
    );

    // A run that travels is compared as one that is here.
    let place = tempfile::tempdir().unwrap();
    let capsule = place.path().join("two.tar.zst");
    let capsule = capsule.to_str().expect("UTF-8");
    supra(state.path(), &["capsule", "small-2", "--out", capsule]).expect_code(0);
    let verdict = "The same bits up to step 1; then step 2 differs in loss: workers 4 (generation 2) in A, 3 (generation 2) in \
                   B since step 2.";
    for other in ["small-2", capsule] {
        let found = supra(state.path(), &["diff", "small-1", other]).expect_code(4);
        assert!(found.stdout.starts_with(verdict), "{}", found.stdout);
    }
    let json = supra(state.path(), &["diff", "small-1", capsule, "--json"]).expect_code(4);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(
        (
            &json["verdict"],
            &json["last_common_step"],
            &json["first"][0]
        ),
        (
            &"different".into(),
            &1.into(),
            &serde_json::json!({ "quantity": "loss", "step": 2, "a": "2", "b": "2.25" })
        )
    );
    assert_eq!(json["b"]["generations"][1]["world"], 3);
}

#[test]
fn what_is_neither_run_nor_capsule_is_bad_input() {
    let state = state();
    for (name, word) in [
        ("other", "no run other"),
        ("nowhere/x.tar.zst", "there is no capsule"),
    ] {
        let answer = supra(state.path(), &["diff", "small-1", name]).expect_code(2);
        assert!(answer.stderr.contains(word), "{}", answer.stderr);
    }
    let half = state.path().join("half.tar.zst");
    fs::write(&half, "half").unwrap();
    let half = half.to_str().expect("UTF-8");
    let answer = supra(state.path(), &["diff", "small-1", half]).expect_code(4);
    for word in ["half.tar.zst", "no capsule", "pack the run again"] {
        assert!(answer.stderr.contains(word), "{}", answer.stderr);
    }
}

#[tokio::test]
async fn a_coordinator_packs_what_its_state_directory_holds() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, mut client) = coordinator(state.path()).await;
    let text = server_rig::recipe(1, 1);
    let id = submit(&mut client, text.clone()).await;
    let _worker = Worker::start(&url, "a");
    wait_for_state(&mut client, RunState::Finished).await;
    let checkpoints = state.path().join("runs").join(&id).join("checkpoints");
    let place = state.path().to_owned();
    let finished = tokio::task::spawn_blocking(move || {
        wait_until("the receipt", || checkpoints.join("receipt.json").exists());
        let path = |name: &str| place.join(name).to_str().expect("UTF-8").to_owned();
        let (live, offline) = (path("live"), path("offline"));
        run(&["capsule", "--out", &live, "--coordinator", &url]).expect_code(0);
        supra(&place, &["capsule", "--out", &offline]).expect_code(0);
        let read = |folder: &str, name: &str| fs::read_to_string(Path::new(folder).join(name));
        assert_eq!(
            read(&live, "index.json").unwrap(),
            read(&offline, "index.json").unwrap()
        );
        assert_eq!(read(&live, "submitted.yaml").unwrap(), text);
        assert!(
            read(&live, "receipt.json")
                .unwrap()
                .contains("\"finished\"")
        );
        assert_eq!(read(&live, "metrics.csv").unwrap().lines().count(), 12);
        run(&["diff", &live, &id, "--coordinator", &url]).expect_code(0);
        let audit = run(&["audit", "--capsule", &live]).expect_code(0);
        assert!(
            audit.stdout.contains("trained all 830 tokens"),
            "{}",
            audit.stdout
        );
    });
    finished.await.expect("does not panic");
}
