//! `supra-worker eval` as a process: every form gives the same numbers, bad files are told by their line, results become tables.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::cli::worker;
use crate::fixture::{Generation, World};

fn repository(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.join(path).display().to_string()
}

fn eval(arguments: &[&str]) -> Value {
    let all = [&["eval", "--json"][..], arguments].concat();
    let (code, out, err) = worker(&all);
    assert_eq!(code, 0, "{arguments:?}: {err}");
    serde_json::from_str(&out).unwrap()
}

/// A SUPRA model of one step, and text that was held out.
fn trained(world: &World) -> (PathBuf, PathBuf) {
    let recipe = world.recipe("");
    let root = world.checkpoints("a");
    let ranks = Generation::new(&recipe, &root).run(1);
    let checkpoint = root.join(&ranks[0].checkpoints[0].path);
    (checkpoint, world.data().join("heldout.json"))
}

#[test]
fn every_form_has_the_same_loss_at_every_position() {
    let world = World::new(200);
    let (model, data) = trained(&world);
    let (model, data) = (model.display().to_string(), data.display().to_string());
    let of = |more: &[&str]| {
        let first = [
            "--model",
            &model,
            "--data",
            &data,
            "--sequence-length",
            "16",
            "--batch",
            "3",
        ];
        eval(&[&first[..], more].concat())
    };
    for more in [&[][..], &["--ignore-documents"]] {
        let answers = ["chunkwise", "parallel", "recurrent"]
            .map(|form| of(&[more, &["--form", form]].concat()));
        let number = |value: &Value| value.as_f64().unwrap();
        for answer in &answers[1..] {
            assert_eq!(answer["targets"], answers[0]["targets"]);
            let positions = |answer: &Value| answer["positions"].as_array().unwrap().clone();
            let close = |key: &str, a: &Value, b: &Value| {
                assert!(
                    (number(&a[key]) - number(&b[key])).abs() < 1e-4,
                    "{key}: {a} for {b}"
                );
            };
            close("loss", answer, &answers[0]);
            close("loss_stderr", answer, &answers[0]);
            for (a, b) in positions(answer).iter().zip(&positions(&answers[0])) {
                assert_eq!((&a["first"], &a["targets"]), (&b["first"], &b["targets"]));
                close("loss", a, b);
            }
        }
        let bins = answers[0]["positions"].as_array().unwrap();
        let firsts: Vec<u64> = bins
            .iter()
            .map(|bin| bin["first"].as_u64().unwrap())
            .collect();
        assert_eq!(firsts, [1, 2, 4, 8, 16]);
        let targets: u64 = bins
            .iter()
            .map(|bin| bin["targets"].as_u64().unwrap())
            .sum();
        assert_eq!(answers[0]["targets"], targets);
        // A vocabulary of words does not say how many bytes stand between them.
        assert!(answers[0].get("bits_per_byte").is_none());
    }
}

#[test]
fn every_form_has_the_same_answers_to_tasks() {
    let dir = tempfile::tempdir().unwrap();
    let base = repository("recipes/quickstart/base");
    let converted = dir.path().join("converted").display().to_string();
    let (code, _, err) = worker(&["convert", "--base", &base, "--out", &converted]);
    assert_eq!(code, 0, "{err}");
    let mmlu = format!("mmlu={}", repository("tests/evals/mmlu.jsonl"));
    let (shots, items) = (
        repository("tests/evals/mmlu_dev.jsonl"),
        dir.path().join("items.jsonl"),
    );
    let items = items.display().to_string();
    for model in [&base, &converted] {
        let logprobs: Vec<Vec<Vec<f64>>> = ["chunkwise", "parallel", "recurrent"]
            .iter()
            .map(|form| {
                let answer = eval(&[
                    "--model",
                    model,
                    "--task",
                    &mmlu,
                    "--shots",
                    "2",
                    "--shots-from",
                    &shots,
                    "--context",
                    "250",
                    "--form",
                    form,
                    "--items",
                    &items,
                    "--batch",
                    "7",
                ]);
                let task = &answer["tasks"][0];
                assert_eq!(
                    (&task["task"], &task["shots"], &task["items"]),
                    (&"mmlu".into(), &2.into(), &8.into())
                );
                assert!(task["metrics"]["acc"]["stderr"].as_f64().unwrap() > 0.0);
                assert_eq!(task["subjects"].as_object().unwrap().len(), 2);
                let lines = fs::read_to_string(&items).unwrap();
                let lines = lines
                    .lines()
                    .map(|line| serde_json::from_str::<Value>(line).unwrap());
                lines
                    .map(|line| serde_json::from_value(line["logprobs"].clone()).unwrap())
                    .collect()
            })
            .collect();
        for other in &logprobs[1..] {
            assert_eq!(other.len(), 8);
            for (a, b) in other.iter().flatten().zip(logprobs[0].iter().flatten()) {
                assert!((a - b).abs() < 1e-3, "{a} for {b}");
            }
        }
    }
}

