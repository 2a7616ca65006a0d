//! `supra drain`: takes a worker out of training without costing the others a step.

use std::time::Duration;

use clap::Args;
use supra_proto::v1::WorkerStatus;

use super::connect::Connect;
use super::failure::{Exit, Failure};
use super::runs::Json;
use super::{json, out};

/// Time between two looks at the worker.
const LOOK: Duration = Duration::from_millis(250);

/// Have a worker finish its step, leave its generation and train no more; wait until it is out
#[derive(Args, Debug)]
pub struct Drain {
    /// Name of the worker, as `supra workers` shows it
    #[arg(value_name = "WORKER")]
    worker: String,
    #[command(flatten)]
    json: Json,
    #[command(flatten)]
    connect: Connect,
}

/// How far a worker that is being drained has come.
#[derive(Debug, PartialEq)]
enum Stand<'a> {
    /// It still has a place in this run.
    In(&'a str),
    /// It is attached and idle.
    Out(&'a WorkerStatus),
    /// It is lost, or another one has its name.
    Gone,
}

fn stand<'a>(workers: &'a [WorkerStatus], instance: &str) -> Stand<'a> {
    let known = workers.iter().find(|worker| worker.instance == instance);
    match known {
        Some(worker) if worker.phase == "lost" => Stand::Gone,
        Some(worker) if !worker.run.is_empty() => Stand::In(&worker.run),
        Some(worker) => Stand::Out(worker),
        None => Stand::Gone,
    }
}

/// `supra drain`.
///
/// # Errors
/// An unreachable coordinator, an unknown worker, or one that was lost before it was out.
pub async fn run(command: Drain) -> Result<Exit, Failure> {
    let (name, as_json) = (&command.worker, command.json.json);
    let mut client = command.connect.client().await?;
    let mut workers = client.drain(name).await?;
    let attached = |worker: &&WorkerStatus| worker.name == *name && worker.phase != "lost";
    let instance = workers
        .iter()
        .find(attached)
        .map(|worker| worker.instance.clone());
    let mut said = false;
    loop {
        match stand(&workers, instance.as_deref().unwrap_or_default()) {
            Stand::Out(worker) => {
                if as_json {
                    out::json(&json::Worker::from(worker))?;
                } else {
                    out::line(&format!(
                        "Worker {name} is out: no generation takes it. Restart it to have it back."
                    ))?;
                }
                return Ok(Exit::Done);
            }
            Stand::Gone => {
                return Err(Failure::failed(format!(
                    "worker {name} was lost before it was out. `supra status` shows whether steps are trained again."
                )));
            }
            Stand::In(run) => {
                if !said && !as_json {
                    out::line(&format!("Worker {name} finishes its step of run {run}."))?;
                }
                said = true;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => workers = client.workers().await?,
            _ = tokio::signal::ctrl_c() => {
                out::complain(&format!("Worker {name} is still to leave. `supra workers` shows when it has."));
                return Ok(Exit::Interrupted);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(instance: &str, phase: &str, run: &str) -> WorkerStatus {
        WorkerStatus {
            instance: instance.to_owned(),
            phase: phase.to_owned(),
            run: run.to_owned(),
            ..WorkerStatus::default()
        }
    }

    #[test]
    fn a_worker_is_out_when_it_is_attached_without_a_place() {
        let training = [worker("x", "idle", ""), worker("i", "training", "r1")];
        assert_eq!(stand(&training, "i"), Stand::In("r1"));
        let idle = [worker("i", "idle", "")];
        assert_eq!(stand(&idle, "i"), Stand::Out(&idle[0]));
    }

    #[test]
    fn a_lost_worker_and_one_with_another_supervisor_are_gone() {
        assert_eq!(stand(&[worker("i", "lost", "")], "i"), Stand::Gone);
        assert_eq!(stand(&[worker("j", "idle", "")], "i"), Stand::Gone);
    }
}
