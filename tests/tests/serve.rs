//! `supra-worker serve`, as its clients and those who run it see it.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::thread::{self, sleep};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use socket2::SockRef;
use supra_tests::campaigns::serve::abuse::{self, Abuse};
use supra_tests::http::{self, connect, get, post, request};
use supra_tests::models::{convert, quickstart};
use supra_tests::process::run;
use supra_tests::programs::repository;
use supra_tests::server::COMPLETIONS;
use supra_tests::{Failure, Programs, Result, Server};
use tempfile::TempDir;

use crate::LIMIT;

/// For a slot to come free, or a reader to be given up.
const SOON: Duration = Duration::from_secs(20);

/// Programs, a SUPRA model that nobody has trained, and a directory that goes away. Its text is gibberish of many scripts.
struct Stage {
    programs: Programs,
    model: PathBuf,
    directory: TempDir,
}

impl Stage {
    fn new() -> Result<Stage> {
        let programs = Programs::find()?;
        let directory = tempfile::tempdir()?;
        let model = directory.path().join("supra");
        convert(&programs, &quickstart("base"), &model)?;
        Ok(Stage {
            programs,
            model,
            directory,
        })
    }

    fn serve(&self, options: &[&str]) -> Result<Server> {
        Server::start(&self.programs, self.directory.path(), &self.model, options)
    }

