//! The server under load and under abuse.

pub mod abuse;
mod load;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cluster::Device;
use crate::failure::{Failure, Result};
use crate::models::{convert, quickstart};
use crate::programs::Programs;
use crate::report::{Row, rounded, table};
use crate::server::Server;

use abuse::{Abuse, Tally};
use load::Load;

/// What the report says above its table.
pub const ABOUT: &str = "`supra-worker serve` on the loopback. `load` rows: the load generator `hey` sends the same request again and again, each client one \
    after the other, and the server reads each prompt anew (`--no-prefix-reuse`); latency is that of whole completions as `hey` saw them, \
    `first_token` that from a request's arrival to its first token, by the server's own histogram (`/metrics`, interpolated \
    inside a bucket; buckets are 1.4 times as wide as the one before). `tokens_s` counts new tokens. The `abuse` row: generated \
    requests, malformed, oversized, truncated, slow or given up in the middle, from several clients side by side, and after it every \
    slot is free again and the server answers; `outcomes` are statuses, `closed` connections without an answer, and `left` clients that \
    did not wait for one. `rss_mb` is the server's memory after the row.";

/// Completions at once.
const SLOTS: u32 = 64;
/// For slots to come free.
const SOON: Duration = Duration::from_secs(60);
/// Memory that abuse may cost beyond what the server had before: buffers, and what the allocator keeps.
const GROWTH: f64 = 400.0;

/// The campaign.
#[derive(Clone, Debug)]
pub struct Serve {
    /// In small.
    pub quick: bool,
    /// What is served; if none, the quickstart's model as a network that nobody has trained.
    pub model: Option<PathBuf>,
    /// Where it is computed: on a GPU in bf16.
    pub device: Device,
}

impl Serve {
    /// Loads the server with 1, 8 and 64 clients, and abuses it.
    ///
    /// # Errors
    /// There is no load generator, a completion fails, the server breaks down, or a slot is lost.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let model = match &self.model {
            Some(model) => model.clone(),
            None => {
                let model = directory.join("supra");
                convert(programs, &quickstart("base"), &model)?;
                model
            }
        };
        let mut rows = self.load(programs, directory, &model)?;
        rows.push(self.abuse(programs, directory, &model)?);
        Ok(rows)
    }

    fn start(
        &self,
        programs: &Programs,
        directory: &Path,
        model: &Path,
        more: &[&str],
    ) -> Result<Server> {
        let device = self.device.of_worker(0, 1);
        let dtype = match self.device {
            Device::Cpu => "fp32",
            Device::Cuda => "bf16",
        };
        let mut options = vec!["--device", &device, "--dtype", dtype];
        options.extend(more);
        Server::start(programs, directory, model, &options)
    }

    fn load(&self, programs: &Programs, directory: &Path, model: &Path) -> Result<Vec<Row>> {
        let slots = SLOTS.to_string();
        let server = self.start(
            programs,
            directory,
            model,
            &["--slots", &slots, "--no-prefix-reuse"],
        )?;
        let loads = if self.quick {
            vec![
                Load {
                    clients: 1,
                    rounds: 4,
                    prompt: 32,
                    tokens: 8,
                },
                Load {
                    clients: 8,
                    rounds: 2,
                    prompt: 32,
                    tokens: 8,
                },
            ]
        } else {
            [(1, 24), (8, 12), (64, 4)]
                .map(|(clients, rounds)| Load {
                    clients,
                    rounds,
                    prompt: 512,
                    tokens: 128,
                })
                .to_vec()
        };
        let mut rows = Vec::new();
        for load in loads {
            let measured = load.run(&server, directory)?;
            server.expect_idle(SLOTS, SOON)?;
            let row = measured.row(&load).with("rss_mb", megabytes(&server)?);
            print!("{}", table(std::slice::from_ref(&row)));
            rows.push(row);
        }
        Ok(rows)
    }

    fn abuse(&self, programs: &Programs, directory: &Path, model: &Path) -> Result<Row> {
        let directory = directory.join("abuse");
        std::fs::create_dir_all(&directory)?;
        let limits = [
            "--slots",
            "8",
            "--queue",
            "8",
            "--stall-timeout",
            "1",
            "--max-body",
            "131072",
        ];
        let server = self.start(programs, &directory, model, &limits)?;
        let mut abuse = Abuse {
            requests: 200,
            clients: 16,
            seed: 1,
        };
        // What the server needs at all, it needs from its first requests on.
        abuse.run(&server)?;
        let before = megabytes(&server)?;
        abuse.requests = if self.quick { 200 } else { 10_000 };
        abuse.seed = 2;
        let clock = std::time::Instant::now();
        let tally = abuse.run(&server)?;
        let seconds = clock.elapsed().as_secs_f64();
        server.expect_idle(8, SOON)?;
        abuse::expect_answers(&server)?;
        let after = megabytes(&server)?;
        if after > before + GROWTH {
            return Err(Failure::new(format!(
                "the server's memory went from {before} MB to {after} MB"
            )));
        }
        Ok(Row::new()
            .with("what", "abuse")
            .with("clients", abuse.clients)
            .with("requests", abuse.requests)
            .with("prompt_tokens", "")
            .with("new_tokens", "")
            .with("requests_s", rounded(abuse.requests as f64 / seconds, 1))
            .with("tokens_s", "")
            .with("p50_ms", "")
            .with("p99_ms", "")
            .with("first_token_p50_ms", "")
            .with("first_token_p99_ms", "")
            .with("outcomes", outcomes(&tally))
            .with("rss_mb", after))
    }
}

fn outcomes(tally: &Tally) -> String {
    let each = tally
        .iter()
        .map(|(outcome, count)| format!("{outcome}: {count}"));
    each.collect::<Vec<_>>().join(", ")
}

fn megabytes(server: &Server) -> Result<f64> {
    Ok(rounded(server.resident()? as f64 / 1e6, 0))
}
