//! Which run `supra up RECIPE` goes on with, or that it begins a new one.

use std::path::Path;

use supra_proto::Client;
use supra_proto::v1::ledger_record::Body;
use supra_proto::v1::{RunState, RunStatus, SubmitRequest};
use supra_recipes::Recipe;

use crate::cli::failure::Failure;
use crate::cli::{format, progress};

/// The run to follow.
#[derive(Debug)]
pub struct Begun {
    /// Its id.
    pub run: String,
    /// What was decided and why, for the user.
    pub said: String,
    /// It is finished already: there is nothing to do.
    pub finished: Option<RunStatus>,
}

/// What to do about the newest run of the state directory.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    /// It has this recipe and goes on by itself.
    Join,
    /// It has this recipe and was stopped.
    Resume,
    /// It has this recipe and is finished.
    Rest,
    /// It is in the way and has to make place first.
    Replace,
    /// Nothing to go on with.
    Submit,
}

/// Goes on with the newest run when it has the same recipe and has trained something; else submits.
///
/// # Errors
/// Whatever the coordinator refuses.
pub async fn begin(
    client: &mut Client,
    request: SubmitRequest,
    new: bool,
) -> Result<Begun, Failure> {
    let newest = client.list().await?.into_iter().next();
    let decision = match &newest {
        None => Decision::Submit,
        Some(newest) => {
            let trained = trained_recipe(client, &newest.run).await?;
            decide(
                newest,
                trained.map(|hash| Some(hash) == recipe_hash(&request)),
                new,
            )
        }
    };
    let mut before = None;
    if let Some(newest) = newest {
        let under_way = !progress::ended(&newest);
        let run = newest.run.clone();
        match decision {
            Decision::Join => {
                if request.strict {
                    // Changes nothing in a run that is strict, and is refused for one that is not.
                    client.resume(&run, true).await?;
                }
                let step = format::grouped(newest.step);
                let said = format!(
                    "Run {run} of the same recipe goes on after step {step} (--new begins another)."
                );
                return Ok(Begun {
                    run,
                    said,
                    finished: None,
                });
            }
            Decision::Resume => {
                client.resume(&run, request.strict).await?;
                let said =
                    format!("Run {run} of the same recipe is resumed (--new begins another).");
                return Ok(Begun {
                    run,
                    said,
                    finished: None,
                });
            }
            Decision::Rest => {
                let said = format!(
                    "Run {run} of the same recipe has finished already (--new begins another)."
                );
                return Ok(Begun {
                    run,
                    said,
                    finished: Some(newest),
                });
            }
            Decision::Replace => {
                client.cancel(&run).await?;
            }
            Decision::Submit => before = under_way.then_some(run),
        }
    }
    let run = client.submit(request).await?;
    let said = match before {
        Some(before) => format!(
            "Run {run} waits for run {before} to end; `supra cancel {before}` stops that one."
        ),
        None => format!("Run {run} begins."),
    };
    Ok(Begun {
        run,
        said,
        finished: None,
    })
}

/// Hash of the recipe that a run trained by, from its ledger; none when it has trained nothing.
async fn trained_recipe(client: &mut Client, run: &str) -> Result<Option<Vec<u8>>, Failure> {
    let first = client.ledger(run).await?.next().await?;
    Ok(match first.and_then(|record| record.body) {
        Some(Body::Open(open)) => Some(open.recipe_hash),
        _ => None,
    })
}

/// As the coordinator computes it: BLAKE3 of the resolved recipe's YAML.
fn recipe_hash(request: &SubmitRequest) -> Option<Vec<u8>> {
    let recipe = Recipe::parse(&request.recipe, &request.file_name).ok()?;
    let resolved = recipe.resolved(Path::new(&request.base_directory));
    Some(
        blake3::hash(resolved.to_yaml().as_bytes())
            .as_bytes()
            .to_vec(),
    )
}

/// `same`: whether the run trained by this recipe; none when it has trained nothing yet.
fn decide(newest: &RunStatus, same: Option<bool>, new: bool) -> Decision {
    let ended = progress::ended(newest);
    match same {
        Some(true) if !new => match newest.state() {
            RunState::Finished => Decision::Rest,
            _ if ended => Decision::Resume,
            _ => Decision::Join,
        },
        // Another recipe that is under way stays first in the queue.
        Some(false) if !new => Decision::Submit,
        _ if ended => Decision::Submit,
        _ => Decision::Replace,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(state: RunState) -> RunStatus {
        RunStatus {
            state: state as i32,
            ..RunStatus::default()
        }
    }

    #[test]
    fn an_unfinished_run_of_the_same_recipe_goes_on() {
        assert_eq!(
            decide(&run(RunState::Training), Some(true), false),
            Decision::Join
        );
        assert_eq!(
            decide(&run(RunState::Forming), Some(true), false),
            Decision::Join
        );
        assert_eq!(
            decide(&run(RunState::Cancelled), Some(true), false),
            Decision::Resume
        );
        assert_eq!(
            decide(&run(RunState::Failed), Some(true), false),
            Decision::Resume
        );
    }

    #[test]
    fn a_finished_run_is_left_alone() {
        assert_eq!(
            decide(&run(RunState::Finished), Some(true), false),
            Decision::Rest
        );
        assert_eq!(
            decide(&run(RunState::Finished), Some(true), true),
            Decision::Submit
        );
        assert_eq!(
            decide(&run(RunState::Finished), Some(false), false),
            Decision::Submit
        );
    }

    #[test]
    fn new_makes_place() {
        assert_eq!(
            decide(&run(RunState::Training), Some(true), true),
            Decision::Replace
        );
        assert_eq!(
            decide(&run(RunState::Cancelled), Some(true), true),
            Decision::Submit
        );
    }

    #[test]
    fn a_run_that_trained_nothing_is_not_worth_keeping() {
        // Its recipe may have been mended meanwhile.
        assert_eq!(
            decide(&run(RunState::Failed), None, false),
            Decision::Submit
        );
        assert_eq!(
            decide(&run(RunState::Queued), None, false),
            Decision::Replace
        );
    }

    #[test]
    fn another_recipe_stays_first() {
        assert_eq!(
            decide(&run(RunState::Training), Some(false), false),
            Decision::Submit
        );
        assert_eq!(
            decide(&run(RunState::Cancelled), Some(false), false),
            Decision::Submit
        );
    }
}
