//! `supra resume --adopt`: a run whose head node is gone, from one of its checkpoints.

use std::path::Path;

use supra_proto::v1::{AdoptRequest, AdoptResponse, RunState};
use supra_proto::{Client, ClientError};
use tonic::Code;

use super::failure::{Exit, Failure};
use super::{format, out};

/// Has the coordinator rebuild the run of a checkpoint and queue it; says which checkpoints it passed over. Gives the answer.
///
/// # Errors
/// There is no such checkpoint, it is damaged (exit code 4), or the coordinator knows the run.
pub async fn adopt(client: &mut Client, url: &str, strict: bool) -> Result<AdoptResponse, Failure> {
    let request = AdoptRequest {
        url: absolute(url)?,
        strict,
    };
    let answer = client.adopt(request).await.map_err(|error| match error {
        ClientError::Status {
            code: Code::DataLoss,
            message,
        } => Failure::Told {
            exit: Exit::Broken,
            message,
        },
        other => other.into(),
    })?;
    for known in &answer.passed_over {
        out::complain(&format!(
            "warning: nothing starts from the checkpoint of step {}, {}: {}",
            format::grouped(known.step),
            known.path,
            known.damaged
        ));
    }
    Ok(answer)
}

/// What became of it, for people.
pub fn render(answer: &AdoptResponse) -> String {
    let run = answer.run.clone().unwrap_or_default();
    let (path, step) = answer
        .checkpoint
        .as_ref()
        .map(|checkpoint| (checkpoint.path.as_str(), checkpoint.step))
        .unwrap_or_default();
    let after = format!(
        "Run {} is adopted from {path}: its ledger proves every sample up to step {}",
        run.run,
        format::grouped(step)
    );
    match run.state() {
        RunState::Finished => format!("{after}, where it had spent its budget."),
        _ => format!(
            "{after}, and it is queued to go on there. `supra watch {}` follows it.",
            run.run
        ),
    }
}

/// The coordinator may run in another directory.
fn absolute(url: &str) -> Result<String, Failure> {
    if url.contains("://") {
        return Ok(url.to_owned());
    }
    let path = std::path::absolute(Path::new(url))
        .map_err(|error| Failure::input(format!("{url:?} is no path: {error}.")))?;
    Ok(path.display().to_string())
}
