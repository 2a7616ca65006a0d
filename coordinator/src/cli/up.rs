//! `supra up`: a coordinator and workers on this machine, from start to end of a run, and never an
//! orphan.

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use supra_proto::Client;
use supra_proto::v1::SubmitRequest;
use supra_recipes::Recipe;
use tokio::time::timeout;

use super::begin::begin;
use super::failure::{Exit, Failure};
use super::launch::{End, Family, Programs};
use super::out;
use super::progress::{self, Progress};
use super::runs::{Json, submission};
use super::signals::Signals;
use super::start::{Announcement, answering};

/// Names of the children; workers have a number behind theirs.
const COORDINATOR: &str = "coordinator";
const WORKER: &str = "worker-";
/// How long children may take to end once the coordinator was told that all is done.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);

/// Arguments of `supra up`.
#[derive(Args, Debug)]
pub struct Up {
    /// Recipe to train (YAML). When the newest run of the state directory has the same recipe, it
    /// goes on, and is left alone if it is finished; otherwise a new run begins. Without a recipe,
    /// coordinator and workers serve until Ctrl-C
    #[arg(value_name = "RECIPE")]
    recipe: Option<PathBuf>,
    /// Worker processes to start
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: u32,
    /// Where workers compute; with cuda, worker i takes GPU i
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// State directory: journal, checkpoints, logs; made when absent
    #[arg(long, value_name = "DIR", default_value = "supra-state")]
    state: PathBuf,
    /// Loopback address and port to listen on; port 0 takes a free one, and DIR/address names it
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Threads that each worker computes with [default: cores / workers, at least 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Begin a new run even if the newest one could go on
    #[arg(long, requires = "recipe")]
    new: bool,
    #[command(flatten)]
    json: Json,
}

/// Where workers compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

/// What has been started, and what shows it.
struct Session<'a> {
    command: &'a Up,
    family: Family,
    signals: Signals,
    display: Progress,
    /// Once the coordinator answers.
    client: Option<Client>,
}

/// How a session takes leave of its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// The run is over: the coordinator sends everybody home.
    Done,
    /// The coordinator stops what trains, with a checkpoint, however long that takes.
    Stop,
    /// Something broke: whatever still lives is asked to end, then killed.
    AtOnce,
    /// The second Ctrl-C.
    Kill,
}

/// Starts everything, follows the run to its end, and ends everything.
///
/// # Errors
/// A bad recipe, a missing program, a child that ended.
pub async fn run(command: Up) -> Result<Exit, Failure> {
    check(&command)?;
    let job = command.recipe.as_deref().map(submission).transpose()?;
    if let Some((recipe, _)) = &job {
        check_workers(&command, recipe)?;
    }
    let signals = Signals::new()?;
    let programs = Programs::beside_this_one()?;
    programs.probe().await?;
    let family = Family::new(command.state.join("logs"))?;
    let display = Progress::new(command.json.json);
    let mut session = Session {
        command: &command,
        family,
        signals,
        display,
        client: None,
    };
    let outcome = session.live(&programs, job).await;
    session.display.leave();
    let leave = match &outcome {
        Ok((_, leave)) => *leave,
        Err(Failure::Closed) => Leave::Stop,
        Err(Failure::Told { .. }) => Leave::AtOnce,
    };
    let killed = session.leave(leave).await;
    match outcome {
        Ok(_) if killed => {
            out::complain(&format!(
                "Killed. `{}` goes on from the last checkpoint.",
                command.again()
            ));
            Ok(Exit::Interrupted)
        }
        Ok((exit, _)) => Ok(exit),
        Err(failure) => Err(failure),
    }
}

/// What clap cannot check.
fn check(command: &Up) -> Result<(), Failure> {
    if command.listen.ip().is_loopback() {
        return Ok(());
    }
    Err(Failure::input(format!(
        "`supra up` serves this machine only and listens on a loopback address, not on {}. To let workers of other \
         machines in, start `supra-coordinator run` and `supra-worker run` by themselves.",
        command.listen
    )))
}

fn check_workers(command: &Up, recipe: &Recipe) -> Result<(), Failure> {
    let needed = recipe.workers.min;
    if command.workers >= needed {
        return Ok(());
    }
    Err(Failure::input(format!(
        "the recipe needs at least {needed} workers (workers.min) and --workers is {}: it would wait for ever. Give \
         --workers {needed}, or lower workers.min.",
        command.workers
    )))
}

impl Up {
    /// The command that goes on with this run.
    fn again(&self) -> String {
        let mut words = vec!["supra up".to_owned()];
        words.extend(
            self.recipe
                .as_ref()
                .map(|recipe| quoted(&recipe.display().to_string())),
        );
        words.push(format!("--workers {}", self.workers));
        if self.device == Device::Cuda {
            words.push("--device cuda".to_owned());
        }
        words.push(format!(
            "--state {}",
            quoted(&self.state.display().to_string())
        ));
        words.join(" ")
    }

