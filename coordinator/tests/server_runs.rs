//! A real server with real streams: runs from submission to their end, through faults.

use std::path::Path;
use std::time::Duration;

use supra_coordinator::audit::{Options as AuditOptions, Verdict, audit};
use supra_coordinator::ledger::Record;
use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{self, RunState};
use supra_proto::{Client, ClientError};

use crate::server_rig::{
    Session, Worker, coordinator, hello, recipe, submit, wait_for, wait_for_state,
};

async fn verdict(client: &mut Client) -> Verdict {
    let head = client.status("").await.expect("is served").ledger_head;
    let records = client
        .ledger("")
        .await
        .expect("is served")
        .all()
        .await
        .expect("is served");
    let records = records
        .into_iter()
        .map(|record| Record::try_from(record).expect("is served"));
    audit(
        records,
        AuditOptions {
            head: head.try_into().ok(),
            ..AuditOptions::default()
        },
    )
}

/// All parts of the time, seconds.
fn seconds(parts: &v1::Goodput) -> f64 {
    let v1::Goodput {
        productive,
        data,
        exposed_comm,
        checkpoint,
        restore,
        lost,
        forming,
        idle,
        evaluation,
    } = *parts;
    let working = productive + data + exposed_comm + checkpoint + evaluation;
    working + restore + lost + forming + idle
}

/// The receipt of a run that has ended, after its coordinator has.
fn receipt(state: &Path, run: &str) -> serde_json::Value {
    let path = state
        .join("runs")
        .join(run)
        .join("checkpoints/receipt.json");
    serde_json::from_slice(&std::fs::read(path).expect("a receipt")).expect("JSON")
}

#[tokio::test]
async fn the_stream_of_a_worker_that_attached_again_ends() {
    let state = tempfile::tempdir().unwrap();
    let (service, url, _client) = coordinator(state.path()).await;
    let same = hello("a");
    let mut before = Session::open(&url, same.clone()).await.unwrap();
    assert!(matches!(before.hear().await, Ok(Down::Welcome(_))));
    let mut again = Session::open(&url, same).await.unwrap();
    assert!(matches!(again.hear().await, Ok(Down::Welcome(_))));
    let heard = tokio::time::timeout(Duration::from_secs(5), before.hear()).await;
    assert_eq!(
        heard.map(Result::err),
        Ok(Some("the stream has ended".to_owned()))
    );
    service.stopper().shut_down("a test").await;
    service.wait().await.unwrap();
}

#[tokio::test]
async fn two_workers_train_a_run_to_its_last_sample() {
    let state = tempfile::tempdir().unwrap();
    let (service, url, mut client) = coordinator(state.path()).await;
    let run = submit(&mut client, recipe(2, 2)).await;
    assert!(run.starts_with("server-"), "{run}");
    let waiting = client.status(&run).await.unwrap();
    assert_eq!(
        (waiting.state(), waiting.reason.as_str()),
        (RunState::Forming, "waiting for 2 workers: 0 attached")
    );
    let mut watch = client.watch("").await.unwrap();
    let _workers = [Worker::start(&url, "a"), Worker::start(&url, "b")];
    let mut seen = Vec::new();
    while let Some(status) = watch.next().await.unwrap() {
        seen.push(status.state());
    }
    assert_eq!(seen.last(), Some(&RunState::Finished));
    assert!(seen.contains(&RunState::Training), "{seen:?}");

    let status = client.status("server").await.unwrap();
    assert_eq!(
        (
            status.step,
            status.steps,
            status.tokens,
            status.budget_tokens
        ),
        (11, 11, 830, 830)
    );
    assert_eq!(status.loss, 2.0);
    let verdict = verdict(&mut client).await;
    assert_eq!(verdict.breaks, []);
    assert!(verdict.finished && verdict.tokens == 830);

    let checkpoints = client.checkpoints("").await.unwrap();
    assert_eq!(
        checkpoints
            .iter()
            .map(|known| known.step)
            .collect::<Vec<_>>(),
        [3, 6, 9, 11],
        "two are to be kept, but none was seen to be whole"
    );
    assert!(
        checkpoints[3]
            .path
            .contains(&format!("runs/{run}/checkpoints/step-00000011")),
        "{checkpoints:?}"
    );
    assert_eq!(
        client.metrics("").await.unwrap().all().await.unwrap().len(),
        11
    );
    let lines = client.logs("", false).await.unwrap().all().await.unwrap();
    assert!(
        lines.iter().any(|line| line.text.contains("has finished")),
        "{lines:?}"
    );

    let parts = status.goodput.expect("an account");
    assert!(parts.productive > 0.0 && parts.lost == 0.0, "{parts:?}");
    let whole = (status.ended_unix_ms - status.submitted_unix_ms) as f64 / 1e3;
    assert!((seconds(&parts) - whole).abs() < 0.1, "{whole}: {parts:?}");
    service.stopper().shut_down("a test").await;
    service.wait().await.unwrap();
    let receipt = receipt(state.path(), &run);
    assert_eq!(
        (&receipt["outcome"], &receipt["tokens"], &receipt["step"]),
        (&"finished".into(), &830.into(), &11.into())
    );
    assert_eq!(receipt["goodput"]["productive"], parts.productive);
    assert_eq!(
        receipt["ledger_head"],
        supra_coordinator::ledger::hex(&status.ledger_head)
    );
}

