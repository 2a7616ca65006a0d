//! Child processes of `supra up`: each in its own process group, its output in a log file, its
//! stdin a pipe that we hold open. A child whose environment says `SUPRA_PARENT_PIPE=1` ends when
//! that pipe closes, so that nothing outlives us even when we are killed.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures::future::{pending, select_all};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{ChildStdin, Command};
use tokio::time::timeout;

use crate::cli::failure::Failure;

/// How long `supra-worker --version` may take: it loads libtorch, from a cold disk at worst.
const PROBE_LIMIT: Duration = Duration::from_secs(60);
/// Time to end after SIGTERM, before SIGKILL.
const TERM_PATIENCE: Duration = Duration::from_secs(10);
/// Lines of a child's log that an error shows.
const TAIL_LINES: usize = 12;
/// Bytes of a child's log that are read for them.
const TAIL_BYTES: u64 = 8192;

/// The programs that `supra up` starts.
#[derive(Debug)]
pub struct Programs {
    /// `supra-coordinator`.
    pub coordinator: PathBuf,
    /// `supra-worker`.
    pub worker: PathBuf,
}

impl Programs {
    /// Finds both programs beside the running one.
    ///
    /// # Errors
    /// Names the one that is missing.
    pub fn beside_this_one() -> Result<Programs, Failure> {
        let this = std::env::current_exe().map_err(|error| {
            Failure::failed(format!("cannot tell where this program is: {error}."))
        })?;
        Programs::in_directory(this.parent().unwrap_or(Path::new("/")))
    }

    /// Finds both programs in `directory`.
    ///
    /// # Errors
    /// Names the one that is missing.
    fn in_directory(directory: &Path) -> Result<Programs, Failure> {
        let find = |name: &str, package: &str| {
            let path = directory.join(name);
            if path.is_file() {
                return Ok(path);
            }
            Err(Failure::failed(format!(
                "{name} is missing: it is looked for beside this program, in {}. Build it there with \
                 `cargo build --release -p {package}`, or run `scripts/quickstart`, which builds everything.",
                directory.display()
            )))
        };
        Ok(Programs {
            coordinator: find("supra-coordinator", "supra-coordinator")?,
            worker: find("supra-worker", "supra-worker")?,
        })
    }

    /// Runs `supra-worker --version`: shows whether libtorch can be loaded before anything is started.
    ///
    /// # Errors
    /// Shows what the dynamic loader said, and the remedy.
    pub async fn probe(&self) -> Result<(), Failure> {
        let worker = self.worker.display();
        let mut command = Command::new(&self.worker);
        command
            .arg("--version")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = match timeout(PROBE_LIMIT, command.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => {
                return Err(Failure::failed(format!("cannot start {worker}: {error}.")));
            }
            Err(_) => {
                let limit = PROBE_LIMIT.as_secs();
                return Err(Failure::failed(format!(
                    "`{worker} --version` has not ended within {limit} s."
                )));
            }
        };
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim();
        let how = describe(output.status);
        Err(Failure::failed(if said.contains("shared librar") {
            format!(
                "{worker} cannot load libtorch: {said}. Install libtorch with `scripts/setup`, then build the worker \
                 again with `cargo build --release -p supra-worker`."
            )
        } else {
            format!("{worker} does not run: `--version` {how}: {said}")
        }))
    }
}

/// One started program.
pub struct Child {
    name: String,
    process: tokio::process::Child,
    group: Pid,
    /// Held open for as long as the child shall live.
    pipe: Option<ChildStdin>,
    log: PathBuf,
    /// Where this start's part of the log begins.
    log_start: u64,
    ended: bool,
}

/// How a child ended.
#[derive(Debug)]
pub struct End {
    /// Its name, as given to [`Family::spawn`].
    pub name: String,
    /// What happened, with the tail of its log.
    pub report: String,
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
}

/// All children. Dropping it kills what still lives.
pub struct Family {
    logs: PathBuf,
    children: Vec<Child>,
}

