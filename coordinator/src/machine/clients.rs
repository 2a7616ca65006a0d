//! What clients ask for: submit, cancel, resume, shut down. (Draining a worker stands in `aside.rs`.)

use std::path::PathBuf;

use supra_proto::v1::{Goodbye, StopAfterStep, coordinator_message::Body as Down};
use supra_recipes::schema::Recipe;

use super::fact::{Fact, Outcome};
use super::state::{Run, RunNumber, RunPhase, Workers};
use super::{Action, Machine};

/// A validated recipe.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Id of the new run.
    pub id: String,
    /// The recipe's name.
    pub name: String,
    /// The resolved recipe as YAML.
    pub recipe: String,
    /// Directory of the checkpoints, absolute, or their URL.
    pub checkpoint_root: PathBuf,
    /// Published checkpoints that are kept.
    pub keep: u32,
    /// Of each multiple of so many tokens, the first checkpoint at or after it is kept, too; 0 = of none.
    pub keep_every: u64,
    /// A damaged checkpoint stops the run.
    pub strict: bool,
    /// Tokens of the whole samples of the budget.
    pub budget_tokens: u64,
    /// Workers that a generation needs, and may have.
    pub workers: Workers,
}

/// What a client asked for cannot be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The coordinator is ending.
    #[error("the coordinator is shutting down; start it again, then repeat this")]
    ShuttingDown,
    /// There is no such run.
    #[error("there is no run {0}")]
    NoRun(RunNumber),
    /// No attached worker has this name.
    #[error(
        "no attached worker is called {name}{} `supra workers` lists them",
        hint(near)
    )]
    NoWorker {
        /// What was asked for.
        name: String,
        /// Names like it, the nearest first.
        near: Vec<String>,
    },
    /// The run has no such checkpoint.
    #[error("run {run} has no published checkpoint {what}; `supra checkpoints` lists them")]
    NoCheckpoint {
        /// Id of the run.
        run: String,
        /// What was asked for.
        what: String,
    },
    /// Another checkpoint has the name.
    #[error(
        "the checkpoint of step {step} is called {name} already; drop that name, or choose another"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Step of the checkpoint that has it.
        step: u64,
    },
    /// A name that cannot be shown or typed as a word.
    #[error("{0:?} is no name for a checkpoint: write up to 64 letters, digits, '.', '_' or '-'")]
    BadName(String),
    /// An id that is taken.
    #[error("there is a run {0} already")]
    Taken(String),
    /// How strict a run is does not change while it is under way.
    #[error(
        "run {0} is under way without --strict and would go on so; `supra cancel {0} --wait`, then `supra resume {0} --strict`"
    )]
    NotStrict(String),
    /// A run that is to be adopted, and need not be.
    #[error(
        "this coordinator knows run {0} already, so there is nothing to adopt; `supra resume {0}` continues it when it has stopped"
    )]
    Known(String),
    /// The run has ended.
    #[error("run {id} {how} already")]
    Over {
        /// Id of the run.
        id: String,
        /// In what way.
        how: &'static str,
    },
}

fn hint(near: &[String]) -> String {
    if near.is_empty() {
        return ";".to_owned();
    }
    format!("; did you mean {}?", near.join(" or "))
}

impl Submission {
    /// A run of a resolved recipe.
    pub fn new(id: String, recipe: &Recipe, checkpoint_root: PathBuf, strict: bool) -> Submission {
        let length = u64::from(recipe.batch.sequence_length.max(1));
        Submission {
            id,
            name: recipe.name.to_string(),
            recipe: recipe.to_yaml(),
            checkpoint_root,
            keep: recipe.checkpoint.keep,
            keep_every: recipe.checkpoint.keep_every.map_or(0, |tokens| tokens.0),
            strict,
            budget_tokens: recipe.budget.tokens() / length * length,
            workers: Workers {
                min: recipe.workers.min,
                max: recipe.workers.max,
                grace: recipe.workers.grace.duration(),
            },
        }
    }
}

impl Machine {
    pub(super) fn submit(&mut self, submission: Submission) -> Result<(), Refused> {
        self.not_ending()?;
        if self.state.runs().iter().any(|run| run.id == submission.id) {
            return Err(Refused::Taken(submission.id));
        }
        let run = self.state.next_number();
        let Submission {
            id,
            name,
            recipe,
            checkpoint_root,
            keep,
            keep_every,
            strict,
            budget_tokens,
            workers,
        } = submission;
        self.log(Some(run), "INFO", format!("run {id} is queued"));
        let at = self.moment.unix_ms;
        self.decide(Fact::Submitted {
            run,
            id,
            name,
            recipe,
            checkpoint_root,
            keep,
            keep_every,
            strict,
            budget_tokens,
            workers,
            at,
        });
        Ok(())
    }

