//! Every mistake is shown at its place with a remedy.

use std::path::Path;
use std::time::{Duration, Instant};

use supra_recipes::{Recipe, RecipeError};

/// Line 1 is `name`, 2 `base`, 3 `data`, 4 `budget`; cases replace one of them or add from line 5 on.
const GOOD: [&str; 4] = [
    "name: t",
    "base: { path: b }",
    "data: { train: d }",
    "budget: { tokens: 20B }",
];

/// A mistake: the line it replaces or adds, where the error must point, and what it must say.
struct Case {
    line: usize,
    text: &'static str,
    at: (usize, usize),
    says: &'static [&'static str],
}

const fn case(
    line: usize,
    text: &'static str,
    at: (usize, usize),
    says: &'static [&'static str],
) -> Case {
    Case {
        line,
        text,
        at,
        says,
    }
}

const CASES: &[Case] = &[
    // Spelling.
    case(
        5,
        "optimzer: { lr: 1e-4 }",
        (5, 1),
        &["unknown key `optimzer`", "did you mean `optimizer`?"],
    ),
    case(
        5,
        "optimizer:\n  learning_rate: 1e-4",
        (6, 3),
        &["unknown key `learning_rate`", "lr, final_lr, warmup"],
    ),
    case(
        5,
        "optimizer: { final-lr: 1e-6 }",
        (5, 14),
        &["did you mean `final_lr`?"],
    ),
    case(
        5,
        "precision: fp32",
        (5, 1),
        &["unknown key `precision`", "belongs below `model`"],
    ),
    case(
        5,
        "attention: sofmax",
        (5, 12),
        &[
            "unknown value `sofmax` of `attention`",
            "did you mean `softmax`?",
        ],
    ),
    case(
        5,
        "model: { precision: fp16 }",
        (5, 21),
        &["unknown value `fp16` of `model.precision`", "bf16, fp32"],
    ),
    case(1, "name: My Run", (1, 7), &["`My Run` is not a run name"]),
    // Missing.
    case(
        1,
        "seed: 3",
        (1, 1),
        &["the key `name` is missing", "name: my-run"],
    ),
    case(
        4,
        "seed: 3",
        (1, 1),
        &["the key `budget` is missing", "pretraining_tokens: 2T"],
    ),
    case(
        2,
        "base: { weights: random }",
        (2, 7),
        &["`base`: it names no model", "random: mistral-7b"],
    ),
    case(
        2,
        "base: { path: b, random: mistral-7b }",
        (2, 7),
        &["`path` together with `random`"],
    ),
    case(
        2,
        "base:\n  random: mistral-7b\n  weights: random",
        (3, 3),
        &["`weights` says what is taken from `path`"],
    ),
    case(
        2,
        "base: { random: mistral-8b }",
        (2, 17),
        &[
            "unknown value `mistral-8b` of `base.random`",
            "did you mean `mistral-7b`?",
        ],
    ),
    case(4, "budget: {}", (4, 1), &["the budget names no tokens"]),
    case(4, "budget:", (4, 1), &["the budget names no tokens"]),
    // Types and units.
    case(
        4,
        "budget: { tokens: 2Q }",
        (4, 19),
        &["`2Q` is not a token count", "Ki, Mi, Gi, Ti"],
    ),
    case(
        4,
        "budget: { tokens: 1.5 }",
        (4, 19),
        &["not a whole number of tokens"],
    ),
    case(
        4,
        "budget: { tokens: 0.0001k }",
        (4, 19),
        &["not a whole number of tokens"],
    ),
    case(
        4,
        "budget: { tokens: 99999999T }",
        (4, 19),
        &["larger than 2^64 - 1"],
    ),
    case(
        4,
        "budget: { tokens: 99999999999999999999999 }",
        (4, 19),
        &["expected a token count"],
    ),
    case(
        4,
        "budget: { tokens: -3 }",
        (4, 19),
        &["cannot be negative"],
    ),
    case(
        4,
        "budget: { tokens: .inf }",
        (4, 19),
        &["not a whole number"],
    ),
    case(4, "budget: { tokens: 0 }", (4, 19), &["at least 1"]),
    case(
        4,
        "budget: { tokens: [1] }",
        (4, 19),
        &["expected a token count such as 2T"],
    ),
    case(4, "budget: 20B", (4, 9), &["`budget`", "20B"]),
    case(
        5,
        "optimizer: { lr: fast }",
        (5, 18),
        &["optimizer.lr", "\"fast\"", "expected a number above 0"],
    ),
    case(5, "optimizer: { lr: .nan }", (5, 18), &["out of range"]),
    case(
        5,
        "optimizer: { lr: -1e-4 }",
        (5, 18),
        &["out of range, expected a number above 0"],
    ),
    case(
        5,
        "optimizer: { betas: [0.9, 1.0] }",
        (5, 27),
        &["from 0 to below 1"],
    ),
    case(5, "optimizer: { betas: [0.9] }", (5, 21), &["length 2"]),
    case(
        5,
        "optimizer: { warmup: 1000 }",
        (5, 22),
        &["`1000 steps` or `1000 tokens`"],
    ),
    case(
        5,
        "optimizer: { warmup: soon }",
        (5, 22),
        &["`soon` is not a warm-up"],
    ),
    case(
        5,
        "batch: { micro_batch: 0 }",
        (5, 23),
        &["a whole number of at least 1"],
    ),
    case(
        5,
        "batch: { micro_batch: 2.5 }",
        (5, 23),
        &["a whole number of at least 1"],
    ),
    case(
        5,
        "batch: { sequence_length: 5000000000 }",
        (5, 27),
        &["too large"],
    ),
    case(
        5,
        "seed: -1",
        (5, 7),
        &["expected a whole number, 0 or above"],
    ),
    case(
        3,
        "data: { train: d, repeat: yes }",
        (3, 27),
        &["expected true or false"],
    ),
    case(
        3,
        "data: { train: ~/data }",
        (3, 16),
        &["`~` is not expanded"],
    ),
    case(3, "data: { train: '' }", (3, 16), &["the path is empty"]),
    case(
        5,
        "checkpoint: { to: s4://bucket/x }",
        (5, 19),
        &[
            "s4:// is not supported, did you mean s3://?",
            "gs://bucket/prefix",
        ],
    ),
    case(
        5,
        "checkpoint: { keep: 2, to: file://relative/x }",
        (5, 28),
        &["`file://relative/x`", "three slashes"],
    ),
    case(5, "checkpoint: { to: '' }", (5, 19), &["the path is empty"]),
    case(
        5,
        "checkpoint: { to: s3:///x }",
        (5, 19),
        &["write s3://bucket/prefix"],
    ),
    case(
        4,
        "budget: { pretraining_tokens: 2T, fraction: 5 }",
        (4, 45),
        &["above 0 and at most 1"],
    ),
    case(
        4,
        "budget: { pretraining_tokens: 2T, fraction: 0 }",
        (4, 45),
        &["above 0 and at most 1"],
    ),
    case(
        4,
        "budget: { pretraining_tokens: 2T, fraction: 5% }",
        (4, 45),
        &["above 0 and at most 1"],
    ),
    // Contradictions.
    case(
        5,
        "batch: { sequence_length: 2048, tokens: 1M }",
        (5, 33),
        &["1000000", "999424 and 1001472"],
    ),
    case(
        5,
        "batch:\n  sequence_length: 3000",
        (6, 3),
        &["is not a multiple", "2097000 and 2100000"],
    ),
    case(
        5,
        "batch: { tokens: 5 }",
        (5, 10),
        &["the nearest multiples are 2048"],
    ),
    case(
        4,
        "budget: { tokens: 20B, pretraining_tokens: 2T }",
        (4, 11),
        &["which is it?"],
    ),
    case(
        4,
        "budget: { tokens: 20B, fraction: 0.1 }",
        (4, 11),
        &["which is it?"],
    ),
    case(
        4,
        "budget: { tokens: 2047 }",
        (4, 1),
        &["smaller than one sample of 2048"],
    ),
    case(
        4,
        "budget: { tokens: 1B }",
        (4, 1),
        &["the warm-up of 1000 steps", "longer than the budget"],
    ),
    case(
        5,
        "optimizer: { warmup: 21B }",
        (5, 14),
        &["the warm-up of 21B tokens", "longer than the budget"],
    ),
    case(
        5,
        "optimizer: { final_lr: 1e-4 }",
        (5, 14),
        &["`final_lr` = 0.0001 is above `lr` = 0.00003"],
    ),
    case(
        5,
        "optimizer: { lr: 1e-6 }",
        (5, 14),
        &["is above `lr` = 0.000001"],
    ),
    case(
        5,
        "workers: { min: 4, max: 2 }",
        (5, 12),
        &["`workers.min` = 4 is above `workers.max` = 2"],
    ),
    case(
        5,
        "workers: { min: 2000, max: 3000 }",
        (5, 12),
        &["only 1024 samples"],
    ),
    case(
        5,
        "workers: { grace: 5 }",
        (5, 19),
        &["`5` is not a length of time", "`500 ms`"],
    ),
    case(
        5,
        "workers: { grace: -1 s }",
        (5, 19),
        &["`-1 s` is not a length of time"],
    ),
    case(
        5,
        "workers: { grace: 11 min }",
        (5, 12),
        &["`workers.grace` = 11 min is above 10 min", "stragglers"],
    ),
    case(
        5,
        "coordinator: { away: 120 }",
        (5, 22),
        &["`120` is not a length of time"],
    ),
    case(
        5,
        "coordinator: { away: 61 min }",
        (5, 16),
        &[
            "`coordinator.away` = 61 min is above 1 h",
            "workers that are gone",
        ],
    ),
    case(
        5,
        "checkpoint: { every_tokens: automatic }",
        (5, 29),
        &["`automatic` is not a token count", "or write `auto`"],
    ),
    case(
        5,
        "chaos: { kinds: [kill, stopp] }",
        (5, 24),
        &["unknown value `stopp`", "did you mean `stop`?"],
    ),
    case(
        5,
        "chaos: { kinds: [] }",
        (5, 10),
        &["`chaos.kinds` names no fault"],
    ),
    case(
        5,
        "chaos: { every: 200 ms }",
        (5, 10),
        &["`chaos.every` = 200 ms is below 1 s", "recover"],
    ),
    case(
        5,
        "eval: { every_tokens: 1B }",
        (5, 1),
        &["`data.heldout` names none", "--heldout 1000"],
    ),
    case(5, "eval: { windows: 0 }", (5, 18), &["`0` is out of range"]),
    case(
        5,
        "eval: { target_loss: -1 }",
        (5, 22),
        &["`-1` is out of range", "a number above 0"],
    ),
    case(
        5,
        "eval: { every_token: 1B }",
        (5, 9),
        &["did you mean `every_tokens`?"],
    ),
    case(
        5,
        "chaos: { fault: 3 }",
        (5, 10),
        &[
            "unknown key `fault` below `chaos`",
            "did you mean `faults`?",
        ],
    ),
    case(
        5,
        "workers: { max: 1 }\nchaos: { kinds: [reset] }",
        (6, 10),
        &["`workers.max` = 1"],
    ),
    case(
        5,
        "resume: { verify_steps: 1001 }",
        (5, 11),
        &["`resume.verify_steps` = 1001 is above 1000", "two steps"],
    ),
    case(
        5,
        "resume: { verify_step: 1 }",
        (5, 11),
        &["did you mean `verify_steps`?"],
    ),
    case(
        5,
        "attention: softmax\nmodel: { qk_norm: true }",
        (6, 10),
        &["no meaning with `attention: softmax`"],
    ),
    case(
        5,
        "model:\n  decay: none\nattention: softmax",
        (6, 3),
        &["remove `decay`"],
    ),
    // YAML itself.
    case(
        5,
        "optimizer:\n\tlr: 1e-4",
        (6, 1),
        &["a tab in the indentation"],
    ),
    case(
        5,
        "name: again",
        (5, 1),
        &["the key `name` stands here twice"],
    ),
    case(
        5,
        "optimizer: { lr: 1, lr: 2 }",
        (5, 21),
        &["the key `lr` stands here twice"],
    ),
    case(
        5,
        "seed: &a 3",
        (5, 7),
        &["anchors and aliases are not allowed"],
    ),
    case(
        5,
        "optimizer: { lr: *a }",
        (5, 18),
        &["anchors and aliases are not allowed"],
    ),
    case(5, "attention: !supra", (5, 12), &["tags are not allowed"]),
    case(5, "optimizer: { lr: 1", (6, 1), &["did not find expected"]),
    case(5, "<<: {}", (5, 1), &["unknown key `<<`"]),
    case(5, "---\nname: u", (5, 1), &["a second YAML document"]),
    case(5, "seed: \"3", (5, 7), &["never closed"]),
    case(5, "? [a]\n: 3", (5, 3), &["sequence, expected a key"]),
    case(
        5,
        "model: [[[[[[[[[[[[[[[[[1",
        (5, 24),
        &["brackets nested too deep"],
    ),
];

