//! What the coordinator answers, as text for people.

use std::io::IsTerminal;

use supra_proto::v1::{self, LogEntry, RunStatus, WorkerStatus};

use super::format::{self, Table};
use super::{json, progress};
use crate::gates::{Gates, Layer};
use crate::goodput::Goodput;

/// Everything about a run, a fact a line.
pub fn facts(status: &RunStatus) -> String {
    let mut table = Table::new(&["", ""]);
    let mut fact = |name: &str, value: String| table.row([name.to_owned(), value]);
    fact("run", format!("{} ({})", status.run, status.name));
    let state = json::state_name(status.state());
    fact(
        "state",
        if status.reason.is_empty() {
            state.to_owned()
        } else {
            format!("{state}: {}", status.reason)
        },
    );
    fact("submitted", format::moment(status.submitted_unix_ms));
    if status.ended_unix_ms > 0 {
        fact("ended", format::moment(status.ended_unix_ms));
    }
    let share = 100.0 * status.tokens as f64 / status.budget_tokens.max(1) as f64;
    let (tokens, budget) = (
        format::grouped(status.tokens),
        format::grouped(status.budget_tokens),
    );
    fact("tokens", format!("{tokens} of {budget} ({share:.1} %)"));
    let of = if status.steps > 0 {
        format!(" of {}", format::grouped(status.steps))
    } else {
        String::new()
    };
    let skipped = match status.skipped_steps {
        0 => String::new(),
        skipped => format!(", {} skipped", format::grouped(skipped)),
    };
    fact(
        "step",
        format!("{}{of}{skipped}", format::grouped(status.step)),
    );
    if status.step > 0 {
        fact("loss", format::metric(status.loss));
        fact("gradient norm", format::metric(status.grad_norm));
        fact("learning rate", format::learning_rate(status.learning_rate));
    }
    if let Some(evaluation) = &status.evaluation {
        fact("held-out loss", heldout(evaluation));
    }
    if let Some(forecast) = &status.forecast {
        fact("forecast", foretold(forecast));
    }
    if let Some(gates) = &status.gates {
        fact("gates", gates_line(&gates.clone().into()));
    }
    for warning in &status.gate_warnings {
        fact("WARNING", warning.clone());
    }
    if !progress::ended(status) {
        fact("speed", format::rate(status.tokens_per_second));
        fact("time left", format::duration(status.eta_seconds));
        if status.step > 0 && status.world > 1 {
            let exposed = format!("{:.1} ms of the last step exposed", status.exposed_comm_ms);
            fact("communication", exposed);
        }
        fact(
            "workers",
            format!("{} in generation {}", status.world, status.generation),
        );
    }
    if let Some(text) = status.goodput.as_ref().and_then(goodput) {
        fact("goodput", text);
    }
    if let Some(checkpoint) = &status.checkpoint {
        let (step, size) = (
            format::grouped(checkpoint.step),
            format::bytes(checkpoint.bytes),
        );
        fact(
            "checkpoint",
            format!("step {step}, {size}, {}", checkpoint.path),
        );
    }
    for damaged in &status.damaged {
        let step = format::grouped(damaged.step);
        fact(
            "DAMAGED",
            format!("checkpoint of step {step}: {}", damaged.damaged),
        );
    }
    if let Some(interval) = &status.checkpoint_interval {
        let every = format::duration(interval.seconds);
        fact("interval", format!("{every}: {}", interval.reason));
    }
    if let Some(chaos) = &status.chaos {
        fact("chaos", chaos.text.clone());
    }
    if status.ledger_head.iter().any(|&byte| byte != 0) {
        fact("ledger head", format::hex(&status.ledger_head));
    }
    table.render()
}

/// `2.3456, perplexity 10.44, behind step 1,200`
fn heldout(evaluation: &v1::Evaluation) -> String {
    format!(
        "{}, perplexity {:.2}, behind step {}",
        format::metric(evaluation.loss),
        evaluation.loss.exp(),
        format::grouped(evaluation.step)
    )
}