#[tokio::test]
async fn a_killed_worker_costs_no_sample_and_repeats_none() {
    let state = tempfile::tempdir().unwrap();
    let (service, url, mut client) = coordinator(state.path()).await;
    let run = submit(&mut client, recipe(1, 2)).await;
    let a = Worker::start(&url, "a");
    let b = Worker::start(&url, "b");
    wait_for(&mut client, "step 5", |status| status.step >= 5).await;
    drop(b);
    let forming = wait_for(&mut client, "generation 2", |status| status.generation == 2).await;
    assert!(forming.step <= 5);
    let _b = Worker::start(&url, "b");
    wait_for_state(&mut client, RunState::Finished).await;
    let verdict = verdict(&mut client).await;
    assert_eq!(verdict.breaks, []);
    assert!(verdict.finished && verdict.generations >= 2);
    drop(a);
    service.stopper().shut_down("a test").await;
    service.wait().await.unwrap();
    let receipt = receipt(state.path(), &run);
    let incident = &receipt["incidents"][0];
    assert!(
        incident["cause"].as_str().unwrap().contains("(b)")
            && incident["training_unix_ms"].is_u64(),
        "{receipt}"
    );
}

#[tokio::test]
async fn cancel_and_resume_go_on_from_the_checkpoint() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, mut client) = coordinator(state.path()).await;
    submit(&mut client, recipe(1, 1)).await;
    let _worker = Worker::start(&url, "a");
    wait_for(&mut client, "step 4", |status| status.step >= 4).await;
    client.cancel("").await.unwrap();
    let stopped = wait_for_state(&mut client, RunState::Cancelled).await;
    assert_eq!(
        stopped.checkpoint.map(|checkpoint| checkpoint.step),
        Some(stopped.step)
    );
    client.resume("", false).await.unwrap();
    wait_for_state(&mut client, RunState::Finished).await;
    let verdict = verdict(&mut client).await;
    assert!(verdict.finished && verdict.voided_steps == 0, "{verdict:?}");
}

#[tokio::test]
async fn runs_queue_and_the_second_one_follows_the_first() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, mut client) = coordinator(state.path()).await;
    let first = submit(&mut client, recipe(1, 1)).await;
    submit(&mut client, recipe(1, 1)).await;
    let second = client.status("").await.unwrap();
    assert_eq!(
        (second.state(), second.reason),
        (RunState::Queued, format!("behind {first}"))
    );
    let _worker = Worker::start(&url, "a");
    wait_for_state(&mut client, RunState::Finished).await;
    let all = client.list().await.unwrap();
    assert!(all.iter().all(|run| run.state() == RunState::Finished));
    assert_eq!(all[1].run, first);
}

#[tokio::test]
async fn a_restarted_coordinator_takes_up_the_run() {
    let state = tempfile::tempdir().unwrap();
    let (service, url, mut client) = coordinator(state.path()).await;
    submit(&mut client, recipe(1, 1)).await;
    let worker = Worker::start(&url, "a");
    wait_for(&mut client, "step 4", |status| status.step >= 4).await;
    service.stopper().shut_down("a test").await;
    worker.end().await.unwrap();
    assert!(service.wait().await.unwrap().stopped_a_run);

    let (_service, url, mut client) = coordinator(state.path()).await;
    let stopped = client.status("").await.unwrap();
    assert_eq!(stopped.state(), RunState::Cancelled);
    assert!(stopped.loss == 2.0, "metrics outlive the coordinator");
    let productive = |status: &v1::RunStatus| status.goodput.map_or(0.0, |parts| parts.productive);
    assert!(
        productive(&stopped) > 0.0,
        "the account outlives the coordinator"
    );
    client.resume("", false).await.unwrap();
    let _worker = Worker::start(&url, "a");
    wait_for_state(&mut client, RunState::Finished).await;
    assert_eq!(verdict(&mut client).await.breaks, []);
}

