//! Real optimizer steps of a model with 7.81 B parameters, from random weights, by coordinator and worker on one GPU.
//!
//! The run ends like every run, with a checkpoint: 94 GB below the directory for temporary files (`TMPDIR`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;
use supra_proto::v1::{RunState, StepMetrics};

use crate::cluster::{COMMAND_LIMIT, Cluster, Device};
use crate::failure::{Failure, Result, While};
use crate::models::{Shape, Text, quickstart};
use crate::process;
use crate::programs::Programs;
use crate::report::{Row, rounded, table};

/// What the report says above its table.
pub const ABOUT: &str = "Optimizer steps of Mistral-7B-SUPRA (7.81 B parameters, bf16, fp32 masters, moments and gradients) from random \
    weights by `supra-coordinator` and one `supra-worker`, on the quickstart's text, from submission to the last checkpoint and the \
    ledger's audit. `exposed_comm_ms` is what the worker waits for other ranks, here for nobody. `peak_gb` is what the GPU's driver \
    counts as used at the end, when libtorch has given nothing back; `planned_gb` is what `supra plan` says. The campaign fails if a step is skipped, if the loss does not fall, if the audit disagrees, or if memory and \
    plan differ by more than 5 %.";

/// Largest difference between planned and used memory, relative to what is used.
const PLAN_ERROR: f64 = 0.05;
/// Least fall of the loss, in nats per token: the text has 2048 of the model's 32000 tokens, which a model that learns
/// anything finds out.
const FALL: f64 = 1.0;
const LOOK: Duration = Duration::from_millis(500);
/// From submission to the end.
const LIMIT: Duration = Duration::from_secs(535);

/// The campaign.
#[derive(Clone, Copy, Debug)]
pub struct Big {
    /// A small model in place of the large one.
    pub quick: bool,
    /// Where it is trained.
    pub device: Device,
}

impl Big {
    /// Trains.
    ///
    /// # Errors
    /// When the run does not finish, its loss does not fall, its audit disagrees, or its memory was planned wrongly.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let text = Text::tokenize(programs, &quickstart("text"), directory)?;
        let recipe = directory.join("big.yaml");
        fs::write(&recipe, self.recipe(&text, directory)?)?;
        let cluster = Cluster::on(self.device, programs, &directory.join("cluster"), 1)?;
        let planned = planned(programs, &recipe)?;

        let run = cluster.submit(&recipe)?;
        let steps = follow(&cluster, &run)?;
        cluster.audit(&run)?;
        let memory = Used::of(&cluster.log_lines(&run)?, &planned)?;
        let before = [0].into_iter().chain(steps.iter().map(|step| step.tokens));
        let rows: Vec<Row> = steps
            .iter()
            .zip(before)
            .map(|(step, before)| row(step, before, &memory))
            .collect();
        memory
            .expect_planned()
            .and_then(|()| expect_learning(&steps))
            .while_doing(table(&rows))?;
        Ok(rows)
    }

    fn recipe(&self, text: &Text, directory: &Path) -> Result<String> {
        // Two samples at once leave room to keep all but elementwise work, and some more for surprises.
        let (base, batch, length, lr) = if self.quick {
            let shape = directory.join("shape");
            Shape::TINY.write(&shape)?;
            let base = format!("{{ path: {}, weights: random }}", shape.display());
            (base, 4096, 128, "1e-2")
        } else {
            ("{ random: mistral-7b }".to_owned(), 131_072, 2048, "3e-4")
        };
        let budget = 20 * batch;
        Ok(format!(
            "name: big\n\
             base: {base}\n\
             data: {{ train: {data}, repeat: true }}\n\
             budget: {{ tokens: {budget} }}\n\
             batch: {{ tokens: {batch}, micro_batch: 2, sequence_length: {length}, activations: lean }}\n\
             optimizer: {{ lr: {lr}, final_lr: 1e-5, warmup: 5 steps }}\n\
             checkpoint: {{ every_tokens: {budget}, keep: 1 }}\n\
             workers: {{ min: 1, max: 1 }}\n",
            data = text.train.display(),
        ))
    }
}

/// Planned bytes by policy.
fn planned(programs: &Programs, recipe: &Path) -> Result<BTreeMap<String, u64>> {
    let mut command = programs.supra();
    command.arg("plan").arg(recipe).arg("--json");
    let output = process::run(command, COMMAND_LIMIT)?.expect_code(0)?;
    let plan: Value = serde_json::from_str(&output.stdout)?;
    let plans = plan["needs"]["memory_per_rank"]
        .as_array()
        .ok_or_else(|| Failure::new(format!("no `needs.memory_per_rank` in {plan}")))?;
    let entry = |plan: &Value| {
        let policy = plan["policy"].as_str()?.to_owned();
        Some((policy, plan["bytes"].as_u64()?))
    };
    plans
        .iter()
        .map(|plan| {
            entry(plan).ok_or_else(|| Failure::new(format!("no `policy` and `bytes` in {plan}")))
        })
        .collect()
}