    /// What the command line makes of a prompt, greedily.
    fn generate(&self, model: &Path, prompt: &str, tokens: u32) -> Result<String> {
        let mut command = self.programs.worker();
        command.args([
            "generate",
            "--json",
            "--temperature",
            "0",
            "--prompt",
            prompt,
        ]);
        command.args(["--max-tokens", &tokens.to_string()]);
        command.arg("--model").arg(model);
        let output = run(command, LIMIT)?.expect_code(0)?;
        let answer: Value = serde_json::from_str(&output.stdout)?;
        Ok(text(&answer["text"]))
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("not a string").to_owned()
}

/// A request whose answer takes long.
fn long(tokens: u32) -> Value {
    // Nothing ends it early.
    json!({ "prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 1.5, "seed": 1, "stream": true, "top_k": 1 })
}

#[test]
fn completions_are_those_of_the_command_line_in_whatever_form_they_are_asked_for() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.serve(&["--slots", "6", "--name", "m"])?;
    let prompts = [
        "The river",
        "In the beginning the people of the old town were",
        "  é",
    ];
    let greedy = json!({ "prompt": prompts, "max_tokens": 40, "temperature": 0 });
    let together = server.complete(&greedy)?;
    assert_eq!(together["object"], "text_completion");
    assert_eq!(together["model"], "m");
    for (at, prompt) in prompts.iter().enumerate() {
        let choice = &together["choices"][at];
        assert_eq!(choice["index"], at);
        assert_eq!(
            text(&choice["text"]),
            stage.generate(&stage.model, prompt, 40)?,
            "{prompt}"
        );
    }

    // Several draws: each seed gives the same whatever else is computed, whole or in pieces.
    let draws =
        json!({ "prompt": prompts[1], "n": 4, "max_tokens": 60, "seed": 7, "temperature": 1.3 });
    let whole = server.complete(&draws)?;
    let mut streamed = draws.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({ "include_usage": true });
    let crowd: Vec<_> = (0..4u32)
        .map(|seed| {
            let address = server.address;
            let noise = json!({ "prompt": "noise", "max_tokens": 50, "seed": seed });
            thread::spawn(move || post(address, COMPLETIONS, &noise).and_then(|answer| answer.ok()))
        })
        .collect();
    let mut pieces = vec![String::new(); 4];
    let mut ends = vec![Value::Null; 4];
    let events = server.stream(&streamed)?.rest()?;
    for piece in &events {
        assert_eq!(piece["id"], events[0]["id"]);
        for choice in piece["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().unwrap_or(99) as usize;
            pieces[index] += &text(&choice["text"]);
            assert!(ends[index].is_null(), "after the end");
            ends[index] = choice["finish_reason"].clone();
        }
    }
    for (at, piece) in pieces.iter().enumerate() {
        assert_eq!(*piece, text(&whole["choices"][at]["text"]), "choice {at}");
        assert_eq!(ends[at], whole["choices"][at]["finish_reason"]);
    }
    assert_ne!(pieces[0], pieces[1], "each draws for itself");
    assert_eq!(
        events.last().map(|last| &last["usage"]),
        Some(&whole["usage"])
    );
    for noise in crowd {
        noise.join().map_err(|_| Failure::new("a client broke"))??;
    }
    server.expect_idle(6, SOON)
}

#[test]
fn log_probabilities_stop_strings_and_token_ids_fit_the_text() -> Result<()> {
    let stage = Stage::new()?;
    // The trained softmax base: its text has words.
    let base = quickstart("base");
    let server = Server::start(
        &stage.programs,
        stage.directory.path(),
        &base,
        &["--slots", "3"],
    )?;
    assert_eq!(
        text(
            &server.complete(&json!({ "prompt": "The", "max_tokens": 24, "temperature": 0 }))?["choices"]
                [0]["text"]
        ),
        stage.generate(&base, "The", 24)?
    );

    let told = server.complete(&json!({ "prompt": "The old man", "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": true }))?;
    let choice = &told["choices"][0];
    let (whole, logprobs) = (text(&choice["text"]), &choice["logprobs"]);
    assert!(whole.starts_with("The old man"), "{whole}");
    let list = |name: &str| logprobs[name].as_array().cloned().unwrap_or_default();
    let (tokens, offsets) = (list("tokens"), list("text_offset"));
    let (own, top) = (list("token_logprobs"), list("top_logprobs"));
    assert_eq!(
        tokens.len() as u64,
        told["usage"]["total_tokens"].as_u64().unwrap_or(0)
    );
    assert!(
        own[0].is_null() && top[0].is_null(),
        "nothing precedes the first token"
    );
    for at in 1..tokens.len() {
        let offset = offsets[at].as_u64().unwrap_or(999) as usize;
        let token = text(&tokens[at]);
        assert!(
            whole[offset..].starts_with(&token),
            "{token:?} at {offset} of {whole:?}"
        );
        let candidates = top[at].as_object().cloned().unwrap_or_default();
        assert_eq!(candidates[&token], own[at]);
        assert!((3..=4).contains(&candidates.len()), "{candidates:?}");
        assert!(own[at].as_f64().is_some_and(|logprob| logprob <= 0.0));
    }
    // What evaluation harnesses send: the same numbers without a new token, and from ids.
    let ids = server.complete(&json!({ "prompt": "The old man", "max_tokens": 0, "logprobs": 1, "echo": true, "return_token_ids": true }))?;
    let scored = &ids["choices"][0];
    assert_eq!(text(&scored["text"]), "The old man");
    let prompt = scored["token_ids"].clone();
    let length = prompt.as_array().map_or(0, Vec::len);
    let close =
        |a: &Value, b: &Value| (a.as_f64().unwrap_or(0.0) - b.as_f64().unwrap_or(0.0)).abs() < 1e-4;
    let again = server.complete(&json!({ "prompt": [prompt, prompt], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true }))?;
    for at in 0..length {
        assert!(
            close(&own[at], &scored["logprobs"]["token_logprobs"][at]),
            "token {at}"
        );
        for choice in 0..2 {
            assert!(close(
                &own[at],
                &again["choices"][choice]["logprobs"]["token_logprobs"][at]
            ));
        }
    }
    assert_eq!(
        again["choices"][1]["text"],
        whole[..whole.len()]
            .get(..text(&again["choices"][1]["text"]).len())
            .unwrap_or("")
    );

    // A stop string is cut out, wherever tokens end, and ends the completion early.
    let free =
        server.complete(&json!({ "prompt": "The old man", "max_tokens": 12, "temperature": 0 }))?;
    let free = text(&free["choices"][0]["text"]);
    let middle = free
        .char_indices()
        .nth(free.chars().count() / 2)
        .map_or(0, |(at, _)| at);
    let stop: String = free[middle..].chars().take(3).collect();
    let stopped = json!({ "prompt": "The old man", "max_tokens": 12, "temperature": 0, "stop": ["never there", stop], "logprobs": 0 });
    let answer = server.complete(&stopped)?;
    let cut = text(&answer["choices"][0]["text"]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(Some(cut.len()), free.find(&stop));
    let offsets = answer["choices"][0]["logprobs"]["text_offset"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    assert!(
        offsets.iter().all(|offset| offset
            .as_u64()
            .is_some_and(|offset| offset < cut.chars().count() as u64)),
        "{offsets:?} in {cut:?}"
    );
    let mut streamed = stopped.clone();
    streamed["stream"] = true.into();
    let pieces = server.stream(&streamed)?.rest()?;
    let pieces: String = pieces
        .iter()
        .map(|piece| text(&piece["choices"][0]["text"]))
        .collect();
    assert_eq!(pieces, cut);
    server.expect_idle(3, SOON)
}

#[test]
fn what_is_wrong_is_told_by_field_with_a_remedy() -> Result<()> {
    let stage = Stage::new()?;
    let key = stage.directory.path().join("key");
    fs::write(&key, "a-key-of-some-length\n")?;
    let server = stage.serve(&[
        "--name",
        "m",
        "--max-prompt-tokens",
        "300",
        "--max-body",
        "20000",
        "--api-key-file",
        &key.to_string_lossy(),
    ])?;
    let send = |body: &str, more: &str| {
        let head = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}content-length: {}\r\n\r\n{body}",
            body.len()
        );
        http::raw(server.address, head.as_bytes())
    };
    let authorized = "authorization: Bearer a-key-of-some-length\r\n";
    let many: Vec<&str> = vec!["a"; 300];
    for (body, status, param, words) in [
        (
            json!({ "prompt": "a", "model": "other" }),
            404,
            json!("model"),
            "`m`",
        ),
        (json!({ "model": "m" }), 400, json!("prompt"), "missing"),
        (json!({ "prompt": [] }), 400, json!("prompt"), "empty"),
        (
            json!({ "prompt": "" }),
            400,
            json!("prompt"),
            "nothing to continue",
        ),
        (json!({ "prompt": ["a", 1] }), 400, json!("prompt"), "array"),
        (
            json!({ "prompt": { "a": 1 } }),
            400,
            json!("prompt"),
            "array",
        ),
        (
            json!({ "prompt": [1, 99999] }),
            400,
            json!("prompt"),
            "99999",
        ),
        (
            json!({ "prompt": [1, -1] }),
            400,
            json!("prompt"),
            "token ids",
        ),
        (
            json!({ "prompt": vec![5; 301] }),
            400,
            json!("prompt"),
            "--max-prompt-tokens",
        ),
        (
            json!({ "prompt": many }),
            400,
            json!("prompt"),
            "several requests",
        ),
        (
            json!({ "prompt": "a", "max_tokens": -1 }),
            400,
            json!("max_tokens"),
            "from 0 to 4096",
        ),
        (
            json!({ "prompt": "a", "max_tokens": "7" }),
            400,
            json!("max_tokens"),
            "whole number",
        ),
        (
            json!({ "prompt": "a", "temperature": "hot" }),
            400,
            json!("temperature"),
            "number",
        ),
        (
            json!({ "prompt": "a", "temperature": -1 }),
            400,
            json!("temperature"),
            "from 0",
        ),
        (
            json!({ "prompt": "a", "top_p": 2 }),
            400,
            json!("top_p"),
            "to 1",
        ),
        (json!({ "prompt": "a", "n": 0 }), 400, json!("n"), "from 1"),
        (
            json!({ "prompt": "a", "best_of": 3 }),
            400,
            json!("best_of"),
            "leave it out",
        ),
        (
            json!({ "prompt": "a", "suffix": "b" }),
            400,
            json!("suffix"),
            "leave it out",
        ),
        (
            json!({ "prompt": "a", "presence_penalty": 1 }),
            400,
            json!("presence_penalty"),
            "repetition_penalty",
        ),
        (
            json!({ "prompt": "a", "stop": ["1", "2", "3", "4", "5"] }),
            400,
            json!("stop"),
            "4",
        ),
        (
            json!({ "prompt": "a", "stop": "" }),
            400,
            json!("stop"),
            "empty",
        ),
        (
            json!({ "prompt": "a", "logprobs": 21 }),
            400,
            json!("logprobs"),
            "to 20",
        ),
        (
            json!({ "prompt": "a", "stream_options": {} }),
            400,
            json!("stream_options"),
            "`stream`",
        ),
        (
            json!({ "prompt": "a", "echo": "yes" }),
            400,
            json!("echo"),
            "true or false",
        ),
        (json!(["prompt"]), 400, Value::Null, "not a JSON object"),
    ] {
        let answer = send(&body.to_string(), authorized)?;
        let error = answer.json()?["error"].clone();
        assert_eq!(
            (answer.status, &error["param"]),
            (status, &param),
            "{body}: {error}"
        );
        assert!(text(&error["message"]).contains(words), "{body}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    // Null is as good as nothing, and what nobody knows is left alone.
    let odd = json!({ "prompt": "a", "max_tokens": 1, "stop": null, "n": null, "user": "u", "unknown": { "deep": [1] } });
    send(&odd.to_string(), authorized)?.ok()?;

    assert_eq!(send(r#"{"prompt": "a""#, authorized)?.status, 400);
    assert_eq!(send(r#"{"prompt": "a"}"#, "")?.status, 401);
    assert_eq!(
        send(r#"{"prompt": "a"}"#, "authorization: Bearer wrong\r\n")?.status,
        401
    );
    let form = format!("{authorized}content-type: application/x-www-form-urlencoded\r\n");
    assert_eq!(send(r#"{"prompt": "a"}"#, &form)?.status, 415);
    assert_eq!(
        send(
            &format!("{{\"prompt\": \"{}\"}}", "a".repeat(30_000)),
            authorized
        )?
        .status,
        413
    );
    for (path, status, code) in [
        ("/v1/nothing", 404, "not_found"),
        ("/v1/completions", 401, "invalid_api_key"),
        ("/v1/models", 401, "invalid_api_key"),
    ] {
        let answer = get(server.address, path)?;
        assert_eq!(
            (answer.status, &answer.json()?["error"]["code"]),
            (status, &json!(code)),
            "{path}"
        );
    }
    let head =
        format!("GET {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{authorized}\r\n");
    assert_eq!(http::raw(server.address, head.as_bytes())?.status, 405);
    assert_eq!(get(server.address, "/health")?.ok()?["status"], "ok");
    server.expect_idle(16, SOON)
}

#[test]
fn a_full_queue_says_so_and_whoever_leaves_frees_the_slot() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.serve(&[
        "--slots",
        "1",
        "--queue",
        "1",
        "--max-tokens-per-request",
        "1000000",
    ])?;
    let mut first = server.stream(&long(1_000_000))?;
    assert!(first.data()?.is_some());
    let (address, short) = (server.address, json!({ "prompt": "a", "max_tokens": 2 }));
    let waiting = {
        let short = short.clone();
        thread::spawn(move || post(address, COMPLETIONS, &short))
    };
    server.wait_metric("supra_completions_waiting", 1.0, SOON)?;
    let refused = post(address, COMPLETIONS, &short)?;
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.json()?["error"]["type"], "rate_limit_error");
    assert!(first.data()?.is_some(), "the one in the slot goes on");
    drop(first);
    let answer = waiting
        .join()
        .map_err(|_| Failure::new("a client broke"))??;
    assert_eq!(answer.status, 200, "{}", answer.body);
    server.expect_idle(1, SOON)?;
    assert_eq!(
        server.metric(r#"supra_requests_total{outcome="disconnected"}"#)?,
        1.0
    );
    assert_eq!(
        server.metric(r#"supra_requests_total{outcome="busy"}"#)?,
        1.0
    );
    Ok(())
}

#[test]
fn a_reader_that_stands_still_stops_nobody_and_is_given_up() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.serve(&[
        "--slots",
        "2",
        "--stall-timeout",
        "2",
        "--max-tokens-per-request",
        "1000000",
    ])?;
    let mut stream = connect(server.address)?;
    // Else the system reads ahead for it, megabytes.
    SockRef::from(&stream).set_recv_buffer_size(4096)?;
    let mut talkative = long(1_000_000);
    talkative["logprobs"] = 20.into();
    stream.write_all(&request(
        server.address,
        COMPLETIONS,
        &talkative.to_string(),
    ))?;
    let mut start = [0; 64];
    stream.read_exact(&mut start)?;
    server.complete(&json!({ "prompt": "a", "max_tokens": 8 }))?;
    server.expect_idle(2, Duration::from_secs(60))?;
    // The system's limit and the server's own are as long: either may come first.
    let outcome = |name| server.metric(&format!(r#"supra_requests_total{{outcome="{name}"}}"#));
    assert_eq!(outcome("stalled")? + outcome("disconnected")?, 1.0);
    // One that sends only a part is not waited for either.
    let mut half = connect(server.address)?;
    let whole = request(
        server.address,
        COMPLETIONS,
        &json!({ "prompt": "a" }).to_string(),
    );
    half.write_all(&whole[..whole.len() - 3])?;
    let mut answer = String::new();
    half.read_to_string(&mut answer)?;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    server.expect_idle(2, SOON)
}

#[test]
fn a_server_that_is_told_to_stop_ends_its_answers_first() -> Result<()> {
    let stage = Stage::new()?;
    let mut server = stage.serve(&["--slots", "2", "--grace", "60"])?;
    let mut under_way = server.stream(&long(1500))?;
    assert!(under_way.data()?.is_some());
    server.process.signal(Signal::SIGTERM)?;
    while get(server.address, "/health")?.status == 200 {
        sleep(Duration::from_millis(5));
    }
    let refused = post(server.address, COMPLETIONS, &json!({ "prompt": "a" }))?;
    assert_eq!(
        (refused.status, refused.header("retry-after")),
        (503, Some("1"))
    );
    let rest = under_way.rest()?;
    assert_eq!(
        rest.last()
            .map(|last| text(&last["choices"][0]["finish_reason"])),
        Some("length".to_owned())
    );
    assert_eq!(server.process.wait(LIMIT)?.code(), Some(0));

    // One that has no time cuts answers off, and says so.
    let mut server = stage.serve(&["--grace", "0", "--max-tokens-per-request", "1000000"])?;
    let mut cut = server.stream(&long(1_000_000))?;
    assert!(cut.data()?.is_some());
    server.process.signal(Signal::SIGTERM)?;
    let mut last = String::new();
    while let Some(data) = cut.data()? {
        last = data;
    }
    assert!(last.contains("shutting_down"), "{last}");
    assert_eq!(server.process.wait(LIMIT)?.code(), Some(0));
    Ok(())
}

#[test]
fn hundreds_of_malformed_requests_harm_nobody() -> Result<()> {
    let stage = Stage::new()?;
    let server = stage.serve(&[
        "--slots",
        "4",
        "--queue",
        "4",
        "--stall-timeout",
        "2",
        "--max-body",
        "65536",
    ])?;
    let abuse = Abuse {
        requests: 400,
        clients: 8,
        seed: 3,
    };
    let tally = abuse.run(&server)?;
    assert_eq!(tally.values().sum::<u64>(), 400, "{tally:?}");
    assert!(tally.keys().any(|outcome| outcome == "400"), "{tally:?}");
    server.expect_idle(4, SOON)?;
    abuse::expect_answers(&server)
}

#[test]
fn a_model_without_tokenizer_and_a_run_under_way_are_served() -> Result<()> {
    let stage = Stage::new()?;
    let run = stage.directory.path().join("checkpoints");
    let publish = |from: &str, name: &str| {
        let (from, to) = (
            repository().join("tests/checkpoints").join(from),
            run.join(name),
        );
        fs::create_dir_all(&to)?;
        // The manifest comes last, as when a run publishes.
        let mut names: Vec<_> = fs::read_dir(&from)?.collect::<std::result::Result<_, _>>()?;
        names.sort_by_key(|entry| entry.file_name() == "manifest.json");
        for entry in names {
            if !entry.file_name().to_string_lossy().starts_with("tokenizer") {
                fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
        }
        Ok::<_, Failure>(())
    };
    publish("format-1", "step-00000010-gen-1")?;
    fs::create_dir_all(run.join("step-00000030-gen-1"))?;
    let server = Server::start(
        &stage.programs,
        stage.directory.path(),
        &run,
        &["--follow", "--name", "run"],
    )?;
    let ids = json!({ "model": "run", "prompt": [3, 4, 5], "max_tokens": 3, "temperature": 0, "logprobs": 1 });
    let before = server.complete(&ids)?;
    assert_eq!(before["system_fingerprint"], "step-00000010-gen-1");
    assert_eq!(
        before["choices"][0]["token_ids"].as_array().map(Vec::len),
        Some(3)
    );
    assert!(text(&before["choices"][0]["logprobs"]["tokens"][0]).starts_with("token_id:"));
    let refused = post(server.address, COMPLETIONS, &json!({ "prompt": "text" }))?;
    assert!(
        refused.status == 400 && refused.body.contains("send token ids"),
        "{}",
        refused.body
    );

    publish("format-2", "step-00000020-gen-1")?;
    let deadline = std::time::Instant::now() + LIMIT;
    while server.complete(&ids)?["system_fingerprint"] != "step-00000020-gen-1" {
        assert!(
            std::time::Instant::now() < deadline,
            "{}",
            server.process.output()
        );
        sleep(Duration::from_millis(100));
    }
    server.expect_idle(16, SOON)
}