impl Family {
    /// No children yet; their logs go to `logs`, which is made.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(logs: PathBuf) -> Result<Family, Failure> {
        fs::create_dir_all(&logs).map_err(|error| {
            let logs = logs.display();
            Failure::failed(format!(
                "cannot make the log directory {logs}: {error}. Choose another --state DIR."
            ))
        })?;
        Ok(Family {
            logs,
            children: Vec::new(),
        })
    }

    /// Starts a program, with `environment` added to ours. Its stdout and stderr are appended to `LOGS/NAME.log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be started.
    pub fn spawn(
        &mut self,
        name: &str,
        program: &Path,
        arguments: &[String],
        environment: Option<(&'static str, String)>,
    ) -> Result<(), Failure> {
        let path = self.logs.join(format!("{name}.log"));
        let open = || -> std::io::Result<(File, File, u64)> {
            let log = OpenOptions::new().create(true).append(true).open(&path)?;
            Ok((log.try_clone()?, log.try_clone()?, log.metadata()?.len()))
        };
        let (stdout, stderr, log_start) = open().map_err(|error| {
            Failure::failed(format!(
                "cannot open the log {}: {error}. Choose another --state DIR.",
                path.display()
            ))
        })?;
        let started = Command::new(program)
            .args(arguments)
            .envs(environment)
            .env("SUPRA_PARENT_PIPE", "1")
            .env("NO_COLOR", "1")
            // Loopback asks for no token, whatever other coordinator the user's environment is for.
            .env_remove("SUPRA_TOKEN_FILE")
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true)
            .spawn();
        let mut process = started.map_err(|error| {
            Failure::failed(format!(
                "cannot start {name} ({}): {error}.",
                program.display()
            ))
        })?;
        // The leader's process id is the group's. A fresh child has one.
        let pid = process
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .expect("invariant: not waited for yet");
        let pipe = process.stdin.take();
        let group = Pid::from_raw(pid);
        self.children.push(Child {
            name: name.to_owned(),
            process,
            group,
            pipe,
            log: path,
            log_start,
            ended: false,
        });
        Ok(())
    }

    /// Children that live, of those whose name begins with `prefix`.
    pub fn living(&self, prefix: &str) -> usize {
        self.children
            .iter()
            .filter(|child| !child.ended && child.name.starts_with(prefix))
            .count()
    }

    /// Waits until a child ends; for ever when there is none. Safe to cancel.
    pub async fn next_end(&mut self) -> End {
        let waits: Vec<_> = self
            .children
            .iter_mut()
            .filter(|child| !child.ended)
            .map(|child| {
                Box::pin(async move {
                    let status = child.process.wait().await;
                    (child, status)
                })
            })
            .collect();
        if waits.is_empty() {
            return pending().await;
        }
        let ((child, status), _, _) = select_all(waits).await;
        child.ended = true;
        let code = status.as_ref().ok().and_then(ExitStatus::code);
        let how = status.map_or_else(|error| format!("cannot be waited for: {error}"), describe);
        End {
            name: child.name.clone(),
            report: child.report(&how),
            code,
        }
    }

    /// Waits until no child lives of those whose name begins with `prefix`. Safe to cancel.
    pub async fn ended(&mut self, prefix: &str) {
        while self.living(prefix) > 0 {
            self.next_end().await;
        }
    }

    /// Asks all children to end (SIGTERM, and their pipe closes), and kills what has not ended in time.
    pub async fn terminate(&mut self) {
        for child in self.children.iter_mut().filter(|child| !child.ended) {
            child.signal(Signal::SIGTERM);
            child.pipe = None;
        }
        if timeout(TERM_PATIENCE, self.ended("")).await.is_err() {
            self.kill().await;
        }
    }

    /// Kills all children and whatever they started in their groups, and waits for the children.
    pub async fn kill(&mut self) {
        self.kill_groups();
        // A process that the kernel does not let go (a broken disk) must not keep us.
        let _ = timeout(TERM_PATIENCE, self.ended("")).await;
    }

    fn kill_groups(&self) {
        for child in self.children.iter().filter(|child| !child.ended) {
            child.signal(Signal::SIGKILL);
        }
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        self.kill_groups();
    }
}

impl Child {
    /// Signals the whole group. It can only fail when nothing of the group is left.
    fn signal(&self, signal: Signal) {
        let _ = killpg(self.group, signal);
    }

    /// `NAME HOW. Its last words (LOG): …`
    fn report(&self, how: &str) -> String {
        let tail = self.tail();
        let log = self.log.display();
        if tail.is_empty() {
            format!("{} {how}. It said nothing ({log}).", self.name)
        } else {
            format!("{} {how}. The end of {log}:\n{tail}", self.name)
        }
    }

    /// The last lines that this start of the child wrote, indented.
    fn tail(&self) -> String {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut log = File::open(&self.log)?;
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(
                length.saturating_sub(TAIL_BYTES).max(self.log_start),
            ))?;
            let mut bytes = Vec::new();
            log.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        lines[from..]
            .iter()
            .map(|line| format!("  {line}"))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// `ended with exit code 1`, or `was killed by SIGKILL …`.
fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal)
                .map_or_else(|_| format!("signal {signal}"), |s| s.as_str().to_owned());
            let hint = if signal == Signal::SIGKILL as i32 {
                " (by someone, or by the kernel when memory ran out)"
            } else {
                ""
            };
            format!("was killed by {name}{hint}")
        }
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_where_it_was_looked_for() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("supra-coordinator"), "").expect("a file");
        let error = Programs::in_directory(directory.path())
            .expect_err("no worker")
            .to_string();
        assert!(error.contains("supra-worker is missing"), "{error}");
        assert!(
            error.contains(&directory.path().display().to_string()),
            "{error}"
        );
    }

    #[test]
    fn ends_are_described() {
        assert_eq!(
            describe(ExitStatus::from_raw(1 << 8)),
            "ended with exit code 1"
        );
        assert_eq!(describe(ExitStatus::from_raw(15)), "was killed by SIGTERM");
        assert!(describe(ExitStatus::from_raw(9)).contains("memory"));
    }

    #[tokio::test]
    async fn the_report_shows_only_what_this_start_wrote() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("worker-0.log"), "of yesterday\n").expect("a log");
        let mut family = Family::new(directory.path().to_owned()).expect("a family");
        let script = ["-c".to_owned(), "echo of today; exit 3".to_owned()];
        family
            .spawn("worker-0", Path::new("/bin/sh"), &script, None)
            .expect("starts");
        let end = family.next_end().await;
        assert!(
            end.report.starts_with("worker-0 ended with exit code 3"),
            "{}",
            end.report
        );
        assert!(end.report.ends_with("\n  of today"), "{}", end.report);
        assert_eq!(family.living("worker-"), 0);
    }

    #[tokio::test]
    async fn children_see_the_end_of_their_pipe_only_when_told_to_end() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut family = Family::new(directory.path().to_owned()).expect("a family");
        let script = ["-c".to_owned(), "trap '' TERM; cat; exit 0".to_owned()];
        family
            .spawn("worker-0", Path::new("/bin/sh"), &script, None)
            .expect("starts");
        assert!(
            timeout(Duration::from_millis(200), family.next_end())
                .await
                .is_err(),
            "ended early"
        );
        family.terminate().await;
        assert_eq!(family.living(""), 0);
    }
}