#[tokio::test]
async fn a_second_worker_of_the_same_name_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, _client) = coordinator(state.path()).await;
    let mut first = Session::open(&url, hello("a")).await.unwrap();
    first.hear().await.unwrap();
    let refusal = Worker::start(&url, "a").end().await.unwrap_err();
    assert!(
        refusal.contains("worker a is already attached from 127.0.0.1")
            && refusal.contains("--name"),
        "{refusal}"
    );
    let other = v1::Hello {
        build: "9.9.9".into(),
        ..hello("b")
    };
    let mut stranger = Session::open(&url, other).await.unwrap();
    let answer = format!("{:?}", stranger.hear().await.unwrap());
    assert!(answer.contains("install the same build"), "{answer}");
}

#[tokio::test]
async fn a_worker_that_does_not_read_is_lost_and_holds_up_nobody() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, mut client) = coordinator(state.path()).await;
    submit(&mut client, recipe(1, 1)).await;
    let mut deaf = Session::open(&url, hello("a")).await.unwrap();
    while !matches!(deaf.hear().await.unwrap(), Down::Assignment(_)) {}
    deaf.form().await.unwrap();
    let written = deaf.step_with_checkpoint().await.unwrap();
    // Each repeat is answered, until nobody takes the answers.
    for _ in 0..200_000 {
        if deaf
            .say(Up::CheckpointWritten(written.clone()))
            .await
            .is_err()
        {
            break;
        }
    }
    let status = wait_for(&mut client, "the loss", |status| {
        status.reason.contains("rank 0 (a) was lost")
    })
    .await;
    assert!(status.reason.contains("does not read"), "{}", status.reason);
    let _worker = Worker::start(&url, "b");
    wait_for_state(&mut client, RunState::Finished).await;
}

#[tokio::test]
async fn health_is_served() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, _client) = coordinator(state.path()).await;
    let channel = tonic::transport::Endpoint::from_shared(url)
        .unwrap()
        .connect()
        .await
        .unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest {
        service: "supra.v1.Workers".into(),
    };
    let status = health.check(request).await.unwrap().into_inner().status();
    assert_eq!(
        status,
        tonic_health::pb::health_check_response::ServingStatus::Serving
    );
}

#[tokio::test]
async fn bad_requests_say_what_is_wrong() {
    let state = tempfile::tempdir().unwrap();
    let (_service, _url, mut client) = coordinator(state.path()).await;
    assert!(
        matches!(client.status("").await, Err(error) if error.to_string().contains("no runs yet"))
    );
    let request = |recipe: String| v1::SubmitRequest {
        recipe,
        file_name: "typo.yaml".into(),
        base_directory: "/nowhere".into(),
        strict: false,
    };
    let error = client
        .submit(request(recipe(1, 1).replace("micro_batch", "micro_bach")))
        .await
        .unwrap_err();
    let report = error.to_string();
    assert!(
        report.contains("typo.yaml") && report.contains("micro_bach"),
        "{report}"
    );
    let relative = v1::SubmitRequest {
        base_directory: "here".into(),
        ..request(recipe(1, 1))
    };
    assert!(
        client
            .submit(relative)
            .await
            .unwrap_err()
            .to_string()
            .contains("absolute")
    );
    submit(&mut client, recipe(1, 1)).await;
    assert!(
        client
            .status("nothing")
            .await
            .unwrap_err()
            .to_string()
            .contains("there is no run nothing")
    );
    let cancelled = client.cancel("").await.unwrap();
    assert_eq!(cancelled.state(), RunState::Cancelled);
}

#[tokio::test]
async fn followed_logs_and_statuses_end_with_the_coordinator() {
    let state = tempfile::tempdir().unwrap();
    let (service, url, mut client) = coordinator(state.path()).await;
    submit(&mut client, recipe(1, 1)).await;
    let mut lines = client.logs("", true).await.unwrap();
    let mut watch = client.watch("").await.unwrap();
    let mut session = Session::open(&url, hello("a")).await.unwrap();
    session.hear().await.unwrap();
    let line = v1::LogLine {
        unix_ms: 1,
        level: "INFO".into(),
        text: "loading".into(),
    };
    loop {
        if let Ok(Down::Assignment(_)) = session.hear().await {
            break;
        }
    }
    session.say(Up::Log(line)).await.unwrap();
    while lines.next().await.unwrap().expect("a line").text != "loading" {}
    drop(session);
    service.stopper().shut_down("a test").await;
    service.wait().await.unwrap();
    while let Ok(Some(_)) = lines.next().await {}
    loop {
        match watch.next().await {
            Ok(Some(_)) => {}
            Ok(None) | Err(ClientError::Unreachable { .. }) => break,
            Err(other) => {
                assert!(other.to_string().contains("ending"), "{other}");
                break;
            }
        }
    }
}
