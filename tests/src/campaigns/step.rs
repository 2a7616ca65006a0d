//! The training step beside the best PyTorch known: forward and backward of one micro-batch at the shape of
//! Mistral-7B-SUPRA, each program in a process of its own, in turns, on one NVIDIA GPU.
//!
//! The peer is `tests/peer/step.py`: compiled blocks and flash-linear-attention's kernels. Before anything is timed, both
//! compute loss and gradient norm of a model of two blocks with the same weights and tokens, and must agree.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::failure::{Failure, Result, While};
use crate::process;
use crate::programs::{Programs, repository};
use crate::report::{Row, rounded, table};

/// What the report says above its table.
pub const ABOUT: &str = "Forward and backward of one micro-batch of Mistral-7B-SUPRA (7.81 B parameters, bf16) on one GPU, random \
    weights, fresh random tokens: `supra-worker bench step`, whose gradients always add up in fp32, beside `tests/peer/step.py`, \
    which is compiled PyTorch with flash-linear-attention's kernels, as it is (gradients in bf16) and with fp32 accumulation \
    (`main-grad`). `documents` is how many each sequence holds, in both, starts drawn at random. Processes run in turns, twice each; \
    a figure is the mean of the two medians of ten passes. `mfu` is of 989 TFLOP/s, nothing computed twice counted. `peak_gb` counts \
    everything the process holds, `peer_peak_gb` only what PyTorch's allocator handed out; `activations_gb` and \
    `peer_activations_gb` are the same without weights and gradients.";

/// What the report on other shapes says above its table.
pub const ABOUT_SHAPES: &str = "Forward and backward of one micro-batch of a model of 7B (bf16, random weights, fresh random tokens) on one \
    GPU: `supra-worker bench step` alone, a figure is the median of ten passes. Columns as on the page of `step`.";

/// Largest relative difference of loss and gradient norm to the peer's at two blocks.
const AGREEMENT: f64 = 0.01;
/// Compiling the peer takes minutes.
const LIMIT: Duration = Duration::from_secs(500);
const TURNS: usize = 2;

/// A micro-batch of a whole model, and what the peer does beside it.
#[derive(Clone, Copy, Debug)]
struct Contest {
    shape: &'static str,
    batch: u32,
    sequence_length: u32,
    documents: u32,
    policy: &'static str,
    peer: Peer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    /// Gradients in bf16.
    Plain,
    /// Gradients added in fp32, as ours always are.
    MainGrad,
    /// Does not run: our figure stands alone.
    Absent,
}

impl Peer {
    fn name(self) -> &'static str {
        match self {
            Peer::Plain => "compiled",
            Peer::MainGrad => "compiled, main-grad",
            Peer::Absent => "not run",
        }
    }

    /// Bytes per parameter of weights and gradients.
    fn bytes(self) -> f64 {
        match self {
            Peer::MainGrad => 6.0,
            _ => 4.0,
        }
    }
}

const MISTRAL: Contest = Contest {
    shape: "mistral-7b",
    batch: 4,
    sequence_length: 2048,
    documents: 1,
    policy: "save",
    peer: Peer::Plain,
};

/// Those that make the claim, the first of which is the quick one.
const CONTESTS: [Contest; 4] = [
    MISTRAL,
    Contest {
        policy: "lean",
        peer: Peer::MainGrad,
        ..MISTRAL
    },
    Contest {
        documents: 4,
        ..MISTRAL
    },
    Contest {
        documents: 4,
        policy: "lean",
        peer: Peer::MainGrad,
        ..MISTRAL
    },
];

const WITHOUT_PEER: Contest = Contest {
    peer: Peer::Absent,
    ..MISTRAL
};

/// Other shapes, without the peer.
const ALONE: [Contest; 5] = [
    Contest {
        batch: 2,
        ..WITHOUT_PEER
    },
    Contest {
        batch: 8,
        policy: "lean",
        ..WITHOUT_PEER
    },
    Contest {
        batch: 1,
        sequence_length: 8192,
        ..WITHOUT_PEER
    },
    Contest {
        batch: 1,
        sequence_length: 32768,
        policy: "recompute",
        ..WITHOUT_PEER
    },
    Contest {
        shape: "llama2-7b",
        ..WITHOUT_PEER
    },
];

/// Runs the comparison; the first contest only if `quick`. `keep` gets all rows so far after each: time on such machines is
/// short, and what was measured is not to be lost with it.
///
/// # Errors
/// When there is no GPU, the peer cannot run, or the two do not compute the same.
pub fn run(
    programs: &Programs,
    directory: &Path,
    quick: bool,
    keep: impl Fn(&[Row]) -> Result<()>,
) -> Result<Vec<Row>> {
    agree(programs, directory)?;
    each(&CONTESTS, programs, quick, keep)
}

/// Runs our step alone at other shapes; the first only if `quick`. `keep` as in [`run`].
///
/// # Errors
/// When there is no GPU, or not enough memory.
pub fn shapes(
    programs: &Programs,
    quick: bool,
    keep: impl Fn(&[Row]) -> Result<()>,
) -> Result<Vec<Row>> {
    each(&ALONE, programs, quick, keep)
}

fn each(
    contests: &[Contest],
    programs: &Programs,
    quick: bool,
    keep: impl Fn(&[Row]) -> Result<()>,
) -> Result<Vec<Row>> {
    let wanted = if quick { 1 } else { contests.len() };
    let mut rows = Vec::new();
    for contest in &contests[..wanted] {
        rows.push(contest.run(programs)?);
        if !quick {
            keep(&rows)?;
        }
    }
    Ok(rows)
}

