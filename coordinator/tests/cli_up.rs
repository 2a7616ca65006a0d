//! `supra up` as a process, with programs that stand in for the worker: what it starts, what it says
//! when they end, and that nothing outlives it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{Output, collect, finish, recipe, wait_until};

/// A worker that attaches nowhere and ends with its parent.
const IDLE: &str = "cat > /dev/null";

/// A directory with `supra` and the programs that it starts.
struct Stage {
    directory: tempfile::TempDir,
}

impl Stage {
    /// `supra` alone.
    fn bare() -> Stage {
        let stage = Stage {
            directory: tempfile::tempdir().expect("a directory"),
        };
        // Not a symbolic link: it looks for the others where it really is.
        let supra = env!("CARGO_BIN_EXE_supra");
        if fs::hard_link(supra, stage.path("supra")).is_err() {
            fs::copy(supra, stage.path("supra")).expect("a copy");
        }
        stage
    }

    /// With the real coordinator, and a shell script as worker: `--version` succeeds, `run` does `work`.
    fn with_worker(work: &str) -> Stage {
        let stage = Stage::bare();
        link(&stage.path("supra-coordinator"));
        stage.script(
            "supra-worker",
            &format!("[ \"$1\" = --version ] && exit 0\n{work}"),
        );
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.path(name);
        // What is there may be a link to a real program.
        let _ = fs::remove_file(&path);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
    }

    fn up(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("supra"));
        command
            .arg("up")
            .args(arguments)
            .arg("--state")
            .arg(self.path("state"))
            .env("NO_COLOR", "1");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let mut child = self.up(arguments).spawn().expect("starts");
        let (stdout, stderr) = (
            child.stdout.take().expect("piped"),
            child.stderr.take().expect("piped"),
        );
        Running {
            stdout: Some(collect(stdout)),
            stderr: Some(collect(stderr)),
            child,
        }
    }
}

/// A `supra up` that is under way.
struct Running {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Running {
    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("a live process");
    }

    /// Waits until it has started so many programs; gives their process ids.
    fn children(&self, count: usize) -> Vec<i32> {
        let mut found = Vec::new();
        wait_until("children", || {
            found = children(self.pid());
            found.len() == count
        });
        found
    }

