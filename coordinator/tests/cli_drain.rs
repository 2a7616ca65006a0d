//! `supra drain` against a real coordinator, with workers that speak the protocol.

use supra_proto::v1::RunState;

use crate::server_rig::{Worker, coordinator, recipe, submit, wait_for, wait_for_state};
use crate::support::{Output, run};

/// Runs `supra` while the coordinator goes on in this process.
async fn supra(url: &str, arguments: &[&str]) -> Output {
    let mut arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
    arguments.extend(["--coordinator".to_owned(), url.to_owned()]);
    let finished = tokio::task::spawn_blocking(move || {
        run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    });
    finished.await.expect("does not panic")
}

#[tokio::test]
async fn a_drained_worker_leaves_the_run_which_goes_on_without_it() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, mut client) = coordinator(state.path()).await;
    submit(&mut client, recipe(1, 2)).await;
    let _workers = [Worker::start(&url, "a"), Worker::start(&url, "b")];
    wait_for(&mut client, "step 2", |status| status.step >= 2).await;

    let drained = supra(&url, &["drain", "b"]).await.expect_code(0).stdout;
    assert!(
        drained.contains("Worker b finishes its step of run server-")
            && drained.contains("Worker b is out")
            && drained.contains("Restart it"),
        "{drained}"
    );
    let status = wait_for_state(&mut client, RunState::Finished).await;
    assert_eq!(status.step, 11);
    let table = supra(&url, &["workers"]).await.expect_code(0).stdout;
    assert!(
        table.contains("ASIDE") && table.contains("drained by a user"),
        "{table}"
    );

    let repeated = supra(&url, &["drain", "b", "--json"]).await.expect_code(0);
    let worker: serde_json::Value = serde_json::from_str(&repeated.stdout).unwrap();
    assert_eq!(
        (&worker["name"], &worker["aside"], &worker["run"]),
        (
            &"b".into(),
            &"drained by a user".into(),
            &serde_json::Value::Null
        )
    );
}

#[tokio::test]
async fn a_worker_that_nobody_knows_is_bad_input_with_the_nearest_name() {
    let state = tempfile::tempdir().unwrap();
    let (_service, url, mut client) = coordinator(state.path()).await;
    let _worker = Worker::start(&url, "node7/cpu");
    while client.workers().await.unwrap().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let refused = supra(&url, &["drain", "node7"]).await.expect_code(2);
    assert!(
        refused
            .stderr
            .contains("no attached worker is called node7; did you mean node7/cpu?"),
        "{}",
        refused.stderr
    );
}
