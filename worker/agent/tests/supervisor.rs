//! The supervisor, with real children.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use supra_agent::supervisor::{Birth, Pace, Role, Supervisor, role};

fn supervisor(program: &Path, arguments: &[&str]) -> Supervisor {
    let pace = Pace {
        first_pause: Duration::from_millis(20),
        longest_pause: Duration::from_millis(100),
        healthy: Duration::from_secs(60),
        stop: Duration::from_secs(20),
    };
    Supervisor {
        program: program.to_owned(),
        arguments: arguments.iter().map(OsString::from).collect(),
        pace,
    }
}

fn shell(script: &str) -> Supervisor {
    supervisor(Path::new("/bin/sh"), &["-c", script])
}

#[test]
fn codes_that_leave_nothing_to_repeat_end_it() {
    for code in [0, 2, 3, 75, 130] {
        assert_eq!(shell(&format!("exit {code}")).run().unwrap(), code);
    }
}

#[test]
fn a_child_finds_the_algorithm_of_nccl_pinned() {
    let script = "test \"$NCCL_ALGO $NCCL_PROTO\" = 'Ring Simple' && exit 75; exit 2";
    assert_eq!(shell(script).run().unwrap(), 75);
}

#[test]
fn a_child_that_dies_is_born_again_and_hears_how() {
    let directory = tempfile::tempdir().unwrap();
    let births = directory.path().join("births");
    let script = format!(
        "read line; echo \"$line\" >> {file}
         case $(wc -l < {file}) in
           1) echo said; echo 'no such device' >&2; exit 1 ;;
           2) kill -KILL $$ ;;
           3) echo the last words; exit 7 ;;
           *) exit 75 ;;
         esac",
        file = births.display()
    );
    assert_eq!(shell(&script).run().unwrap(), 75);
    let births = std::fs::read_to_string(births).unwrap();
    let births: Vec<Birth> = births
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let exits: Vec<_> = births
        .iter()
        .map(|birth| birth.previous_exit.as_str())
        .collect();
    let oom = "killed by SIGKILL (out of memory?)";
    assert_eq!(
        exits,
        [
            "",
            "exit code 1: no such device",
            oom,
            "exit code 7: the last words"
        ]
    );
    assert!(
        births
            .iter()
            .all(|birth| birth.instance == births[0].instance && birth.instance.len() == 32)
    );
}

#[test]
fn pauses_grow() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("count");
    let script = format!(
        "echo >> {0}; [ $(wc -l < {0}) -lt 5 ] && exit 1; exit 0",
        file.display()
    );
    let start = Instant::now();
    shell(&script).run().unwrap();
    // 20 + 40 + 80 + 100 ms.
    assert!(start.elapsed() >= Duration::from_millis(240));
}

#[test]
fn what_a_child_leaves_behind_dies_with_it() {
    let start = Instant::now();
    // The sleeper holds the outputs open.
    assert_eq!(shell("sleep 60 & exit 0").run().unwrap(), 0);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_missing_program_is_an_error() {
    let error = supervisor(Path::new("/no/such/program"), &[])
        .run()
        .unwrap_err();
    assert!(error.to_string().contains("/no/such/program"), "{error}");
}

/// Not a test of its own: a supervisor as a process, to which signals can be sent.
#[test]
#[ignore = "runs as a process of other tests"]
fn helper_supervisor() {
    let Ok(script) = std::env::var("SUPRA_TEST_SCRIPT") else {
        return;
    };
    std::process::exit(i32::from(shell(&script).run().unwrap()));
}

/// Not a test of its own: a supervisor whose child is `helper_child`.
#[test]
#[ignore = "runs as a process of other tests"]
fn helper_parent() {
    let arguments = [
        "supervisor::helper_child",
        "--exact",
        "--ignored",
        "--nocapture",
    ];
    supervisor(&std::env::current_exe().unwrap(), &arguments)
        .run()
        .unwrap();
}

/// Not a test of its own: a true child, with a child of its own.
#[test]
#[ignore = "runs as a process of other tests"]
fn helper_child() {
    let Role::Child(_) = role().unwrap() else {
        return;
    };
    let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
    println!("\npids {} {}", std::process::id(), sleeper.id());
    sleeper.wait().unwrap();
}

/// Starts a helper; returns it and the words after `mark` on the first line of its output with it.
fn helper(name: &str, script: &str, mark: &str) -> (Child, Vec<String>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--ignored", "--nocapture"])
        .env("SUPRA_TEST_SCRIPT", script)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    let mut lines = output.lines().map(Result::unwrap);
    let line = lines.find(|line| line.contains(mark)).unwrap();
    let words = line
        .split(mark)
        .nth(1)
        .unwrap()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    // Somebody has to read the rest.
    std::thread::spawn(move || lines.for_each(drop));
    (child, words)
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

#[test]
fn the_first_signal_asks_and_the_child_says_how_it_ended() {
    let script = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done";
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (mut child, _) = helper("supervisor::helper_supervisor", script, "ready");
        kill(pid(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(75));
    }
}

#[test]
fn the_second_signal_kills() {
    let script = "trap 'echo deaf' TERM; echo ready; while :; do sleep 0.05; done";
    let (mut child, _) = helper("supervisor::helper_supervisor", script, "ready");
    kill(pid(&child), Signal::SIGTERM).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none());
    kill(pid(&child), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_child_and_its_group_die_with_their_supervisor() {
    let (mut parent, words) = helper("supervisor::helper_parent", "", "pids");
    let pids: Vec<i32> = words.iter().map(|word| word.parse().unwrap()).collect();
    assert!(pids.iter().all(|&pid| alive(pid)));
    parent.kill().unwrap();
    parent.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(|&pid| alive(pid)) {
        assert!(Instant::now() < deadline, "still alive: {pids:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether a process runs: neither gone nor a zombie that nobody has waited for.
fn alive(pid: i32) -> bool {
    let stat =
        std::fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat"))).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}
