//! Clients that come, stand still and leave, checkpoints that follow, and the end.

use std::fs;
use std::io::{Read, Write};
use std::thread::{self, sleep};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use socket2::SockRef;
use supra_tests::campaigns::serve::abuse::{self, Abuse};
use supra_tests::http::{connect, get, post, request};
use supra_tests::programs::repository;
use supra_tests::server::COMPLETIONS;
use supra_tests::{Failure, Result, Server};

use crate::LIMIT;

use super::{SOON, Stage, long, text};

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
    let mut under_way = server.stream(&long(600))?;
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