/// `2.21 at the end of the budget (2.18 to 2.24), short of the target 2.1`
fn foretold(forecast: &v1::Forecast) -> String {
    let verdict = match forecast.target {
        Some(target) if forecast.missed => format!("; it will not reach the target {target}"),
        Some(target) => format!("; the target is {target}"),
        None => String::new(),
    };
    format!(
        "held-out loss {:.4} at the end of the budget ({:.4} to {:.4}){verdict}",
        forecast.loss, forecast.low, forecast.high
    )
}

/// `step 400: forms differ by 1.2e-6, dead features at most 1.0 %, head norms read at most 1.3 times what they did, drift at
/// most 0.41`
fn gates_line(gates: &Gates) -> String {
    let worst = |of: fn(&Layer) -> f64| gates.worst(of).map_or(0.0, |(_, value)| value);
    let dead = worst(|layer| layer.dead_queries.max(layer.dead_keys));
    let mut text = format!(
        "step {}: forms differ by {:.1e}, dead features at most {:.1} %, head norms read at most {:.1} times what they did",
        format::grouped(gates.step),
        gates.form_error,
        100.0 * dead,
        worst(Layer::growth)
    );
    if gates.layers.iter().any(|layer| layer.drift.is_some()) {
        let drift = worst(|layer| layer.drift.unwrap_or_default());
        text.push_str(&format!(", drift at most {drift:.2}"));
    }
    text
}

/// `93.1 %: productive 2 h 10 min, lost 5 s`, with every part of half a second or more; nothing before the run began.
fn goodput(parts: &v1::Goodput) -> Option<String> {
    let parts = Goodput::from(parts);
    let share = 100.0 * parts.share?;
    let named = [
        ("productive", parts.productive),
        ("data", parts.data),
        ("communication", parts.exposed_comm),
        ("checkpoints", parts.checkpoint),
        ("restoring", parts.restore),
        ("lost", parts.lost),
        ("forming", parts.forming),
        ("idle", parts.idle),
        ("evaluating", parts.evaluation),
    ];
    let spent = named
        .into_iter()
        .filter(|(name, seconds)| *seconds >= 0.5 || *name == "productive")
        .map(|(name, seconds)| format!("{name} {}", format::duration(seconds)));
    let spent: Vec<String> = spent.collect();
    Some(format!("{share:.1} %: {}", spent.join(", ")))
}

/// All runs, a line each.
pub fn runs(runs: &[RunStatus]) -> String {
    let mut table = Table::new(&[
        "RUN",
        "NAME",
        "STATE",
        ">STEP",
        ">TOKENS",
        ">DONE",
        ">LOSS",
        "SUBMITTED",
        "REASON",
    ]);
    for run in runs {
        let share = 100.0 * run.tokens as f64 / run.budget_tokens.max(1) as f64;
        table.row([
            run.run.clone(),
            run.name.clone(),
            json::state_name(run.state()).to_owned(),
            format::grouped(run.step),
            format::short(run.tokens as f64),
            format!("{share:.1} %"),
            if run.step > 0 {
                format::metric(run.loss)
            } else {
                "-".to_owned()
            },
            format::moment(run.submitted_unix_ms),
            run.reason.clone(),
        ]);
    }
    table.render()
}

/// All workers, a line each.
pub fn workers(workers: &[WorkerStatus]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "DEVICE",
        "PHASE",
        "RUN",
        ">RANK",
        ">STEP",
        ">SILENT",
        "DATA ADDRESS",
        ">PID",
        "ASIDE",
    ]);
    for worker in workers {
        let placed = !worker.run.is_empty();
        table.row([
            worker.name.clone(),
            worker.device.clone(),
            worker.phase.clone(),
            if placed {
                worker.run.clone()
            } else {
                "-".to_owned()
            },
            if placed {
                worker.rank.to_string()
            } else {
                "-".to_owned()
            },
            if placed {
                format::grouped(worker.step)
            } else {
                "-".to_owned()
            },
            format::duration(worker.silent_ms as f64 / 1000.0),
            worker.data_address.clone(),
            worker.pid.to_string(),
            worker.aside.clone(),
        ]);
    }
    let mut text = table.render();
    if workers.iter().any(|worker| !worker.aside.is_empty()) {
        text.push_str("Workers that are aside come back when they are restarted.\n");
    }
    text
}