/// Both programs on the same small model.
fn agree(programs: &Programs, directory: &Path) -> Result<()> {
    let export = directory.join("peer");
    let peer = peer(&[
        "--layers",
        "2",
        "--batch",
        "2",
        "--export",
        &export.to_string_lossy(),
    ])?;
    let mut command = programs.worker();
    command.args([
        "bench", "step", "--device", "cuda:0", "--json", "--passes", "1",
    ]);
    command.arg("--model").arg(&export);
    command
        .arg("--tokens")
        .arg(export.join("tokens.safetensors"));
    let ours = answer(command).while_doing("supra-worker bench step on the peer's model")?;
    for key in ["loss", "gradient_norm"] {
        let (ours, theirs) = (number(&ours, key)?, number(&peer, key)?);
        let difference = ((ours - theirs) / theirs).abs();
        if difference.is_nan() || difference > AGREEMENT {
            return Err(Failure::new(format!(
                "{key} of two blocks with the same weights: {ours} here, {theirs} with the peer"
            )));
        }
        println!("{key} of two blocks with the same weights: {ours} here, {theirs} with the peer");
    }
    Ok(())
}

impl Contest {
    fn run(&self, programs: &Programs) -> Result<Row> {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        if self.peer == Peer::Absent {
            ours.push(self.ours(programs)?);
        } else {
            for _ in 0..TURNS {
                theirs.push(self.peer()?);
                ours.push(self.ours(programs)?);
            }
        }
        let tok_s = mean(&ours, "tokens_per_second")?.unwrap_or(f64::NAN);
        let peer_tok_s = mean(&theirs, "tok_s")?;
        let peak_gb = mean(&ours, "peak_bytes")?.map(|bytes| bytes / 1e9);
        let peer_peak_gb = mean(&theirs, "peak_gb")?;
        let parameters = mean(&ours, "parameters")?.unwrap_or(f64::NAN) / 1e9;
        let activations =
            |gb: Option<f64>, bytes: f64| gb.map(|gb| rounded(gb - bytes * parameters, 1));
        let cut = |number: Option<f64>, digits| number.map(|number| rounded(number, digits));
        let row = Row::new()
            .with("shape", self.shape)
            .with("batch", self.batch)
            .with("seq", self.sequence_length)
            .with("documents", self.documents)
            .with("policy", self.policy)
            .with("peer_variant", self.peer.name())
            .with("tok_s", tok_s.round())
            .with("peer_tok_s", cut(peer_tok_s, 0))
            .with("ratio", cut(peer_tok_s.map(|peer| tok_s / peer), 3))
            .with("mfu", cut(mean(&ours, "model_flops_utilization")?, 3))
            .with("peer_mfu", cut(mean(&theirs, "mfu")?, 3))
            .with("peak_gb", cut(peak_gb, 1))
            .with("peer_peak_gb", cut(peer_peak_gb, 1))
            .with("activations_gb", activations(peak_gb, 6.0))
            .with(
                "peer_activations_gb",
                activations(peer_peak_gb, self.peer.bytes()),
            );
        // A long campaign is followed.
        print!("{}", table(std::slice::from_ref(&row)));
        Ok(row)
    }

    fn ours(&self, programs: &Programs) -> Result<Value> {
        let mut command = programs.worker();
        command.args([
            "bench",
            "step",
            "--device",
            "cuda:0",
            "--json",
            "--policy",
            self.policy,
        ]);
        command.args(["--shape", self.shape, "--batch", &self.batch.to_string()]);
        command.args(["--sequence-length", &self.sequence_length.to_string()]);
        command.args(["--documents", &self.documents.to_string()]);
        answer(command).while_doing("supra-worker bench step")
    }

    fn peer(&self) -> Result<Value> {
        let (batch, seq) = (self.batch.to_string(), self.sequence_length.to_string());
        let documents = if self.documents > 1 {
            self.documents
        } else {
            0
        }
        .to_string();
        let mut arguments = vec![
            "--only",
            "supra fla compiled",
            "--batch",
            &batch,
            "--seq",
            &seq,
        ];
        arguments.extend(["--docs", &documents]);
        if self.peer == Peer::MainGrad {
            arguments.push("--main-grad");
        }
        peer(&arguments)
    }
}

fn peer(arguments: &[&str]) -> Result<Value> {
    let mut command = Command::new("python3");
    command
        .arg(repository().join("tests/peer/step.py"))
        .args(arguments);
    let answer = answer(command).while_doing(
        "tests/peer/step.py, which needs torch, flash-linear-attention and liger-kernel",
    )?;
    match answer["error"].as_str() {
        Some(error) => Err(Failure::new(format!("tests/peer/step.py: {error}"))),
        None => Ok(answer),
    }
}

/// The JSON object on the last line of what a command prints.
fn answer(command: Command) -> Result<Value> {
    let output = process::run(command, LIMIT)?.expect_code(0)?;
    let last = output.stdout.lines().last().unwrap_or_default();
    serde_json::from_str(last).while_doing(format_args!("reading {last:?}"))
}

/// The mean of what several runs say; none if there were none.
fn mean(answers: &[Value], key: &str) -> Result<Option<f64>> {
    let numbers: Result<Vec<f64>> = answers.iter().map(|answer| number(answer, key)).collect();
    let numbers = numbers?;
    Ok((!numbers.is_empty()).then(|| numbers.iter().sum::<f64>() / numbers.len() as f64))
}

fn number(answer: &Value, key: &str) -> Result<f64> {
    answer[key]
        .as_f64()
        .ok_or_else(|| Failure::new(format!("no number `{key}` in {answer}")))
}
