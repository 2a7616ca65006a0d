//! Running `supra` as a process, and what tests feed it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What a finished `supra` left behind.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// Fails unless it ended with this exit code.
    pub fn expect_code(self, code: i32) -> Output {
        assert_eq!(
            self.code,
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.stdout,
            self.stderr
        );
        self
    }
}

/// `supra` in an environment that does not lead it anywhere.
pub fn supra() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_supra"));
    command
        .env_remove("SUPRA_COORDINATOR")
        .env_remove("SUPRA_TOKEN_FILE")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null());
    command
}

/// Runs `supra` with these arguments to its end.
pub fn run(arguments: &[&str]) -> Output {
    finish(supra().args(arguments))
}

/// Runs a command to its end.
pub fn finish(command: &mut Command) -> Output {
    let output = command.output().expect("starts");
    Output {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

/// An address at which nobody listens.
pub fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    format!("http://{}", listener.local_addr().expect("an address"))
}

/// A small valid recipe in `directory`; its base and data are not there.
pub fn recipe(directory: &Path) -> PathBuf {
    let path = directory.join("small.yaml");
    let text = "name: small\n\
                base: { path: base }\n\
                data: { train: data }\n\
                budget: { tokens: 10000 }\n\
                batch: { tokens: 4096, micro_batch: 2, sequence_length: 512 }\n\
                optimizer: { warmup: 1 steps }\n\
                checkpoint: { every_tokens: 8192 }\n\
                workers: { min: 1, max: 2 }\n";
    std::fs::write(&path, text).expect("a recipe");
    path
}

/// Waits until `done`, at most ten seconds.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within ten seconds");
        sleep(Duration::from_millis(10));
    }
}

/// Reads a stream to its end on another thread, so that nobody blocks on a full pipe.
pub fn collect(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    })
}
