//! `supra up`: a coordinator and workers on this machine, from start to end of a run, and never an
//! orphan.

mod begin;
mod device;
pub(super) mod launch;
mod options;
mod signals;
mod start;

use std::time::Duration;

use supra_proto::Client;
use supra_proto::v1::{RunState, SubmitRequest};
use supra_recipes::Recipe;
use tokio::time::timeout;

use super::failure::{Exit, Failure};
use super::out;
use super::progress::{self, Progress};
use super::runs::submission;
use begin::begin;
use launch::{End, Family, Programs};
use options::{check, check_workers};
use signals::Signals;
use start::{Announcement, answering};

pub use options::Up;

/// Names of the children; workers have a number behind theirs.
const COORDINATOR: &str = "coordinator";
const WORKER: &str = "worker-";
/// How long the coordinator may take to end once it was told that all is done.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(20);
/// How long workers may take to follow it.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(3);

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
    let mut job = command.recipe.as_deref().map(submission).transpose()?;
    if let Some((recipe, request)) = &mut job {
        check_workers(&command, recipe)?;
        request.strict = command.strict.strict;
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
            self.display.end(status)?;
            return Ok((progress::exit(status), Leave::Done));
        }
        self.start_workers(programs, client.url())?;
        self.display.say(&begun.said)?;
        if let Some(chaos) = &recipe.chaos {
            self.display.say(&format!("note: {}", chaos.warning()))?;
        }
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
            None,
        )?;
        self.guarded(answering(&command.state, before)).await
    }

    fn start_workers(&mut self, programs: &Programs, url: &str) -> Result<(), Failure> {
        let command = self.command;
        for number in 0..command.workers() {
            self.family.spawn(
                &format!("{WORKER}{number}"),
                &programs.worker,
                &command.worker_arguments(number, url),
                command.worker_environment(number),
            )?;
        }
        self.display.say(&format!(
            "Coordinator at {url}, {}; logs in {}",
            command.what_starts(),
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
        if status.state() != RunState::Finished {
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
                    // Somebody else asked for its end.
                    let exit = match end.code {
                        Some(0) => Exit::Done,
                        Some(75) => Exit::Stopped,
                        _ => Exit::Failed,
                    };
                    if end.name == COORDINATOR && exit != Exit::Failed {
                        return Ok((exit, Leave::AtOnce));
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
            end.report,
            self.command.workers()
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
        let _ = timeout(FAREWELL_PATIENCE, family.ended("")).await;
    }
    family.terminate().await;
}