/// Waits for the end and shows each step as it comes: what a later failure would lose is on the screen.
fn follow(cluster: &Cluster, run: &str) -> Result<Vec<StepMetrics>> {
    let clock = Instant::now();
    let mut shown = 0;
    loop {
        let status = cluster.status(run)?;
        let steps = cluster.metrics(run)?;
        for step in &steps[shown..] {
            println!(
                "{:6.1} s: step {}, loss {:.4}, {:.2} s",
                clock.elapsed().as_secs_f64(),
                step.step,
                step.loss,
                step.seconds
            );
        }
        shown = steps.len();
        match status.state() {
            RunState::Finished => {
                println!("{:6.1} s: finished", clock.elapsed().as_secs_f64());
                return cluster.metrics(run);
            }
            RunState::Failed => {
                let (reason, logs) = (status.reason, cluster.logs());
                return Err(Failure::new(format!("the run failed: {reason}\n{logs}")));
            }
            _ if clock.elapsed() > LIMIT => {
                let logs = cluster.logs();
                return Err(Failure::new(format!("no end after {LIMIT:?}\n{logs}")));
            }
            _ => sleep(LOOK),
        }
    }
}

/// Memory of the GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Used {
    /// None on a processor.
    peak: Option<u64>,
    planned: u64,
}

impl Used {
    /// From what the worker said about its policy and its memory.
    fn of(lines: &[String], planned: &BTreeMap<String, u64>) -> Result<Used> {
        let word = |prefix: &str| {
            let rest = lines.iter().find_map(|line| line.strip_prefix(prefix));
            rest.and_then(|rest| rest.split_whitespace().next())
        };
        let policy = word("activations: ")
            .ok_or_else(|| Failure::new("the worker did not say which activations it keeps"))?;
        let planned = planned
            .get(policy)
            .ok_or_else(|| Failure::new(format!("no plan for activations: {policy}")))?;
        Ok(Used {
            peak: word("memory of the GPU in use: ")
                .map(str::parse)
                .transpose()
                .while_doing("reading the worker's memory")?,
            planned: *planned,
        })
    }

    fn expect_planned(self) -> Result<()> {
        let Some(peak) = self.peak else {
            return Ok(());
        };
        let error = (self.planned as f64 - peak as f64) / peak as f64;
        println!("{peak} bytes in use, {} planned: {error:+.4}", self.planned);
        if error.abs() > PLAN_ERROR {
            return Err(Failure::new(format!(
                "the plan is off by {error:+.3} of the memory in use, {PLAN_ERROR} is allowed"
            )));
        }
        Ok(())
    }
}

fn row(step: &StepMetrics, before: u64, memory: &Used) -> Row {
    let tokens_per_second = (step.tokens - before) as f64 / step.seconds;
    let gb = |bytes: u64| rounded(bytes as f64 / 1e9, 1);
    Row::new()
        .with("step", step.step)
        .with("tokens", step.tokens)
        .with("loss", rounded(step.loss, 4))
        .with("grad_norm", rounded(step.grad_norm, 3))
        .with("seconds", rounded(step.seconds, 3))
        .with("tok_s", tokens_per_second.round())
        .with("exposed_comm_ms", rounded(step.exposed_comm_ms, 2))
        .with("data_wait_ms", rounded(step.data_seconds * 1e3, 2))
        .with("peak_gb", memory.peak.map(gb))
        .with("planned_gb", memory.peak.map(|_| gb(memory.planned)))
}

fn expect_learning(steps: &[StepMetrics]) -> Result<()> {
    if let Some(step) = steps.iter().find(|step| step.skipped) {
        return Err(Failure::new(format!("step {} was skipped", step.step)));
    }
    match (steps.first(), steps.last()) {
        (Some(first), Some(last)) if last.loss < first.loss - FALL => Ok(()),
        _ => Err(Failure::new(format!(
            "the loss did not fall by {FALL}: {:?}",
            steps.iter().map(|step| step.loss).collect::<Vec<_>>()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_compared_with_the_plan_of_the_chosen_policy() {
        let planned = [("lean".to_owned(), 900), ("recompute".to_owned(), 100)].into();
        let lines = [
            "activations: recompute (training takes 1 GiB): why",
            "memory of the GPU in use: 103 bytes, 0.0 GiB",
        ];
        let used = |lines: &[&str]| {
            let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
            Used::of(&lines, &planned)
        };
        let memory = used(&lines).unwrap();
        assert_eq!((memory.peak, memory.planned), (Some(103), 100));
        memory.expect_planned().unwrap();
        let more = Used {
            peak: Some(106),
            ..memory
        };
        more.expect_planned().unwrap_err();
        assert_eq!(used(&lines[..1]).unwrap().peak, None);
        used(&lines[1..]).unwrap_err();
    }
}
