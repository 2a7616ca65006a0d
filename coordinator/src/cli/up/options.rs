//! What `supra up` can be told, and what follows from it for the programs that it starts.

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;

use clap::Args;
use supra_recipes::Recipe;

use super::device::{Device, visible_gpus};
use crate::cli::failure::Failure;
use crate::cli::format;
use crate::cli::runs::{Json, Strict};

/// Arguments of `supra up`.
#[derive(Args, Debug)]
pub struct Up {
    /// Recipe to train (YAML). When the newest run of the state directory has the same recipe, it
    /// goes on, and is left alone if it is finished; otherwise a new run begins. Without a recipe,
    /// coordinator and workers serve until Ctrl-C
    #[arg(value_name = "RECIPE")]
    pub(super) recipe: Option<PathBuf>,
    /// Worker processes to start [default: one; with --device cuda, one for every visible GPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    workers: Option<u32>,
    /// Where workers compute: cpu; cuda, where worker i takes GPU i; or cuda:N, where all share GPU N, which is for
    /// tests and never fast
    #[arg(long, default_value_t = Device::Cpu, value_name = "DEVICE")]
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
    pub(super) strict: Strict,
    #[command(flatten)]
    pub(super) json: Json,
}

/// Checks what clap cannot.
///
/// # Errors
/// An address that other machines reach, or too few GPUs.
pub(super) fn check(command: &Up) -> Result<(), Failure> {
    if !command.listen.ip().is_loopback() {
        return Err(Failure::input(format!(
            "`supra up` serves this machine only and listens on a loopback address, not on {}. To let workers of other \
             machines in, start `supra-coordinator run` and `supra-worker run` by themselves.",
            command.listen
        )));
    }
    if command.strict.strict && command.recipe.is_none() {
        return Err(Failure::input(
            "--strict is about the run of a recipe: name one, or give --strict to `supra resume`.",
        ));
    }
    let (workers, gpus) = (command.workers(), visible_gpus());
    match command.device {
        Device::Cuda if gpus == 0 => Err(Failure::failed(
            "--device cuda: this machine shows no GPU to count. Check that `nvidia-smi` lists one and that \
             CUDA_VISIBLE_DEVICES does not hide it; name it with --device cuda:0, or give --device cpu.",
        )),
        Device::Cuda if workers > gpus => Err(Failure::input(format!(
            "--workers is {workers} and this machine shows {}. Give --workers {gpus} or fewer; for a test, several \
             workers may share a GPU with --device cuda:0.",
            format::counted(u64::from(gpus), "GPU")
        ))),
        _ => Ok(()),
    }
}

/// Checks that the recipe's generations can form.
///
/// # Errors
/// Fewer workers than the recipe needs.
pub(super) fn check_workers(command: &Up, recipe: &Recipe) -> Result<(), Failure> {
    let needed = recipe.workers.min;
    let workers = command.workers();
    if workers >= needed {
        return Ok(());
    }
    Err(Failure::input(format!(
        "the recipe needs at least {needed} workers (workers.min) and {workers} would start: it would wait for ever. \
         Give --workers {needed}, or lower workers.min."
    )))
}

impl Up {
    /// Worker processes to start.
    pub(super) fn workers(&self) -> u32 {
        self.workers.unwrap_or_else(|| match self.device {
            Device::Cuda => visible_gpus().max(1),
            Device::Cpu | Device::OneGpu(_) => 1,
        })
    }

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
        words.push(format!("--workers {}", self.workers()));
        words.push(format!("--device {}", self.device));
        words.extend(self.threads.map(|threads| format!("--threads {threads}")));
        words.push(format!(
            "--state {}",
            quoted(&self.state.display().to_string())
        ));
        words.join(" ")
    }

    /// `2 workers on cpu with 1 thread each`.
    pub(super) fn what_starts(&self) -> String {
        let workers = format::counted(u64::from(self.workers()), "worker");
        let threads = format::counted(u64::from(self.threads_each()), "thread");
        format!("{workers} on {} with {threads} each", self.device)
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
        let device = self.device.of_worker(number).to_string();
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

    /// Environment of the worker of this number. NCCL refuses two ranks of one host on one GPU; where they share one on
    /// purpose, each is a host of its own.
    pub(super) fn worker_environment(&self, number: u32) -> Option<(&'static str, String)> {
        let shared = matches!(self.device, Device::OneGpu(_)) && self.workers() > 1;
        shared.then(|| ("NCCL_HOSTID", format!("supra-worker-{number}")))
    }

    fn threads_each(&self) -> u32 {
        self.threads.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
            u32::try_from(cores)
                .unwrap_or(u32::MAX)
                .div_euclid(self.workers())
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
        assert_eq!(up.worker_environment(1), None);
    }

    #[test]
    fn workers_that_share_a_gpu_are_hosts_of_their_own() {
        let up = parse(&["--workers", "2", "--device", "cuda:1"]);
        let arguments = up.worker_arguments(0, "http://127.0.0.1:1").join(" ");
        assert!(arguments.contains("--device cuda:1 "), "{arguments}");
        let hosts = [0, 1].map(|number| up.worker_environment(number));
        assert!(hosts[0].is_some() && hosts[0] != hosts[1], "{hosts:?}");
        assert_eq!(parse(&["--device", "cuda:1"]).worker_environment(0), None);
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