    /// Arguments of `supra-coordinator`.
    fn coordinator_arguments(&self) -> Vec<String> {
        let state = self.state.display().to_string();
        [
            "run",
            "--listen",
            &self.listen.to_string(),
            "--state",
            &state,
        ]
        .map(str::to_owned)
        .into()
    }

    /// Arguments of the worker of this number.
    fn worker_arguments(&self, number: u32, url: &str) -> Vec<String> {
        let device = match self.device {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda => format!("cuda:{number}"),
        };
        let (name, threads) = (format!("worker-{number}"), self.threads_each().to_string());
        [
            "run",
            "--coordinator",
            url,
            "--name",
            &name,
            "--device",
            &device,
            "--threads",
            &threads,
        ]
        .map(str::to_owned)
        .into()
    }

    fn threads_each(&self) -> u32 {
        self.threads.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
            u32::try_from(cores)
                .unwrap_or(u32::MAX)
                .div_euclid(self.workers)
                .max(1)
        })
    }
}

/// `text` as one word of a shell command.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

impl Session<'_> {
    /// Everything between the first child and the last.
    async fn live(
        &mut self,
        programs: &Programs,
        job: Option<(Recipe, SubmitRequest)>,
    ) -> Result<(Exit, Leave), Failure> {
        let mut client = self.start_coordinator(programs).await?;
        self.client = Some(client.clone());
        let Some((recipe, request)) = job else {
            self.start_workers(programs, client.url())?;
            return self.serve(client).await;
        };
        let begun = self
            .guarded(begin(&mut client, request, self.command.new))
            .await?;
        if let Some(status) = &begun.finished {
            self.display.say(&begun.said)?;
            self.display.show(status)?;
            self.display.end(status)?;
            return Ok((Exit::Done, Leave::Done));
        }
        self.start_workers(programs, client.url())?;
        self.display.say(&begun.said)?;
        self.follow(client, &begun.run, recipe.workers.min).await
    }

    /// Starts the coordinator and waits until it answers.
    async fn start_coordinator(&mut self, programs: &Programs) -> Result<Client, Failure> {
        let command = self.command;
        let before = Announcement::of(&command.state);
        self.family.spawn(
            COORDINATOR,
            &programs.coordinator,
            &command.coordinator_arguments(),
        )?;
        self.guarded(answering(&command.state, before)).await
    }

    fn start_workers(&mut self, programs: &Programs, url: &str) -> Result<(), Failure> {
        let command = self.command;
        for number in 0..command.workers {
            let arguments = command.worker_arguments(number, url);
            self.family
                .spawn(&format!("{WORKER}{number}"), &programs.worker, &arguments)?;
        }
        let device = if command.device == Device::Cuda {
            "cuda"
        } else {
            "cpu"
        };
        self.display.say(&format!(
            "Coordinator at {url}, {} on {device} with {} each; logs in {}",
            count(command.workers, "worker"),
            count(command.threads_each(), "thread"),
            command.state.join("logs").display()
        ))
    }

    /// Does `work` unless a child ends or a signal comes first.
    async fn guarded<T>(
        &mut self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            done = work => match done {
                Ok(done) => Ok(done),
                Err(failure) => Err(self.better_reason(failure).await),
            },
            end = self.family.next_end() => Err(Failure::failed(end.report)),
            () = self.signals.next() => Err(Failure::Told {
                exit: Exit::Interrupted,
                message: "interrupted before the run began.".to_owned(),
            }),
        }
    }

    /// A connection that broke because the coordinator ended: its own words say more.
    async fn better_reason(&mut self, failure: Failure) -> Failure {
        match (
            failure,
            timeout(Duration::from_secs(1), self.family.next_end()).await,
        ) {
            (Failure::Told { .. }, Ok(end)) => Failure::failed(self.broken(&end)),
            (failure, _) => failure,
        }
    }

    fn broken(&self, end: &End) -> String {
        format!(
            "{}\n`{}` goes on from the last checkpoint.",
            end.report,
            self.command.again()
        )
    }

    /// Shows the run until it ends. The first signal asks for a checkpoint and a stop, the second kills.
    async fn follow(
        &mut self,
        mut client: Client,
        run: &str,
        needed: u32,
    ) -> Result<(Exit, Leave), Failure> {
        let mut changes = match client.watch(run).await {
            Ok(changes) => changes,
            Err(error) => return Err(self.better_reason(error.into()).await),
        };
        let mut last = None;
        let mut stopping = false;
        loop {
            tokio::select! {
                // What the run says goes before what its processes do: they may end right after it.
                biased;
                change = changes.next() => match change {
                    Ok(Some(status)) => {
                        self.display.show(&status)?;
                        last = Some(status);
                    }
                    Ok(None) => break,
                    Err(error) => return Err(self.better_reason(error.into()).await),
                },
                () = self.signals.next() => {
                    if stopping {
                        return Ok((Exit::Interrupted, Leave::Kill));
                    }
                    stopping = true;
                    self.display.say("Stopping after a checkpoint. Ctrl-C again kills everything at once.")?;
                    let asked = tokio::select! {
                        asked = client.cancel(run) => asked,
                        () = self.signals.next() => return Ok((Exit::Interrupted, Leave::Kill)),
                    };
                    if let Err(error) = asked {
                        // Too late to cancel, or the coordinator is gone: either way the stream tells.
                        self.display.say(&format!("Cannot stop it: {error}"))?;
                    }
                },
                end = self.family.next_end() => self.child_ended(&end, needed)?,
            }
        }
        let Some(status) = last.filter(progress::ended) else {
            let failure = Failure::failed("the coordinator ended while the run was still going.");
            return Err(self.better_reason(failure).await);
        };
        self.display.end(&status)?;
        let exit = progress::exit(&status);
        if exit != Exit::Done {
            self.display
                .say(&format!("To resume: {}", self.command.again()))?;
        }
        Ok((exit, Leave::Done))
    }

    /// Runs without a recipe until a signal comes.
    async fn serve(&mut self, mut client: Client) -> Result<(Exit, Leave), Failure> {
        self.display.say(&format!(
            "Submit with: supra submit RECIPE --state {}",
            self.command.state.display()
        ))?;
        loop {
            tokio::select! {
                () = self.signals.next() => break,
                end = self.family.next_end() => {
                    // `Shutdown`, asked for by somebody else.
                    if end.name == COORDINATOR && end.success {
                        return Ok((Exit::Done, Leave::AtOnce));
                    }
                    self.child_ended(&end, 1)?;
                }
            }
        }
        let active = match client.list().await {
            Ok(runs) => runs.iter().any(|run| !progress::ended(run)),
            Err(_) => false,
        };
        self.display.say(if active {
            "Stopping after a checkpoint. Ctrl-C again kills everything at once."
        } else {
            "Stopping."
        })?;
        Ok((if active { Exit::Stopped } else { Exit::Done }, Leave::Stop))
    }

    /// A child is gone. Enough workers may be left; without a coordinator nothing goes on.
    fn child_ended(&self, end: &End, needed: u32) -> Result<(), Failure> {
        let left = self.family.living(WORKER);
        if end.name == COORDINATOR || left < needed.max(1) as usize {
            return Err(Failure::failed(self.broken(end)));
        }
        self.display.say(&format!(
            "{}\nIt goes on with {left} of {} workers.",
            end.report, self.command.workers
        ))
    }

    /// Ends all children; says whether they were killed on request.
    async fn leave(&mut self, how: Leave) -> bool {
        if how != Leave::Kill {
            tokio::select! {
                () = farewell(&mut self.family, self.client.as_mut(), how) => return false,
                () = self.signals.next() => {}
            }
        }
        self.family.kill().await;
        true
    }
}

