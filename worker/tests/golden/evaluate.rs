//! Scores are the golden models' own, in every form; prompts, tokens and figures are lm-evaluation-harness's.

use std::{fs, path::Path};

use serde_json::Value;
use supra_worker::inference::{
    load::LoadedModel,
    scorer::{ScoreForm, Scored, Scorer, sharing::Request},
    tasks::{self, Format, Shots, Task, TaskFile, TaskOptions, judge},
};
use tch::{Device, Kind, Tensor};

use super::fixture::{Family, Fixture};

const FORMS: [ScoreForm; 3] = [
    ScoreForm::Chunkwise,
    ScoreForm::Parallel,
    ScoreForm::Recurrent,
];

fn request(ids: &[u32], context: usize, all: usize) -> Request {
    Request {
        context: ids[..context].into(),
        continuation: ids[context..all].to_vec(),
    }
}

/// What the fixture's logits say of a request that is the beginning of its first row.
fn expected(logprobs_tv: &Tensor, request: &Request) -> Scored {
    let mut scored = Scored {
        logprob: 0.0,
        greedy: true,
    };
    for (at, &token) in (request.context.len() as i64 - 1..).zip(&request.continuation) {
        let row_v = logprobs_tv.get(at);
        scored.logprob += row_v.double_value(&[i64::from(token)]);
        scored.greedy &= row_v.argmax(0, false).int64_value(&[]) == i64::from(token);
    }
    scored
}

#[test]
fn golden_scores_in_every_form() {
    tch::set_num_threads(1);
    let mut seen = 0;
    for fixture in Fixture::all() {
        if fixture.family == Family::Convert || fixture.starts().is_some() {
            continue;
        }
        seen += 1;
        let ids = Vec::<i64>::try_from(fixture.get("input_ids").get(0)).unwrap();
        let mut ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
        let logprobs_tv = fixture.get("logits").get(0).log_softmax(-1, Kind::Double);
        // So that something is greedy too.
        let end = ids.len() - 1;
        ids[end] = logprobs_tv
            .get(end as i64 - 1)
            .argmax(0, false)
            .int64_value(&[]) as u32;
        let requests: Vec<Request> = [
            (5, 9),
            (5, 6),
            (1, 4),
            (end, end + 1),
            (end - 3, end),
            (5, 7),
        ]
        .map(|(context, all)| request(&ids, context, all))
        .to_vec();
        for form in FORMS {
            let model = LoadedModel::open(&fixture.dir, Device::Cpu, Kind::Double).unwrap();
            // Few slots, so that there are several batches.
            let mut scorer = Scorer::new(model, form, 3).unwrap();
            let found = scorer.requests(&requests, |_, _| {}).unwrap();
            for (request, found) in requests.iter().zip(&found) {
                let expected = expected(&logprobs_tv, request);
                let what = format!("{}, {form:?}: {found:?} for {expected:?}", fixture.name());
                assert!((found.logprob - expected.logprob).abs() < 1e-4, "{what}");
                assert_eq!(found.greedy, expected.greedy, "{what}");
            }
            assert!(found[3].greedy);
            assert_eq!(
                scorer.engine().free(),
                scorer.engine().slots(),
                "{form:?} gives slots back"
            );
        }
    }
    assert!(seen >= 4, "{seen} fixtures");
}

fn evals(file: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/evals")
        .join(file)
}

fn read(name: &str, file: &str) -> Task {
    let file = TaskFile {
        name: name.to_owned(),
        path: evals(file),
    };
    Task::read(&file, None).unwrap()
}

/// The task of a name in harness.json; subjects of MMLU are tasks of their own there.
fn task(name: &str) -> Task {
    let file = format!("{name}.jsonl");
    if evals(&file).exists() {
        return read(name, &file);
    }
    let mut task = read("mmlu", "mmlu.jsonl");
    task.items
        .retain(|item| item.subject.as_deref() == Some(name));
    task
}

#[test]
fn golden_harness_prompts_and_figures() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/harness.json");
    let golden: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes/quickstart/base");
    let model = LoadedModel::open(&base, Device::Cpu, Kind::Float).unwrap();
    let tokenizer = tasks::tokenizer(&model).unwrap();
    for (name, golden) in golden.as_object().unwrap() {
        let task = task(name);
        let count = golden["shots"].as_u64().unwrap() as usize;
        let options = TaskOptions {
            limit: None,
            shots: (count > 0).then(|| Shots {
                count,
                from: read("mmlu", "mmlu_dev.jsonl"),
            }),
            delimiter: Format::DELIMITER.to_owned(),
            context: Some(2048),
            answer_tokens: 1,
        };
        let prepared = tasks::prepare(&model, &tokenizer, &task, &options).unwrap();
        let mut requests = prepared.requests.iter();
        let items = golden["items"].as_array().unwrap();
        assert_eq!(items.len(), task.items.len(), "{name}");
        let mut judged = Vec::new();
        for (item, golden) in task.items.iter().zip(items) {
            let mut scored = Vec::new();
            for pair in golden.as_array().unwrap() {
                let request = requests.next().unwrap();
                let tokens = |at: usize| {
                    serde_json::from_value::<Vec<u32>>(pair["tokens"][at].clone()).unwrap()
                };
                assert_eq!(*request.context, *tokens(0), "{name}, context of {pair}");
                assert_eq!(
                    request.continuation,
                    tokens(1),
                    "{name}, continuation of {pair}"
                );
                scored.push(Scored {
                    logprob: pair["logprob"].as_f64().unwrap(),
                    greedy: pair["greedy"].as_bool().unwrap(),
                });
            }
            judged.push(judge::judge(item, &scored, None, false));
        }
        assert!(requests.next().is_none());
        let found = judge::metrics(&judged);
        for (metric, figures) in golden["metrics"].as_object().unwrap() {
            let close = |found: f64, golden: &Value| {
                let golden = golden.as_f64().unwrap();
                assert!(
                    (found / golden - 1.0).abs() < 1e-12,
                    "{name}, {metric}: {found} for {golden}"
                );
            };
            close(found[metric].value, &figures[0]);
            if !figures[1].is_null() {
                close(found[metric].stderr.unwrap(), &figures[1]);
            }
        }
    }
}
