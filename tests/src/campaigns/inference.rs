//! Speed of inference: tokens of several sequences at once beside the best PyTorch known, prompts, and how time and memory
//! grow with a sequence.
//!
//! The peer is `tests/peer/decode.py`: compiled and captured in a CUDA graph, with the next token chosen inside it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::plot::{self, Curve, Frame};
use crate::failure::{Failure, Result, While};
use crate::process;
use crate::programs::{Programs, repository};
use crate::report::{Row, rounded};

/// What the report of `decode` says above its table.
pub const ABOUT_DECODE: &str = "A token for each of `batch` sequences, one step after the other, of a SUPRA model in the shape of \
    Mistral 7B (7.81 B parameters, bf16, fp32 states, random weights) on one GPU: `supra-worker bench decode`, which goes through \
    the same engine as `generate` and `serve` and gives every token to the host, beside `tests/peer/decode.py`: PyTorch, compiled, \
    captured in a CUDA graph that chooses the next token itself, the faster of its two ways to read the state at each batch. `ms` \
    is ours for a step. `share_of_bound` is of what the GPU could do at best: weights read once at 4.3 TB/s, or multiplied at 790 \
    TFLOP/s, and states read and written.";

/// What the report of `prefill` says above its table.
pub const ABOUT_PREFILL: &str = "Prompts of one sequence, of a SUPRA model in the shape of Mistral 7B (7.81 B \
    parameters, bf16, fp32 states, random weights) on one GPU, by `supra-worker bench prefill`: the time from the tokens to \
    the first new one, and tokens of the prompt per second. Medians of three.";

/// What the report of `flat` says above its table.
pub const ABOUT_FLAT: &str = "Time of the next token, and memory of the sequence, behind 1 to 131,072 tokens: a SUPRA model, which has \
    read all of them, beside the softmax model of the same shape (Mistral 7B, bf16, random weights), whose cache is filled with \
    random numbers. One sequence, medians. Both \
    models' steps are recorded as graphs.";

/// Of each timing, in the quick form.
const STEPS: &[&str] = &["--steps", "2"];
/// Compiling the peer takes minutes.
const LIMIT: Duration = Duration::from_secs(540);

/// Where and how large.
#[derive(Clone, Copy, Debug)]
pub struct Inference {
    /// Two blocks on the processor, without the peer.
    pub quick: bool,
}

impl Inference {
    /// The next tokens of several sequences at once.
    ///
    /// # Errors
    /// When there is no GPU, or the peer cannot run.
    pub fn decode(self, programs: &Programs) -> Result<Vec<Row>> {
        let batches = if self.quick { "1,4" } else { "1,16,64,256" };
        let ours = self.ours(programs, &["decode", "--batches", batches], STEPS)?;
        let peers = if self.quick {
            Vec::new()
        } else {
            peer(&["--batches", batches])?
        };
        let rows = list(&ours, "decode")?.iter().map(|row| {
            let (batch, tok_s) = (&row["batch"], number(row, "tokens_per_second")?);
            let same = peers.iter().filter(|peer| &peer["batch"] == batch);
            let best = same.filter_map(|peer| peer["tok_s"].as_f64());
            let peer_tok_s = best.reduce(f64::max);
            Ok(Row::new()
                .with("batch", batch.clone())
                .with("tok_s", rounded(tok_s, 1))
                .with("peer_tok_s", peer_tok_s)
                .with("ratio", peer_tok_s.map(|peer| rounded(tok_s / peer, 3)))
                .with("share_of_bound", rounded(number(row, "share_of_bound")?, 3))
                .with("ms", rounded(number(row, "milliseconds")?, 3)))
        });
        rows.collect()
    }