/// Ends all children in order, as far as they let us.
async fn farewell(family: &mut Family, client: Option<&mut Client>, how: Leave) {
    if let Some(client) = client.filter(|_| matches!(how, Leave::Done | Leave::Stop)) {
        let coordinator = async {
            // A coordinator that does not understand is ended below.
            let _ = client.shutdown().await;
            family.ended(COORDINATOR).await;
        };
        // A stop writes a checkpoint first, which takes its time.
        let patience = if how == Leave::Stop {
            Duration::MAX
        } else {
            SHUTDOWN_PATIENCE
        };
        let _ = timeout(patience, coordinator).await;
        let _ = timeout(SHUTDOWN_PATIENCE, family.ended("")).await;
    }
    family.terminate().await;
}

/// `1 worker`, `2 workers`.
fn count(number: u32, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        up: Up,
    }

    fn parse(words: &[&str]) -> Up {
        Line::parse_from([&["up"], words].concat()).up
    }

    #[test]
    fn the_command_to_go_on_is_a_shell_command() {
        let up = parse(&["my recipe.yaml", "--workers", "2", "--state", "/s", "--new"]);
        assert_eq!(
            up.again(),
            "supra up 'my recipe.yaml' --workers 2 --state /s"
        );
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn each_worker_has_its_gpu_and_its_name() {
        let up = parse(&["--workers", "2", "--device", "cuda", "--threads", "3"]);
        let arguments = up.worker_arguments(1, "http://127.0.0.1:1").join(" ");
        assert_eq!(
            arguments,
            "run --coordinator http://127.0.0.1:1 --name worker-1 --device cuda:1 --threads 3"
        );
    }

    #[test]
    fn other_machines_are_not_served() {
        let error = check(&parse(&["--listen", "0.0.0.0:7070"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("supra-coordinator run"), "{error}");
        assert!(check(&parse(&["--listen", "[::1]:0"])).is_ok());
    }
}