fn fail(text: &str) -> RecipeError {
    match Recipe::parse(text, "bad.yaml") {
        Err(error) => error,
        Ok(_) => panic!("accepted:\n{text}"),
    }
}

#[test]
fn every_mistake_is_shown_at_its_place_with_a_remedy() {
    let mut wrong = String::new();
    for case in CASES {
        let mut lines = GOOD.to_vec();
        match lines.get_mut(case.line - 1) {
            Some(line) => *line = case.text,
            None => lines.push(case.text),
        }
        let text = lines.join("\n") + "\n";
        let error = fail(&text);
        let report = error.to_string();
        let place = format!("bad.yaml:{}:{}", case.at.0, case.at.1);
        let unwrapped = report.replace("\n        ", " ").replace("\n  │ ", " ");
        let says = case
            .says
            .iter()
            .all(|part| unwrapped.contains(part) || error.message().contains(part));
        let located = (error.line(), error.column()) == (Some(case.at.0), Some(case.at.1))
            && report.contains(&place);
        if !says || !located || error.help().is_empty() {
            wrong += &format!("--- expected {place} {:?}\n{text}{report}\n", case.says);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn reports_look_like_this() {
    let misspelt =
        "name: t\nbase: { path: b }\noptimizer:\n  lr: 3e-4\n  wieght_decay: 0.1   # typo\n";
    insta::assert_snapshot!("misspelt_key", fail(misspelt).to_string());
    let indivisible = format!(
        "{}\nbatch: {{ tokens: 1M, sequence_length: 2048 }}\n",
        GOOD.join("\n")
    );
    insta::assert_snapshot!("indivisible_batch", fail(&indivisible).to_string());
    insta::assert_snapshot!("empty_file", fail("# nothing\n").to_string());
}

#[test]
fn anchors_that_explode_cost_nothing() {
    let mut text = String::from("a: &a [x, x, x, x, x, x, x, x, x]\n");
    for (this, last) in ('b'..='z').zip('a'..='y') {
        text += &format!(
            "{this}: &{this} [*{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}, *{last}]\n"
        );
    }
    assert_quick(&text, "anchors and aliases are not allowed");
}

#[test]
fn nesting_and_size_cannot_hang_the_parser() {
    for unit in ["[", "{a: ", "- ", "? ", "a: [", "'", "\"\\", "- - ? "] {
        assert_quick(&unit.repeat(60_000 / unit.len()), "");
    }
    assert_quick(&"a: b\n".repeat(20_000), "larger than");
    let keys: String = (0..5_000).map(|key| format!("k{key}: 1\n")).collect();
    assert_quick(&keys, "");
}

fn assert_quick(text: &str, says: &str) {
    let begun = Instant::now();
    let error = fail(text);
    assert!(error.message().contains(says), "{}", error.message());
    assert!(
        begun.elapsed() < Duration::from_secs(3),
        "{:?} for {:?}…",
        begun.elapsed(),
        &text[..8]
    );
}

fn load(bytes: &[u8]) -> RecipeError {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("r.yaml");
    std::fs::write(&path, bytes).unwrap();
    Recipe::load(&path).unwrap_err()
}

#[test]
fn files_that_are_no_recipes_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = Recipe::load(&directory.path().join("none.yaml"))
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("none.yaml") && missing.contains("No such file"),
        "{missing}"
    );
    let folder = Recipe::load(directory.path()).unwrap_err().to_string();
    assert!(
        folder.contains("directory") && folder.contains("name the YAML file"),
        "{folder}"
    );
    assert!(Recipe::load(Path::new("")).is_err());
    assert!(load(&vec![b'a'; 70_000]).message().contains("larger than"));
    assert!(load(b"").message().contains("empty"));
}

#[test]
fn wrong_encodings_are_named_with_their_place() {
    let mark = load(b"\xef\xbb\xbfname: t\n");
    assert!(mark.message().contains("byte order mark"), "{mark}");
    assert_eq!((mark.line(), mark.column()), (Some(1), Some(1)));
    let latin1 = load(b"name: t\nbase: { path: caf\xe9 }\n");
    assert!(latin1.message().contains("0xe9"), "{latin1}");
    assert_eq!((latin1.line(), latin1.column()), (Some(2), Some(18)));
    assert!(load(b"\xff\xfen\0a\0").message().contains("UTF-16"));
    assert!(load(b"name: t\0\n").line().is_some());
}

#[test]
fn columns_count_characters_and_crlf_is_a_line_end() {
    let error = fail("name: t\r\nbase: { path: 'é—é', wieghts: random }\r\n");
    assert_eq!(
        (error.line(), error.column()),
        (Some(2), Some(22)),
        "{error}"
    );
}