    /// Prompts.
    ///
    /// # Errors
    /// When there is no GPU.
    pub fn prefill(self, programs: &Programs) -> Result<Vec<Row>> {
        let prompts = if self.quick { "64" } else { "2048,8192,32768" };
        let ours = self.ours(programs, &["prefill", "--prompts", prompts], &[])?;
        let rows = list(&ours, "prefill")?.iter().map(|row| {
            Ok(Row::new()
                .with("tokens", row["tokens"].clone())
                .with("first_token_ms", rounded(1e3 * number(row, "seconds")?, 1))
                .with("tok_s", rounded(number(row, "tokens_per_second")?, 0)))
        });
        rows.collect()
    }

    /// The next token of longer and longer sequences. Draws them at `plot`.
    ///
    /// # Errors
    /// When there is no GPU.
    pub fn flat(self, programs: &Programs, plot: &Path) -> Result<Vec<Row>> {
        let lengths = if self.quick {
            "1,64,256"
        } else {
            "1,1024,4096,16384,32768,65536,131072"
        };
        let ours = self.ours(programs, &["flat", "--lengths", lengths], STEPS)?;
        let (supra, softmax) = (list(&ours, "supra")?, list(&ours, "softmax")?);
        let mut curves = [Vec::new(), Vec::new()];
        let mut rows = Vec::new();
        for (supra, softmax) in supra.iter().zip(softmax) {
            let tokens = number(supra, "tokens")?;
            let times = [
                number(supra, "milliseconds")?,
                number(softmax, "milliseconds")?,
            ];
            for (curve, time) in curves.iter_mut().zip(times) {
                curve.push((tokens, time));
            }
            rows.push(
                Row::new()
                    .with("tokens", supra["tokens"].clone())
                    .with("ms_per_token", rounded(times[0], 3))
                    .with("state_bytes", supra["bytes"].clone())
                    .with("softmax_ms_per_token", rounded(times[1], 3))
                    .with("softmax_cache_bytes", softmax["bytes"].clone()),
            );
        }
        let labels = ["SUPRA", "softmax"];
        let curves: Vec<Curve> = (0..2)
            .map(|at| Curve::dots(at, labels[at], &curves[at]))
            .collect();
        let frame = Frame {
            title: "Time of the next token",
            x: ("tokens before it (thousands)", 1e3),
            y: "milliseconds",
        };
        plot::write(plot, &frame, &curves)?;
        Ok(rows)
    }

    /// What a bench of ours answers; `small` is for the quick form alone.
    fn ours(self, programs: &Programs, arguments: &[&str], small: &[&str]) -> Result<Value> {
        let mut command = programs.worker();
        command.arg("bench").args(arguments).arg("--json");
        if self.quick {
            command
                .args(["--layers", "1", "--dtype", "fp32"])
                .args(small);
        } else {
            command.args(["--device", "cuda:0"]);
        }
        let output = process::run(command, LIMIT)?.expect_code(0)?;
        let last = output.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(last).while_doing(format_args!("reading {last:?}"))
    }
}

/// What the peer says of each of its variants.
fn peer(arguments: &[&str]) -> Result<Vec<Value>> {
    let mut answers = Vec::new();
    for variant in ["supra", "fused"] {
        let mut command = Command::new("python3");
        command.arg(repository().join("tests/peer/decode.py"));
        command.args(["--only", variant]).args(arguments);
        let output = process::run(command, LIMIT)?
            .expect_code(0)
            .while_doing("tests/peer/decode.py, which needs torch")?;
        for line in output.stdout.lines() {
            let answer: Value =
                serde_json::from_str(line).while_doing(format_args!("reading {line:?}"))?;
            if let Some(error) = answer["error"].as_str() {
                return Err(Failure::new(format!("tests/peer/decode.py: {error}")));
            }
            println!("{answer}");
            answers.push(answer);
        }
    }
    Ok(answers)
}

fn list<'a>(answer: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    answer[key]
        .as_array()
        .ok_or_else(|| Failure::new(format!("no list `{key}` in {answer}")))
}

fn number(answer: &Value, key: &str) -> Result<f64> {
    answer[key]
        .as_f64()
        .ok_or_else(|| Failure::new(format!("no number `{key}` in {answer}")))
}
