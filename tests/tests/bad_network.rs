//! Ports, addresses, names and limits that are wrong, and processes that die.

use std::net::TcpListener;
use std::process::Command;
use std::time::Instant;

use supra_proto::v1::coordinator_message::Body as Down;
use supra_proto::v1::worker_message::Body as Up;
use supra_proto::v1::{Hello, WorkerMessage};
use supra_proto::{BUILD, attach};
use supra_tests::cluster::free_port;
use supra_tests::process::{POLL, Process, run};
use supra_tests::{Cluster, Failure, Programs, Result, TinyRecipe};
use tokio_stream::wrappers::ReceiverStream;

use crate::{LIMIT, Stage};

/// Waits until a worker's output has all `words`.
fn wait_says(cluster: &mut Cluster, worker: &str, words: &[&str]) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let output = cluster.worker(worker)?.output().to_lowercase();
        if words
            .iter()
            .all(|word| output.contains(&word.to_lowercase()))
        {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure::new(format!(
                "{words:?} is not said, only:\n{output}"
            )));
        }
        std::thread::sleep(POLL);
    }
}

#[test]
fn a_port_in_use_is_named() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let mut coordinator = Programs::find()?.coordinator();
    coordinator
        .arg("run")
        .arg("--state")
        .arg(directory.path())
        .args(["--listen", &address]);
    let output = run(coordinator, LIMIT)?;
    assert_ne!(output.code, 0, "{output}");
    let port = taken.local_addr()?.port().to_string();
    output.expect_words(&[&port, "in use", "--listen"])?;
    Ok(())
}

#[test]
fn a_second_coordinator_on_the_same_state_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 0)?;
    let mut second = stage.programs.coordinator();
    second
        .arg("run")
        .arg("--state")
        .arg(cluster.state())
        .args(["--listen", "127.0.0.1:0"]);
    let output = run(second, LIMIT)?;
    assert_ne!(output.code, 0, "{output}");
    output.expect_words(&["another coordinator"])?;
    Ok(())
}

#[test]
fn an_unreachable_coordinator_is_exit_code_3() -> Result<()> {
    let url = format!("http://127.0.0.1:{}", free_port()?);
    let mut status = Programs::find()?.supra();
    status.args(["status", "--coordinator", &url]);
    run(status, LIMIT)?.expect_code(3)?.expect_words(&[
        &url,
        "nothing listens there",
        "start supra-coordinator",
    ])?;
    Ok(())
}

#[test]
fn a_worker_started_first_waits_for_its_coordinator() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 0)?;
    cluster.coordinator()?.kill()?;
    cluster.start_worker("early")?;
    let address = cluster.url().trim_start_matches("http://").to_owned();
    wait_says(&mut cluster, "early", &[&address])?;
    cluster.start_coordinator()?;
    cluster.wait_attached(1, LIMIT)
}

#[test]
fn a_second_worker_of_the_same_name_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 1)?;
    cluster.wait_attached(1, LIMIT)?;
    let mut twin = Process::spawn("twin", cluster.worker_command("w0"), stage.directory.path())?;
    let end = twin.wait(LIMIT)?;
    assert_eq!(end.code(), Some(2), "{}", twin.output());
    for word in ["worker w0 is already attached", "choose --name"] {
        assert!(twin.output().contains(word), "{}", twin.output());
    }
    assert_eq!(cluster.attached()?.len(), 1, "the first one stays");
    Ok(())
}

#[test]
fn a_worker_of_another_build_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let cluster = stage.cluster("cluster", 0)?;
    let hello = Hello {
        instance: "stranger".to_owned(),
        name: "stranger".to_owned(),
        build: "0.0.1 of long ago".to_owned(),
        plan_version: supra_recipes::plan::VERSION,
        plan_probe: supra_recipes::plan::probe().to_vec(),
        device: "cpu".to_owned(),
        data_address: "127.0.0.1:1".to_owned(),
        ..Hello::default()
    };
    let message = WorkerMessage {
        sequence: 1,
        body: Some(Up::Hello(hello)),
        ..WorkerMessage::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answer = runtime.block_on(async {
        let (send, receive) = tokio::sync::mpsc::channel(1);
        // The channel has room: nothing was sent yet.
        let _ = send.send(message).await;
        let mut stream = attach(cluster.url(), None, ReceiverStream::new(receive)).await?;
        let answer = tokio::time::timeout(LIMIT, stream.message()).await;
        drop(send);
        Ok::<_, Failure>(answer??)
    })?;
    match answer.and_then(|message| message.body) {
        Some(Down::Refusal(refusal)) => {
            for word in ["0.0.1 of long ago", BUILD, "install the same build"] {
                assert!(refusal.message.contains(word), "{}", refusal.message);
            }
            Ok(())
        }
        other => Err(Failure::new(format!("not refused: {other:?}"))),
    }
}

#[test]
fn every_program_says_which_build_it_is() -> Result<()> {
    let programs = Programs::find()?;
    for (name, mut program) in [
        ("supra", programs.supra()),
        ("supra-coordinator", programs.coordinator()),
        ("supra-worker", programs.worker()),
    ] {
        program.arg("--version");
        let output = run(program, LIMIT)?.expect_code(0)?;
        assert_eq!(output.stdout, format!("{name} {BUILD}\n"));
    }
    Ok(())
}

#[test]
fn a_wrong_advertised_address_is_named() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 1)?;
    // Nobody can connect to the broadcast address, and trying sends nothing.
    let mut wrong = cluster.worker_command("w1");
    wrong.args(["--advertise", "255.255.255.255"]);
    cluster.adopt_worker("w1", wrong)?;
    cluster.wait_attached(2, LIMIT)?;
    let run = stage.submit(&cluster, &TinyRecipe::default())?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let logs = cluster.supra(&["logs", &run])?.stdout;
        if logs.contains("255.255.255.255") && logs.contains("--advertise") {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{logs}\n{}", cluster.logs());
        std::thread::sleep(POLL);
    }
}

#[test]
fn too_few_open_files_are_told_before_anything_breaks() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 0)?;
    let worker = cluster.worker_command("w0");
    let mut limited = Command::new("sh");
    limited
        .args(["-ec", "ulimit -n 24\nexec \"$@\"", "sh"])
        .arg(worker.get_program())
        .args(worker.get_args());
    cluster.adopt_worker("w0", limited)?;
    wait_says(&mut cluster, "w0", &["files may be open", "ulimit"])
}

#[test]
fn a_worker_killed_as_if_for_memory_is_reported_and_replaced() -> Result<()> {
    let stage = Stage::new()?;
    let mut cluster = stage.cluster("cluster", 2)?;
    let recipe = TinyRecipe {
        budget: 60_010,
        ..TinyRecipe::default()
    };
    let run = stage.submit(&cluster, &recipe)?;
    cluster.wait(&run, "past a checkpoint", LIMIT, |status| status.step >= 20)?;
    cluster.worker("w1")?.kill_children()?;
    let end = cluster.wait_finished(&run, LIMIT)?;
    assert_eq!(end.tokens, recipe.tokens());
    cluster.audit(&run)?;
    let logs = cluster.supra(&["logs", &run])?.stdout;
    assert!(logs.contains("w1") && logs.contains("SIGKILL"), "{logs}");
    Ok(())
}
