//! `supra-worker serve` as a process on this machine.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{Failure, Result};
use crate::http::{self, Events};
use crate::process::{POLL, Process};
use crate::programs::Programs;

/// How long a model may take to load.
const LOADING: Duration = Duration::from_secs(300);
/// Where completions are.
pub const COMPLETIONS: &str = "/v1/completions";

/// A server that answers.
pub struct Server {
    /// The process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    /// Starts a server, with its log in `directory`, and waits until it is ready.
    pub fn start(
        programs: &Programs,
        directory: &Path,
        model: &Path,
        options: &[&str],
    ) -> Result<Server> {
        let mut command = programs.worker();
        command.arg("serve").arg("--model").arg(model);
        command.args(["--listen", "127.0.0.1:0"]).args(options);
        // Of its own, so that nothing in it is another server's.
        let log = tempfile::tempdir_in(directory)?.keep();
        let process = Process::spawn("serve", command, &log)?;
        let mut server = Server {
            process,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        };
        let deadline = Instant::now() + LOADING;
        while !server.said("ready: ") {
            let ended = server.process.ended()?.is_some();
            if ended || Instant::now() > deadline {
                let output = server.process.output();
                return Err(Failure::new(format!("the server is not ready:\n{output}")));
            }
            sleep(POLL);
        }
        let output = server.process.output();
        let address = output
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("listening on http://"));
        let address = address.ok_or_else(|| Failure::new(format!("no address: {output}")))?;
        server.address = address.parse()?;
        Ok(server)
    }

    fn said(&self, beginning: &str) -> bool {
        let output = self.process.output();
        output.lines().any(|line| line.starts_with(beginning))
    }

    /// Completions of a request.
    pub fn complete(&self, request: &Value) -> Result<Value> {
        http::post(self.address, COMPLETIONS, request)?.ok()
    }

    /// The pieces of completions.
    pub fn stream(&self, request: &Value) -> Result<Events> {
        Events::post(self.address, COMPLETIONS, request)
    }

    /// What `/metrics` says, by name and labels.
    pub fn metrics(&self) -> Result<BTreeMap<String, f64>> {
        let page = http::get(self.address, "/metrics")?;
        let lines = page.body.lines().filter(|line| !line.starts_with('#'));
        let numbers = lines.filter_map(|line| {
            let (name, number) = line.rsplit_once(' ')?;
            Some((name.to_owned(), number.parse().ok()?))
        });
        Ok(numbers.collect())
    }

    /// One number of `/metrics`; 0 if it does not say it.
    pub fn metric(&self, name: &str) -> Result<f64> {
        Ok(self.metrics()?.get(name).copied().unwrap_or(0.0))
    }

    /// Waits until a number of `/metrics` is what it has to be.
    pub fn wait_metric(&self, name: &str, wanted: f64, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let found = self.metric(name)?;
            if found == wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Failure::new(format!("{name} is {found}, not {wanted}")));
            }
            sleep(POLL);
        }
    }

    /// Fails unless nothing is under way and every slot is free for the next request.
    pub fn expect_idle(&self, slots: u32, limit: Duration) -> Result<()> {
        self.wait_metric("supra_requests_under_way", 0.0, limit)?;
        self.wait_metric("supra_completions_waiting", 0.0, limit)?;
        self.wait_metric(r#"supra_slots{state="busy"}"#, 0.0, limit)?;
        let metrics = self.metrics()?;
        let slot = |state| {
            metrics
                .get(&format!("supra_slots{{state=\"{state}\"}}"))
                .copied()
        };
        let all = slot("free").unwrap_or(0.0) + slot("prefix").unwrap_or(0.0);
        match all == f64::from(slots) {
            true => Ok(()),
            false => Err(Failure::new(format!("{all} of {slots} slots are free"))),
        }
    }

    /// Memory of the process, bytes.
    pub fn resident(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        let kib = kib.ok_or_else(|| Failure::new("no VmRSS: the server has ended"))?;
        Ok(kib * 1024)
    }
}
