//! `supra-coordinator` as a process: what it prints, how it refuses to start, how it ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use supra_coordinator::address;
use supra_proto::Client;
use supra_proto::v1::RunState;

use crate::server_rig::{Session, Worker, hello, recipe, submit, wait_for, wait_for_state};

struct Process {
    child: Child,
    url: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(state: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_supra-coordinator"));
    command.arg("run").arg("--state").arg(state).args(arguments);
    command
        .env_remove("SUPRA_LISTEN")
        .env_remove("SUPRA_STATE")
        .env_remove("SUPRA_TOKEN_FILE")
        .env_remove("RUST_LOG");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

impl Process {
    fn start(state: &Path) -> Process {
        let mut child = command(state, &["--listen", "127.0.0.1:0"])
            .stderr(Stdio::null())
            .spawn()
            .expect("starts");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("is piped"))
            .read_line(&mut line)
            .expect("is readable");
        assert!(
            line.starts_with("listening on http://127.0.0.1:"),
            "{line:?}"
        );
        let url = address::read(state).expect("is announced");
        assert!(line.contains(&url), "{line:?} {url:?}");
        Process { child, url }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("is alive");
    }

    async fn code(mut self) -> Option<i32> {
        for _ in 0..1000 {
            if let Some(status) = self.child.try_wait().expect("is a child") {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("does not end");
    }
}

/// Starts one that cannot start; its exit code and what it says.
fn refused(state: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let output = command(state, arguments).output().expect("starts");
    (
        output.status.code(),
        String::from_utf8(output.stderr).expect("UTF-8"),
    )
}

#[tokio::test]
async fn a_signal_ends_an_idle_coordinator_and_removes_its_address() {
    let state = tempfile::tempdir().unwrap();
    let process = Process::start(state.path());
    process.signal(Signal::SIGTERM);
    assert_eq!(process.code().await, Some(0));
    assert!(address::read(state.path()).is_err());
}

#[tokio::test]
async fn a_signal_stops_the_run_with_a_checkpoint_and_says_resumable() {
    let state = tempfile::tempdir().unwrap();
    let process = Process::start(state.path());
    let mut client = Client::connect(&process.url, None).await.unwrap();
    submit(&mut client, recipe(1, 1)).await;
    let worker = Worker::start(&process.url, "a");
    wait_for(&mut client, "step 2", |status| status.step >= 2).await;
    process.signal(Signal::SIGINT);
    worker.end().await.unwrap();
    assert_eq!(process.code().await, Some(75));
}

#[tokio::test]
async fn the_second_signal_ends_it_at_once() {
    let state = tempfile::tempdir().unwrap();
    let process = Process::start(state.path());
    let mut client = Client::connect(&process.url, None).await.unwrap();
    submit(&mut client, recipe(1, 1)).await;
    // A worker that never answers keeps the coordinator from ending by itself.
    let mut mute = Session::open(&process.url, hello("a")).await.unwrap();
    while !matches!(
        mute.hear().await.unwrap(),
        supra_proto::v1::coordinator_message::Body::Assignment(_)
    ) {}
    process.signal(Signal::SIGINT);
    tokio::time::sleep(Duration::from_millis(200)).await;
    process.signal(Signal::SIGINT);
    assert_eq!(process.code().await, Some(130));
}

#[tokio::test]
async fn a_killed_coordinator_goes_on_where_its_journal_ends() {
    let state = tempfile::tempdir().unwrap();
    let mut process = Process::start(state.path());
    let mut client = Client::connect(&process.url, None).await.unwrap();
    submit(&mut client, recipe(1, 1)).await;
    for step in [4, 7] {
        let worker = Worker::start(&process.url, "a");
        wait_for(&mut client, "a step", |status| status.step >= step).await;
        process.signal(Signal::SIGKILL);
        assert!(worker.end().await.is_err());
        drop(process);
        process = Process::start(state.path());
        client = Client::connect(&process.url, None).await.unwrap();
        assert_eq!(client.status("").await.unwrap().state(), RunState::Forming);
    }
    let _worker = Worker::start(&process.url, "a");
    let finished = wait_for_state(&mut client, RunState::Finished).await;
    assert_eq!(finished.tokens, finished.budget_tokens);
}

#[tokio::test]
async fn a_killed_coordinator_remembers_who_is_drained() {
    let state = tempfile::tempdir().unwrap();
    let mut process = Process::start(state.path());
    let hello = hello("a");
    let mut session = Session::open(&process.url, hello.clone()).await.unwrap();
    session.hear().await.unwrap();
    let mut client = Client::connect(&process.url, None).await.unwrap();
    client.drain("a").await.unwrap();
    process.signal(Signal::SIGKILL);
    drop(process);

    process = Process::start(state.path());
    let mut session = Session::open(&process.url, hello).await.unwrap();
    session.hear().await.unwrap();
    let mut client = Client::connect(&process.url, None).await.unwrap();
    let known = client.workers().await.unwrap();
    let aside = known.iter().map(|worker| worker.aside.as_str());
    assert_eq!(aside.collect::<Vec<_>>(), ["drained by a user"]);
}

#[test]
fn what_keeps_it_from_starting_is_named_with_a_remedy() {
    let state = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let (code, text) = refused(state.path(), &["--listen", &format!("127.0.0.1:{port}")]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains(&format!("port {port} of 127.0.0.1 is in use")) && text.contains("--listen"),
        "{text}"
    );

    let (code, text) = refused(state.path(), &["--listen", "0.0.0.0:0"]);
    assert_eq!(code, Some(2));
    assert!(
        text.contains("--insecure-plaintext") && text.contains("--token-file"),
        "{text}"
    );

    let (code, text) = refused(state.path(), &["--listen", "nonsense"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("HOST:PORT"), "{text}");

    let token = state.path().join("token");
    std::fs::write(&token, "short").unwrap();
    let (code, text) = refused(state.path(), &["--token-file", token.to_str().unwrap()]);
    assert_eq!(code, Some(2));
    assert!(text.contains("shorter"), "{text}");

    let file = state.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, text) = refused(&file, &["--listen", "127.0.0.1:0"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("cannot use the state directory"), "{text}");
}

#[test]
fn a_second_coordinator_on_the_same_state_is_turned_away() {
    let state = tempfile::tempdir().unwrap();
    let process = Process::start(state.path());
    let (code, text) = refused(state.path(), &["--listen", "127.0.0.1:0"]);
    assert_eq!(code, Some(1));
    let holder = format!("another coordinator (process {})", process.child.id());
    assert!(text.contains(&holder), "{text}");
}

#[tokio::test]
async fn a_token_is_asked_for_on_every_call() {
    let state = tempfile::tempdir().unwrap();
    let token = state.path().join("token");
    std::fs::write(&token, "0123456789abcdef0123").unwrap();
    let options = supra_coordinator::service::Options {
        token: Some(supra_proto::Token::from_file(&token).unwrap()),
        insecure_plaintext: true,
        ..crate::server_rig::quick(state.path())
    };
    let service = supra_coordinator::service::Service::start(options)
        .await
        .unwrap();
    let url = format!("http://{}", service.address());
    let mut stranger = Client::connect(&url, None).await.unwrap();
    assert!(stranger.list().await.is_err());
    assert!(Worker::start(&url, "a").end().await.is_err());
    let secret = supra_proto::Token::from_file(&token).unwrap();
    let mut friend = Client::connect(&url, Some(secret)).await.unwrap();
    assert!(friend.list().await.unwrap().is_empty());
}
