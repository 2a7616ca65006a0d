//! `supra replay --state`: the batch of a step, rebuilt without a coordinator.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use serde_json::json;
use supra_coordinator::journal::Journal;
use supra_coordinator::ledger::{Body, Open, Step, Tail};
use supra_coordinator::machine::{Fact, Workers};
use supra_data::{Loader, Reader};
use supra_recipes::{Digest, Plan, Recipe};

use crate::support::{Output, run};

/// Text, its tokens in `data`, and a tokenizer in `base`.
fn dataset(root: &Path) {
    let words = |id: u32| format!("w{id}");
    let vocabulary: serde_json::Map<_, _> = (0..50).map(|id| (words(id), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 50, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    });
    let base = root.join("base");
    fs::create_dir(&base).expect("the fixture");
    fs::write(base.join("tokenizer.json"), tokenizer.to_string()).expect("the fixture");
    let config = json!({"eos_token": "</s>"}).to_string();
    fs::write(base.join("tokenizer_config.json"), config).expect("the fixture");

    let text = (0..40).map(|document| {
        let words: Vec<String> = (0..12)
            .map(|word| words((document * 7 + word) % 50))
            .collect();
        words.join(" ")
    });
    let column: ArrayRef = Arc::new(StringArray::from_iter_values(text));
    let rows = RecordBatch::try_from_iter([("content", column)]).expect("the fixture");
    fs::create_dir(root.join("text")).expect("the fixture");
    let file = File::create(root.join("text/a.parquet")).expect("the fixture");
    let mut writer = ArrowWriter::try_new(file, rows.schema(), None).expect("the fixture");
    writer.write(&rows).expect("the fixture");
    writer.close().expect("the fixture");
    let path = |name: &str| root.join(name).display().to_string();
    let (text, data, base) = (path("text"), path("data"), path("base"));
    run(&["data", "tokenize", &text, "-o", &data, "--tokenizer", &base]).expect_code(0);
}

/// A journal of a run whose second step was voided and trained again; `fed` is what its last attempt was fed, if not the
/// right thing.
fn journal(root: &Path, fed: Option<[u8; 32]>) {
    let recipe = format!(
        "name: small\nbase: {{ path: {0}/base }}\ndata: {{ train: {0}/data }}\nbudget: {{ tokens: 80 }}\n\
         batch: {{ tokens: 32, micro_batch: 1, sequence_length: 8 }}\noptimizer: {{ warmup: 1 steps }}\n",
        root.display()
    );
    let reader = Reader::open(&root.join("data"), 8).expect("the fixture");
    let (windows, manifest_hash) = (reader.windows(), reader.manifest().hash());
    let plan = Plan::new(
        &Recipe::parse(&recipe, "small").expect("the fixture"),
        windows,
        manifest_hash,
    )
    .expect("the fixture");
    let mut loader = Loader::new(reader, plan.clone());
    let mut digest = |step: u64| {
        let mut sum = Digest::ZERO;
        for number in plan.step_samples(step) {
            sum += Digest::of_sample(number, &loader.sample(number).expect("the fixture").tokens);
        }
        *sum.as_bytes()
    };
    let mut step = |generation: u64, step: u64, fed: Option<[u8; 32]>| {
        let samples = plan.step_samples(step);
        Body::Step(Step {
            generation,
            step,
            first_sample: samples.start,
            samples: samples.end - samples.start,
            digest: fed.unwrap_or_else(|| digest(step)),
            skipped: false,
        })
    };
    let bodies = [
        Body::Open(Open {
            run: "small-1".to_owned(),
            recipe_hash: *blake3::hash(recipe.as_bytes()).as_bytes(),
            manifest_hash,
            windows,
            sequence_length: 8,
            batch_samples: plan.batch_samples,
            samples: plan.samples,
            steps: plan.steps,
        }),
        step(1, 1, None),
        step(1, 2, None),
        Body::Void {
            generation: 1,
            after_step: 1,
            reason: "rank 1 (b) was lost".to_owned(),
        },
        step(2, 2, fed),
    ];
    let submitted = Fact::Submitted {
        run: 1,
        id: "small-1".to_owned(),
        name: "small".to_owned(),
        recipe,
        checkpoint_root: root.join("checkpoints"),
        keep: 3,
        keep_every: 0,
        strict: false,
        budget_tokens: 80,
        workers: Workers {
            min: 1,
            max: 1,
            grace: Duration::from_secs(1),
        },
        at: 1,
    };
    let mut tail = Tail::default();
    let records = bodies.map(|body| {
        let record = tail.next(body);
        tail.advance(&record);
        Fact::Recorded { run: 1, record }
    });
    let state = root.join("state");
    fs::create_dir(&state).expect("the fixture");
    let (journal, _) = Journal::open(&state).expect("a journal");
    journal
        .append([vec![submitted], records.to_vec()].concat())
        .expect("appended");
}