    fn finish(mut self) -> Output {
        let mut code = None;
        wait_until("the end of supra up", || {
            let status = self.child.try_wait().expect("a child");
            code = status.and_then(|status| status.code());
            status.is_some()
        });
        let text = |reader: Option<JoinHandle<String>>| reader.expect("once").join().expect("read");
        Output {
            code,
            stdout: text(self.stdout.take()),
            stderr: text(self.stderr.take()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only where a test has failed.
        if matches!(self.child.try_wait(), Ok(None)) {
            for child in children(self.pid()) {
                let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A link to the real coordinator.
fn link(at: &Path) {
    symlink(env!("CARGO_BIN_EXE_supra-coordinator"), at).expect("a link");
}

fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .map(|pid| pid.parse().expect("a process id"))
                .collect::<Vec<i32>>()
        })
        .collect()
}

/// Whether a process still runs; one that nobody has waited for yet does not.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

fn all_end(pids: &[i32]) {
    wait_until("the end of all children", || {
        !pids.iter().any(|&pid| runs(pid))
    });
}

#[test]
fn a_missing_program_is_named_with_the_remedy() {
    let stage = Stage::bare();
    let answer = finish(&mut stage.up(&[])).expect_code(1);
    assert!(
        answer.stderr.contains("supra-coordinator is missing"),
        "{}",
        answer.stderr
    );
    link(&stage.path("supra-coordinator"));
    let answer = finish(&mut stage.up(&[])).expect_code(1);
    assert!(
        answer.stderr.contains("supra-worker is missing"),
        "{}",
        answer.stderr
    );
    assert!(
        answer.stderr.contains("scripts/quickstart"),
        "{}",
        answer.stderr
    );
}

#[test]
fn a_missing_libtorch_is_named_before_anything_starts() {
    let stage = Stage::with_worker(IDLE);
    let said = "supra-worker: error while loading shared libraries: libtorch_cpu.so: cannot open shared object file";
    stage.script("supra-worker", &format!("echo '{said}' >&2; exit 127"));
    let answer = finish(&mut stage.up(&[])).expect_code(1);
    assert!(
        answer.stderr.contains("cannot load libtorch"),
        "{}",
        answer.stderr
    );
    assert!(
        answer.stderr.contains("libtorch_cpu.so"),
        "{}",
        answer.stderr
    );
    assert!(answer.stderr.contains("scripts/setup"), "{}", answer.stderr);
    assert!(!stage.path("state").exists());
}

#[test]
fn too_few_workers_for_the_recipe_are_bad_input() {
    let stage = Stage::with_worker(IDLE);
    let path = recipe(stage.directory.path());
    let text = fs::read_to_string(&path)
        .unwrap()
        .replace("min: 1", "min: 2");
    fs::write(&path, text).unwrap();
    let answer = finish(&mut stage.up(&[path.to_str().unwrap()])).expect_code(2);
    assert!(answer.stderr.contains("--workers 2"), "{}", answer.stderr);
}

#[test]
fn a_coordinator_that_ends_is_shown_with_its_words() {
    let stage = Stage::with_worker(IDLE);
    stage.script(
        "supra-coordinator",
        "echo the journal is damaged >&2; exit 1",
    );
    let answer = finish(&mut stage.up(&[])).expect_code(1);
    assert!(
        answer.stderr.contains("coordinator ended with exit code 1"),
        "{}",
        answer.stderr
    );
    assert!(
        answer.stderr.contains("  the journal is damaged"),
        "{}",
        answer.stderr
    );
    assert!(
        answer.stderr.contains("logs/coordinator.log"),
        "{}",
        answer.stderr
    );
}

#[test]
fn a_worker_that_ends_is_shown_and_everything_else_ends_too() {
    let stage = Stage::with_worker("echo no such device >&2; exit 3");
    let answer = stage.start(&[]).finish().expect_code(1);
    assert!(
        answer.stderr.contains("worker-0 ended with exit code 3"),
        "{}",
        answer.stderr
    );
    assert!(
        answer.stderr.contains("  no such device"),
        "{}",
        answer.stderr
    );
}

#[test]
fn the_first_signal_stops_the_run_and_says_how_to_go_on() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let stage = Stage::with_worker(IDLE);
        let path = recipe(stage.directory.path());
        let running = stage.start(&[path.to_str().unwrap(), "--workers", "2"]);
        let children = running.children(3);
        wait_until("the run", || runs_of(&stage).contains("small"));
        running.signal(signal);
        let answer = running.finish().expect_code(75);
        assert!(
            answer.stdout.contains("Stopping after a checkpoint"),
            "{}",
            answer.stdout
        );
        assert!(
            answer.stdout.contains("--workers 2 --device cpu --state"),
            "{}",
            answer.stdout
        );
        all_end(&children);
    }
}

#[test]
fn without_a_recipe_a_signal_is_the_normal_end() {
    let stage = Stage::with_worker(IDLE);
    let running = stage.start(&[]);
    let children = running.children(2);
    wait_until("the address", || stage.path("state/address").exists());
    running.signal(Signal::SIGINT);
    let answer = running.finish().expect_code(0);
    assert!(
        answer.stdout.contains("supra submit RECIPE --state"),
        "{}",
        answer.stdout
    );
    all_end(&children);
}

#[test]
fn the_second_signal_kills() {
    let stage = Stage::with_worker("trap '' TERM INT; while :; do sleep 1; done");
    let running = stage.start(&[]);
    let children = running.children(2);
    wait_until("the address", || stage.path("state/address").exists());
    running.signal(Signal::SIGINT);
    // The coordinator has ended in order; the worker does not.
    wait_until("the end of the coordinator", || {
        children.iter().filter(|&&pid| runs(pid)).count() == 1
    });
    running.signal(Signal::SIGINT);
    let answer = running.finish().expect_code(130);
    assert!(answer.stderr.contains("Killed"), "{}", answer.stderr);
    all_end(&children);
}

#[test]
fn kill_9_leaves_no_orphans() {
    let stage = Stage::with_worker(IDLE);
    let path = recipe(stage.directory.path());
    let running = stage.start(&[path.to_str().unwrap(), "--workers", "2"]);
    let children = running.children(3);
    wait_until("the run", || runs_of(&stage).contains("small"));
    running.signal(Signal::SIGKILL);
    all_end(&children);
}

#[test]
fn a_closed_stdout_ends_everything_quietly() {
    let stage = Stage::with_worker(IDLE);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let answer = finish(stage.up(&[]).stdout(writer)).expect_code(0);
    assert_eq!(answer.stderr, "");
}

/// `supra runs` of the stage's coordinator; empty as long as none answers.
fn runs_of(stage: &Stage) -> String {
    let state = stage.path("state");
    finish(crate::support::supra().args(["runs", "--state", state.to_str().expect("UTF-8")])).stdout
}