#[test]
fn answers_are_written_and_compared() {
    let base = repository("recipes/quickstart/base");
    let task = format!("qasper={}", repository("tests/evals/qasper.jsonl"));
    let answer = eval(&[
        "--model",
        &base,
        "--task",
        &task,
        "--context",
        "64",
        "--answer-tokens",
        "8",
    ]);
    let task = &answer["tasks"][0];
    // Two right answers to one question are one item.
    assert_eq!(
        (&task["items"], &task["format"]),
        (&3.into(), &"qasper".into())
    );
    assert!((0.0..=1.0).contains(&task["metrics"]["f1"]["value"].as_f64().unwrap()));
    assert!(task["cut"].as_u64().unwrap() > 0, "{task}");
}

#[test]
fn a_bad_task_is_told_by_its_line_before_the_model_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let good = r#"{"query": "a", "choices": ["b", "c"], "gold": 1}"#;
    let cut = file("cut", &format!("{good}\n\n{{\"query\": "));
    let far = file("far", &format!("{good}\n{}", good.replace('1', "2")));
    let other = file("other", "{\"prompt\": \"a\", \"target\": \"b\"}");
    let empty = file("empty", "\n");
    let bytes = dir.path().join("bytes");
    fs::write(&bytes, b"{\"query\": \"\xff\"}").unwrap();
    let bytes = bytes.display().to_string();
    let piqa = repository("tests/evals/piqa.jsonl");
    let cases: &[(&[&str], &[&str])] = &[
        (&[&cut], &["cut:3:", "column"]),
        (&[&far], &["far:2:", "`gold`", "from 0 to 1", "it is 2"]),
        (
            &[&other],
            &[
                "other:1:",
                "prompt, target",
                "choice (query, choices, gold)",
                "--format",
            ],
        ),
        (&[&empty], &["empty", "no item"]),
        (&[&bytes], &["bytes:1:"]),
        (
            &[&piqa, "--format", "arc"],
            &["piqa.jsonl:1:", "`choices` is missing"],
        ),
        (&[&piqa, "--format", "exam"], &["hellaswag, piqa"]),
        (&[&piqa, "--shots", "2"], &["--shots-from"]),
        (&["/nowhere"], &["/nowhere"]),
    ];
    for (arguments, words) in cases {
        let all = [&["eval", "--model", "/no-model", "--task"][..], *arguments].concat();
        let (code, out, err) = worker(&all);
        assert_eq!(code, 2, "{arguments:?}: {err}");
        for word in *words {
            assert!(err.contains(word), "{arguments:?}: no {word} in {err}");
        }
        assert!(
            out.is_empty() && !err.contains("panicked") && !err.contains("/no-model"),
            "{arguments:?}: {err}"
        );
    }
    let base = repository("recipes/quickstart/base");
    let (code, _, err) = worker(&[
        "eval",
        "--model",
        &base,
        "--task",
        &piqa,
        "--shots",
        "7",
        "--shots-from",
        &piqa,
    ]);
    assert!(
        code == 2 && err.contains("6 examples, 7 are asked for"),
        "{err}"
    );
}

#[test]
fn results_become_rows_beside_the_published_ones() {
    let dir = tempfile::tempdir().unwrap();
    let base = repository("recipes/quickstart/base");
    let mut files = Vec::new();
    for task in ["piqa", "winogrande", "cloze"] {
        let (file, task) = (
            dir.path().join(task),
            repository(&format!("tests/evals/{task}.jsonl")),
        );
        let answer = eval(&["--model", &base, "--name", "ours", "--task", &task]);
        fs::write(&file, answer.to_string()).unwrap();
        files.push(file.display().to_string());
    }
    let arguments: Vec<&str> = ["eval", "--report"]
        .into_iter()
        .chain(files.iter().map(String::as_str))
        .collect();
    let (code, out, err) = worker(&arguments);
    assert_eq!(code, 0, "{err}");
    let row = |beginning: &str| {
        out.lines()
            .find(|line| line.starts_with(beginning))
            .unwrap_or_else(|| panic!("{out}"))
    };
    assert_eq!(
        row("| Mistral-SUPRA | 7B | +100B"),
        "| Mistral-SUPRA | 7B | +100B | 77.1 | 80.4 | 70.3 | 75.9 | 45.8 | 34.2 | 64.0 |"
    );
    assert_eq!(
        row("| RetNet |"),
        "| RetNet | 6.7B | 200B | 60.7 | 75.4 | 58.1 | – | – | – | – |"
    );
    assert!(
        row("| Mistral-7B |")
            .ends_with("| 21.53 | 25.50 | 33.61 | 6.88 | 24.94 | 26.90 | 25.93 | 0.63 |")
    );
    // One row of two files, with errors, and a table for what the paper has not.
    let ours = row("| **ours** | 1.3M");
    assert_eq!(ours.matches(" ± ").count(), 2, "{ours}");
    assert!(row("| **ours** | cloze | 0 | 12 |").contains("perplexity"));

    fs::write(&files[0], "{}").unwrap();
    let (code, _, err) = worker(&["eval", "--report", &files[0]]);
    assert!(
        code == 2 && err.contains(&files[0]) && err.contains("--json"),
        "{err}"
    );
}