/// `2026-11-23 20:02:59  WARN  worker-0: text`; warnings in colour on a terminal.
pub fn log_line(entry: &LogEntry) -> String {
    let plain = format!(
        "{}  {:5} {}: {}",
        format::moment(entry.unix_ms),
        entry.level,
        entry.source,
        entry.text
    );
    let colour = match entry.level.as_str() {
        "ERROR" => "\x1b[31m",
        "WARN" => "\x1b[33m",
        _ => return plain,
    };
    if std::io::stdout().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    {
        format!("{colour}{plain}\x1b[0m")
    } else {
        plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use supra_proto::v1::RunState;

    #[test]
    fn the_facts_of_a_training_run_read_well() {
        let status = RunStatus {
            run: "r1".to_owned(),
            name: "quickstart".to_owned(),
            state: RunState::Training as i32,
            step: 1200,
            steps: 4000,
            tokens: 1_228_800,
            budget_tokens: 4_096_000,
            loss: 3.25,
            grad_norm: 0.5,
            learning_rate: 2.5e-5,
            tokens_per_second: 2500.0,
            eta_seconds: 1147.0,
            exposed_comm_ms: 12.345,
            world: 2,
            generation: 3,
            skipped_steps: 1,
            evaluation: Some(v1::Evaluation {
                step: 1000,
                loss: 2.0,
                ..v1::Evaluation::default()
            }),
            forecast: Some(v1::Forecast {
                loss: 1.5,
                low: 1.4,
                high: 1.6,
                points: 7,
                target: Some(1.3),
                missed: true,
            }),
            gates: Some(v1::Gates {
                step: 800,
                form_error: 1.2e-6,
                layers: vec![v1::LayerGates {
                    drift: Some(0.41),
                    dead_keys: 0.01,
                    norm_input: 2.6,
                    norm_input_at_start: Some(2.0),
                    ..v1::LayerGates::default()
                }],
                ..v1::Gates::default()
            }),
            goodput: Some(v1::Goodput {
                productive: 475.0,
                checkpoint: 20.0,
                lost: 5.0,
                data: 0.2,
                idle: 60.0,
                ..v1::Goodput::default()
            }),
            ..RunStatus::default()
        };
        assert_eq!(
            facts(&status),
            "run            r1 (quickstart)\n\
             state          training\n\
             submitted      -\n\
             tokens         1,228,800 of 4,096,000 (30.0 %)\n\
             step           1,200 of 4,000, 1 skipped\n\
             loss           3.2500\n\
             gradient norm  0.5000\n\
             learning rate  2.5e-5\n\
             held-out loss  2.0000, perplexity 7.39, behind step 1,000\n\
             forecast       held-out loss 1.5000 at the end of the budget (1.4000 to 1.6000); it will not reach the target 1.3\n\
             gates          step 800: forms differ by 1.2e-6, dead features at most 1.0 %, head norms read at most 1.3 times what they did, drift at most 0.41\n\
             speed          2.5 k tok/s\n\
             time left      19 min 7 s\n\
             communication  12.3 ms of the last step exposed\n\
             workers        2 in generation 3\n\
             goodput        95.0 %: productive 7 min 55 s, checkpoints 20 s, lost 5 s, idle 1 min 0 s\n"
        );
    }

    #[test]
    fn log_lines_align_their_levels() {
        let entry = LogEntry {
            level: "INFO".to_owned(),
            source: "worker-0".to_owned(),
            text: "hello".to_owned(),
            ..LogEntry::default()
        };
        assert_eq!(log_line(&entry), "-  INFO  worker-0: hello");
    }
}