    pub(super) fn cancel(&mut self, number: RunNumber) -> Result<(), Refused> {
        let run = self.known(number)?;
        let id = run.id.clone();
        match run.phase {
            RunPhase::Queued => {}
            RunPhase::Cancelled => return Ok(()),
            RunPhase::Finished => {
                return Err(Refused::Over {
                    id,
                    how: "has finished",
                });
            }
            RunPhase::Failed => {
                return Err(Refused::Over {
                    id,
                    how: "has failed",
                });
            }
        }
        self.stop(number, "cancelled; `supra resume` continues it");
        Ok(())
    }

    pub(super) fn resume(&mut self, number: RunNumber, strict: bool) -> Result<(), Refused> {
        self.not_ending()?;
        let run = self.known(number)?;
        let id = run.id.clone();
        match run.phase {
            RunPhase::Queued if strict && !run.strict => return Err(Refused::NotStrict(id)),
            RunPhase::Queued => return Ok(()),
            RunPhase::Finished => {
                return Err(Refused::Over {
                    id,
                    how: "has finished",
                });
            }
            RunPhase::Cancelled | RunPhase::Failed => {}
        }
        let step = run.recovery_step();
        self.decide(Fact::Queued {
            run: number,
            strict,
            at: self.moment.unix_ms,
        });
        self.log(
            Some(number),
            "INFO",
            format!("run {id} is queued again, from step {step}"),
        );
        Ok(())
    }

    pub(super) fn shut_down(&mut self, reason: String) {
        if self.shutdown.is_some() {
            return;
        }
        self.log(None, "INFO", format!("shutting down: {reason}"));
        self.shutdown = Some(reason);
        let running = self.generation.as_ref().filter(|it| !it.away());
        let running = running.map(|generation| generation.run);
        self.give_up("it is to end before all workers are back");
        self.forget_absent();
        if let Some(run) = running {
            self.stop(
                run,
                "stopped with the coordinator; `supra resume` continues it",
            );
        }
    }

    /// Everybody is told and the process may end. Workers that ask to come in now are told too.
    pub(super) fn say_goodbye(&mut self) {
        let Some(reason) = self.shutdown.clone() else {
            return;
        };
        let conns: Vec<_> = self.workers.keys().copied().collect();
        self.workers.clear();
        for conn in conns {
            self.dismiss(conn, &reason);
        }
        if !self.said_goodbye {
            self.said_goodbye = true;
            self.out.push(Action::Exit);
        }
    }

    pub(super) fn dismiss(&mut self, conn: super::Conn, reason: &str) {
        let body = Down::Goodbye(Goodbye {
            reason: reason.to_owned(),
        });
        self.out.push(Action::Send {
            conn,
            run: String::new(),
            generation: 0,
            body,
        });
        self.out.push(Action::Close(conn));
    }

    /// Stops a queued run: at once when it is not training, else after a checkpoint.
    fn stop(&mut self, number: RunNumber, reason: &str) {
        let Some(run) = self
            .state
            .run(number)
            .filter(|run| !run.ended() && run.stop.is_none())
        else {
            return;
        };
        let training = self
            .generation
            .as_ref()
            .is_some_and(|generation| generation.run == run.number);
        if !training {
            return self.end_run(number, Outcome::Cancelled, reason.to_owned());
        }
        self.decide(Fact::StopAsked {
            run: number,
            reason: reason.to_owned(),
        });
        self.log(
            Some(number),
            "INFO",
            "asked to stop: a checkpoint is written first".to_owned(),
        );
        if self
            .generation
            .as_ref()
            .is_some_and(super::Generation::leaving)
        {
            return self.end_run(number, Outcome::Cancelled, reason.to_owned());
        }
        self.tell_all(
            &Down::Stop(StopAfterStep {
                reason: reason.to_owned(),
            }),
            None,
        );
    }

    fn known(&self, number: RunNumber) -> Result<&Run, Refused> {
        self.state.run(number).ok_or(Refused::NoRun(number))
    }

    pub(super) fn not_ending(&self) -> Result<(), Refused> {
        if self.shutdown.is_some() {
            Err(Refused::ShuttingDown)
        } else {
            Ok(())
        }
    }
}