fn replay(root: &Path, step: &str, more: &[&str]) -> Output {
    let state = root.join("state").display().to_string();
    run(&[
        &["replay", "small", "--step", step, "--state", &state],
        more,
    ]
    .concat())
}

#[test]
fn the_batch_of_a_step_is_rebuilt_with_all_its_attempts() {
    let place = tempfile::tempdir().expect("the fixture");
    dataset(place.path());
    journal(place.path(), None);
    let answer = replay(place.path(), "2", &["--json", "--text", "1"]).expect_code(0);
    let batch: serde_json::Value = serde_json::from_str(&answer.stdout).expect("the fixture");
    assert_eq!(batch["verdict"], "same");
    assert_eq!(batch["attempts"][0]["voided"], "rank 1 (b) was lost");
    assert!(batch["attempts"][1]["voided"].is_null());
    assert_eq!(batch["attempts"][1]["digest"], batch["digest"]);
    let samples = batch["samples"].as_array().expect("the fixture");
    let numbers: Vec<_> = samples.iter().map(|sample| &sample["number"]).collect();
    assert_eq!(numbers, [4, 5, 6, 7]);
    assert_eq!(samples[0]["sources"][0]["row_group"], 0);
    let text = samples[0]["passages"][0]["text"]
        .as_str()
        .expect("the fixture");
    assert!(text.contains('w'), "{text}");
    assert!(samples[1]["passages"].is_null());

    let text = replay(place.path(), "2", &["--text", "2"])
        .expect_code(0)
        .stdout;
    for word in [
        "OK: ",
        "voided: rank 1 (b) was lost",
        "stands",
        "--- sample 5, position",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn a_step_that_was_fed_something_else_ends_with_four() {
    let place = tempfile::tempdir().expect("the fixture");
    dataset(place.path());
    journal(place.path(), Some([7; 32]));
    let answer = replay(place.path(), "2", &[]).expect_code(4);
    assert!(answer.stdout.starts_with("DIFFERENT"), "{}", answer.stdout);
    replay(place.path(), "1", &[]).expect_code(0);
}

#[test]
fn a_step_to_come_is_shown_and_one_outside_the_plan_is_bad_input() {
    let place = tempfile::tempdir().expect("the fixture");
    dataset(place.path());
    journal(place.path(), None);
    let text = replay(place.path(), "3", &[]).expect_code(0).stdout;
    assert!(text.contains("has not trained step 3"), "{text}");
    for step in ["0", "4"] {
        let answer = replay(place.path(), step, &[]).expect_code(2);
        assert!(answer.stderr.contains("steps 1 to 3"), "{}", answer.stderr);
    }
}

#[test]
fn a_step_is_run_again_only_where_there_is_a_checkpoint_and_something_to_compare_with() {
    let place = tempfile::tempdir().expect("the fixture");
    dataset(place.path());
    journal(place.path(), None);
    for (step, how, words) in [
        ("2", "--rerun", "no checkpoint before step 2"),
        ("2", "--rerun=1", "it has none yet"),
        ("2", "--rerun=/nowhere", "/nowhere/manifest.json"),
        ("3", "--rerun", "has not trained step 3"),
    ] {
        let answer = replay(place.path(), step, &[how]).expect_code(2);
        assert!(answer.stderr.contains(words), "{}", answer.stderr);
        assert_eq!(answer.stdout, "");
    }
    // Where to compute is a question of a rerun only.
    replay(place.path(), "2", &["--device", "cuda:0"]).expect_code(2);
}

#[test]
fn data_that_moved_is_named_and_other_data_is_refused() {
    let place = tempfile::tempdir().expect("the fixture");
    dataset(place.path());
    journal(place.path(), None);
    let moved = place.path().join("moved");
    fs::rename(place.path().join("data"), &moved).expect("the fixture");
    replay(place.path(), "1", &[]).expect_code(2);
    let moved_text = moved.display().to_string();
    replay(place.path(), "1", &["--data", &moved_text]).expect_code(0);
    let manifest = moved.join("dataset.json");
    let changed = fs::read_to_string(&manifest).expect("the fixture") + "\n";
    fs::write(&manifest, changed).expect("the fixture");
    let answer = replay(place.path(), "1", &["--data", &moved_text]).expect_code(2);
    assert!(
        answer.stderr.contains("is not the dataset"),
        "{}",
        answer.stderr
    );
}
