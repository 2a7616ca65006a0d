//! Load from `hey`, a load generator that nobody here wrote.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use super::abuse::Tally;
use super::outcomes;
use crate::failure::{Failure, Result, While};
use crate::process::run;
use crate::report::{Row, rounded};
use crate::server::{COMPLETIONS, Server};

/// For all requests of a row.
const LIMIT: Duration = Duration::from_secs(1800);

/// So many clients, each of which sends completions one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Clients side by side.
    pub clients: usize,
    /// Requests of each.
    pub rounds: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// New tokens of each completion.
    pub tokens: usize,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Seconds of whole completions, in order.
    latencies: Vec<f64>,
    /// From the first request to the last answer.
    seconds: f64,
    /// New tokens.
    tokens: f64,
    /// Buckets of the time to the first token: upper bound, and how many are below it.
    first_token: Vec<(f64, f64)>,
    statuses: Tally,
}

impl Load {
    /// Sends everything, twice: what comes first warms the server up and is not counted.
    pub fn run(&self, server: &Server, directory: &Path) -> Result<Measured> {
        self.send(server, directory, 1)?;
        let before = server.metrics()?;
        let csv = self.send(server, directory, self.rounds)?;
        let after = server.metrics()?;
        let measured = Measured::read(&csv, &before, &after)?;
        let all = self.clients * self.rounds;
        match measured.statuses.get("200") {
            Some(&good) if good as usize == all => Ok(measured),
            _ => Err(Failure::new(format!(
                "not all of {all} are well: {:?}",
                measured.statuses
            ))),
        }
    }

    fn send(&self, server: &Server, directory: &Path, rounds: usize) -> Result<String> {
        let body = directory.join("completion.json");
        let prompt: Vec<usize> = (0..self.prompt).map(|at| 5 + at * 7 % 500).collect();
        let request =
            json!({ "prompt": prompt, "max_tokens": self.tokens, "temperature": 1, "echo": false });
        std::fs::write(&body, request.to_string())?;
        let mut hey = Command::new("hey");
        hey.args([
            "-n",
            &(self.clients * rounds).to_string(),
            "-c",
            &self.clients.to_string(),
        ]);
        hey.args([
            "-t",
            "0",
            "-m",
            "POST",
            "-T",
            "application/json",
            "-o",
            "csv",
            "-D",
        ])
        .arg(&body);
        hey.arg(format!("http://{}{COMPLETIONS}", server.address));
        let output = run(hey, LIMIT).while_doing(
            "running the load generator `hey` (apt-get install hey, or go install github.com/rakyll/hey@latest)",
        )?;
        Ok(output.expect_code(0)?.stdout)
    }
}

impl Measured {
    fn read(
        csv: &str,
        before: &BTreeMap<String, f64>,
        after: &BTreeMap<String, f64>,
    ) -> Result<Measured> {
        let mut statuses = Tally::new();
        let (mut latencies, mut seconds) = (Vec::new(), 0.0_f64);
        for line in csv.lines().skip(1) {
            let cells: Vec<&str> = line.split(',').collect();
            let [latency, .., status, offset] = cells[..] else {
                return Err(Failure::new(format!("hey says {line:?}")));
            };
            let (latency, offset): (f64, f64) = (latency.parse()?, offset.parse()?);
            *statuses.entry(status.to_owned()).or_default() += 1;
            seconds = seconds.max(offset + latency);
            latencies.push(latency);
        }
        latencies.sort_by(f64::total_cmp);
        let grown = |name: &str| after.get(name).unwrap_or(&0.0) - before.get(name).unwrap_or(&0.0);
        let bucket = |name: &String| {
            let bound = name.strip_prefix("supra_time_to_first_token_seconds_bucket{le=\"")?;
            let bound = bound.strip_suffix("\"}")?;
            let bound = if bound == "+Inf" {
                f64::INFINITY
            } else {
                bound.parse().ok()?
            };
            Some((bound, grown(name)))
        };
        let mut first_token: Vec<(f64, f64)> = after.keys().filter_map(bucket).collect();
        first_token.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(Measured {
            latencies,
            seconds,
            tokens: grown("supra_completion_tokens_total"),
            first_token,
            statuses,
        })
    }

    /// A latency that so large a share does not exceed, milliseconds.
    fn latency(&self, share: f64) -> f64 {
        let at = (self.latencies.len() as f64 * share).ceil() as usize;
        let latency = self.latencies.get(at.saturating_sub(1));
        rounded(latency.map_or(f64::NAN, |seconds| seconds * 1e3), 1)
    }

    /// The same of the time to the first token.
    fn first(&self, share: f64) -> f64 {
        let wanted = self.first_token.last().map_or(0.0, |(_, all)| all * share);
        let (mut from, mut below) = (0.0, 0.0);
        for &(until, count) in &self.first_token {
            if count >= wanted && count > below {
                let until = if until.is_finite() { until } else { from };
                return rounded(
                    (from + (until - from) * (wanted - below) / (count - below)) * 1e3,
                    1,
                );
            }
            (from, below) = (until, count);
        }
        f64::NAN
    }

    /// A line of the report, without the server's memory.
    pub fn row(&self, load: &Load) -> Row {
        Row::new()
            .with("what", "load")
            .with("clients", load.clients)
            .with("requests", self.latencies.len())
            .with("prompt_tokens", load.prompt)
            .with("new_tokens", load.tokens)
            .with(
                "requests_s",
                rounded(self.latencies.len() as f64 / self.seconds, 2),
            )
            .with("tokens_s", rounded(self.tokens / self.seconds, 1))
            .with("p50_ms", self.latency(0.5))
            .with("p99_ms", self.latency(0.99))
            .with("first_token_p50_ms", self.first(0.5))
            .with("first_token_p99_ms", self.first(0.99))
            .with("outcomes", outcomes(&self.statuses))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_hey_and_the_server_say() -> Result<()> {
        let csv = "response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset\n\
                   0.5000,0.0,0.0,0.0,0.0,0.0,200,0.0\n0.1000,0.0,0.0,0.0,0.0,0.0,200,0.9\n";
        let name = |le: &str| format!("supra_time_to_first_token_seconds_bucket{{le=\"{le}\"}}");
        let before = BTreeMap::from([(name("0.1"), 1.0), (name("0.2"), 1.0), (name("+Inf"), 1.0)]);
        let after = BTreeMap::from([(name("0.1"), 1.0), (name("0.2"), 3.0), (name("+Inf"), 3.0)]);
        let measured = Measured::read(csv, &before, &after)?;
        assert_eq!(
            (
                measured.latency(0.5),
                measured.latency(0.99),
                measured.seconds
            ),
            (100.0, 500.0, 1.0)
        );
        assert_eq!(measured.first(0.5), 150.0);
        Ok(())
    }
}
