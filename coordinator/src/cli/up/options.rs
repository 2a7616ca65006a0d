//! What `supra up` can be told, and what follows from it for the programs that it starts.

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use supra_recipes::Recipe;

use crate::cli::failure::Failure;
use crate::cli::format;
use crate::cli::runs::Json;

/// Arguments of `supra up`.
#[derive(Args, Debug)]
pub struct Up {
    /// Recipe to train (YAML). When the newest run of the state directory has the same recipe, it
    /// goes on, and is left alone if it is finished; otherwise a new run begins. Without a recipe,
    /// coordinator and workers serve until Ctrl-C
    #[arg(value_name = "RECIPE")]
    pub(super) recipe: Option<PathBuf>,
    /// Worker processes to start
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) workers: u32,
    /// Where workers compute; with cuda, worker i takes GPU i
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// State directory: journal, checkpoints, logs; made when absent
    #[arg(long, value_name = "DIR", default_value = "supra-state")]
    pub(super) state: PathBuf,
    /// Loopback address and port to listen on; port 0 takes a free one, and DIR/address names it
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Threads that each worker computes with [default: cores / workers, at least 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    threads: Option<u32>,
    /// Begin a new run even if the newest one could go on
    #[arg(long, requires = "recipe")]
    pub(super) new: bool,
    #[command(flatten)]
    pub(super) json: Json,
}

/// Where workers compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

impl Device {
    fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
        }
    }
}

/// Checks what clap cannot.
///
/// # Errors
/// An address that other machines reach.
pub(super) fn check(command: &Up) -> Result<(), Failure> {
    if command.listen.ip().is_loopback() {
        return Ok(());
    }
    Err(Failure::input(format!(
        "`supra up` serves this machine only and listens on a loopback address, not on {}. To let workers of other \
         machines in, start `supra-coordinator run` and `supra-worker run` by themselves.",
        command.listen
    )))
}

/// Checks that the recipe's generations can form.
///
/// # Errors
/// Fewer workers than the recipe needs.
pub(super) fn check_workers(command: &Up, recipe: &Recipe) -> Result<(), Failure> {
    let needed = recipe.workers.min;
    if command.workers >= needed {
        return Ok(());
    }
    Err(Failure::input(format!(
        "the recipe needs at least {needed} workers (workers.min) and --workers is {}: it would wait for ever. Give \
         --workers {needed}, or lower workers.min.",
        command.workers
    )))
}

impl Up {
    /// The command that goes on with this run.
    pub(super) fn again(&self) -> String {
        let program = std::env::args()
            .next()
            .unwrap_or_else(|| "supra".to_owned());
        format!("{} up {}", quoted(&program), self.again_arguments())
    }

    fn again_arguments(&self) -> String {
        let mut words: Vec<String> = Vec::new();
        words.extend(
            self.recipe
                .as_ref()
                .map(|recipe| quoted(&recipe.display().to_string())),
        );
        words.push(format!("--workers {}", self.workers));
        words.push(format!("--device {}", self.device.name()));
        words.extend(self.threads.map(|threads| format!("--threads {threads}")));
        words.push(format!(
            "--state {}",
            quoted(&self.state.display().to_string())
        ));
        words.join(" ")
    }

    /// `2 workers on cpu with 1 thread each`.
    pub(super) fn what_starts(&self) -> String {
        let workers = format::counted(u64::from(self.workers), "worker");
        let threads = format::counted(u64::from(self.threads_each()), "thread");
        format!("{workers} on {} with {threads} each", self.device.name())
    }

    /// Arguments of `supra-coordinator`.
    pub(super) fn coordinator_arguments(&self) -> Vec<String> {
        let state = self.state.display().to_string();
        [
            "run",
            "--listen",
            &self.listen.to_string(),
            "--state",
            &state,
        ]
        .map(str::to_owned)
        .into()
    }

    /// Arguments of the worker of this number.
    pub(super) fn worker_arguments(&self, number: u32, url: &str) -> Vec<String> {
        let device = match self.device {
            Device::Cpu => "cpu".to_owned(),
            Device::Cuda => format!("cuda:{number}"),
        };
        let (name, threads) = (format!("worker-{number}"), self.threads_each().to_string());
        [
            "run",
            "--coordinator",
            url,
            "--name",
            &name,
            "--device",
            &device,
            "--threads",
            &threads,
        ]
        .map(str::to_owned)
        .into()
    }

    fn threads_each(&self) -> u32 {
        self.threads.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
            u32::try_from(cores)
                .unwrap_or(u32::MAX)
                .div_euclid(self.workers)
                .max(1)
        })
    }
}

/// `text` as one word of a shell command.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        up: Up,
    }

    fn parse(words: &[&str]) -> Up {
        Line::parse_from([&["up"], words].concat()).up
    }

    #[test]
    fn the_command_to_go_on_is_a_shell_command() {
        let up = parse(&["my recipe.yaml", "--workers", "2", "--state", "/s", "--new"]);
        let words = "'my recipe.yaml' --workers 2 --device cpu --state /s";
        assert_eq!(up.again_arguments(), words);
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }

    #[test]
    fn each_worker_has_its_gpu_and_its_name() {
        let up = parse(&["--workers", "2", "--device", "cuda", "--threads", "3"]);
        let arguments = up.worker_arguments(1, "http://127.0.0.1:1").join(" ");
        assert_eq!(
            arguments,
            "run --coordinator http://127.0.0.1:1 --name worker-1 --device cuda:1 --threads 3"
        );
    }

    #[test]
    fn other_machines_are_not_served() {
        let error = check(&parse(&["--listen", "0.0.0.0:7070"]))
            .unwrap_err()
            .to_string();
        assert!(error.contains("supra-coordinator run"), "{error}");
        assert!(check(&parse(&["--listen", "[::1]:0"])).is_ok());
    }
}
