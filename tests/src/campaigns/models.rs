//! A softmax model, what uptraining makes of it, and a linear model from random weights: what each of them can do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{Cluster, Device};
use crate::failure::{Failure, Result};
use crate::models::{Shape, Text, convert, quickstart};
use crate::process;
use crate::programs::{Programs, repository};
use crate::report::{Row, rounded};
use crate::training::{Steps, Training};

/// What the report says above its table.
pub const ABOUT: &str = "A Llama of 29 M parameters (width 512, 9 blocks, 8 query heads on 4 key/value heads, vocabulary 2048) is \
    pretrained with softmax attention from random weights, converted, and uptrained on a tenth of those tokens; beside it the same linear \
    model is trained from random weights on as many tokens as both together. Every run goes through `supra-coordinator` and \
    `supra-worker`, with samples of 512 tokens; its ledger was audited. `supra-worker eval` then measures them in fp32: `heldout_loss` in nats per token of 64 held-out \
    documents in windows of 512 tokens; `seen_N` the same in windows of 2048, over the tokens before which the model sees N to 2N - 1 tokens \
    of their document (N = 1024 is beyond what any of them was trained on); `arc_easy` (the answer's likelihood, per character in `_norm`; chance is 0.25) and \
    `lambada` (the last word, greedy) zero-shot. `_stderr` are standard errors. The campaign fails if uptraining does not better the converted model.";

/// A tenth of the base's tokens is uptrained.
const SHARE: u64 = 10;
/// What time allows on one GPU.
const PRETRAINING: u64 = 100_000_000;
const LIMIT: Duration = Duration::from_secs(600);
/// Columns for bins of positions, by the first position of each.
const SEEN: [(&str, u64); 4] = [
    ("seen_1", 1),
    ("seen_16", 16),
    ("seen_256", 256),
    ("seen_1024", 1024),
];

/// The campaign.
#[derive(Clone, Debug)]
pub struct Models {
    /// A small model, few tokens and few items.
    pub quick: bool,
    /// Where it is trained.
    pub device: Device,
    /// Folder with parquet files of text, each document a row of the column `content`.
    pub text: PathBuf,
    /// Folder with `arc_easy.jsonl`, and `lambada_openai.jsonl` or `lambada.jsonl`.
    pub evals: PathBuf,
}

impl Models {
    /// Trains and measures.
    ///
    /// # Errors
    /// When a run or an evaluation fails, an audit disagrees, or uptraining is of no use.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let study = Study {
            campaign: self,
            programs,
            text: Text::tokenize(programs, &self.text, directory)?,
            cluster: Cluster::on(self.device, programs, &directory.join("cluster"), 1)?,
            directory,
        };
        let shape = directory.join("shape");
        if self.quick {
            Shape::TINY.write(&shape)?;
        } else {
            Shape::SMALL.write(&shape)?;
        }
        // Beside the shape, so that every checkpoint has it too.
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(quickstart("base").join(file), shape.join(file))?;
        }
        study.run(&shape)
    }
}

/// What all trainings and evaluations share.
struct Study<'a> {
    campaign: &'a Models,
    programs: &'a Programs,
    text: Text,
    cluster: Cluster,
    directory: &'a Path,
}

impl Study<'_> {
    fn run(&self, shape: &Path) -> Result<Vec<Row>> {
        let pretraining = if self.campaign.quick {
            400_000
        } else {
            PRETRAINING
        };
        let uptraining = pretraining / SHARE;
        let random = format!("{{ path: {}, weights: random }}", shape.display());

        let training = Training {
            cluster: &self.cluster,
            device: self.campaign.device,
            ranks: 1,
            text: &self.text,
            steps: self.steps(),
            directory: self.directory,
        };
        let base = training.run("base", "softmax", &random, pretraining)?;
        let base = base.checkpoint;
        let converted = self.directory.join("converted");
        convert(self.programs, &base, &converted)?;
        let from = format!("{{ path: {} }}", base.display());
        let uptrained = training.run("uptrained", "supra", &from, uptraining)?;
        let scratch = training.run("scratch", "supra", &random, pretraining + uptraining)?;

        let models = [
            ("softmax base", &base, pretraining),
            ("converted, before uptraining", &converted, 0),
            ("SUPRA, uptrained", &uptrained.checkpoint, uptraining),
            (
                "SUPRA from random weights",
                &scratch.checkpoint,
                pretraining + uptraining,
            ),
        ];
        let measured = models.map(|(name, model, tokens)| self.measure(name, model, tokens));
        let measured = measured.into_iter().collect::<Result<Vec<_>>>()?;
        let losses: Vec<f64> = measured.iter().map(|(_, loss)| *loss).collect();
        if losses[2].is_nan() || losses[2] >= losses[1] {
            return Err(Failure::new(format!(
                "uptraining ends at {}, the converted model has {}",
                losses[2], losses[1]
            )));
        }
        Ok(measured.into_iter().map(|(row, _)| row).collect())
    }

    fn steps(&self) -> Steps {
        if self.campaign.quick {
            Steps::QUICK
        } else {
            Steps {
                tokens: 32_768,
                micro_batch: 32,
                length: 512,
                lr: "1e-3",
            }
        }
    }

    /// A row for a model, and its loss.
    fn measure(&self, name: &str, model: &Path, tokens: u64) -> Result<(Row, f64)> {
        let row = Row::new().with("model", name).with("tokens", tokens);
        let (row, loss) = self.read(row, model)?;
        Ok((self.answer(row, model)?, loss))
    }

    /// Columns for held-out text.
    fn read(&self, mut row: Row, model: &Path) -> Result<(Row, f64)> {
        let heldout = self.text.heldout.display().to_string();
        let mut short = vec!["--data", &heldout, "--sequence-length", "512"];
        let mut long = vec!["--data", &heldout, "--sequence-length", "2048"];
        if self.campaign.quick {
            short.extend(["--windows", "8"]);
            long.extend(["--windows", "2"]);
        }
        let (text, positions) = (self.eval(model, &short)?, self.eval(model, &long)?);
        let loss = number(&text, "/loss")?;
        for (column, value) in [
            ("heldout_loss", loss),
            ("heldout_loss_stderr", number(&text, "/loss_stderr")?),
            ("bits_per_byte", number(&text, "/bits_per_byte")?),
        ] {
            row = row.with(column, rounded(value, 4));
        }
        let bins = positions["positions"].as_array();
        let bins = bins.map_or(&[][..], Vec::as_slice);
        for (column, first) in SEEN {
            let bin = bins.iter().find(|bin| bin["first"] == first);
            let loss = bin.and_then(|bin| bin["loss"].as_f64());
            row = row.with(column, loss.map(|loss| rounded(loss, 3)));
        }
        Ok((row, loss))
    }

    /// Columns for tasks.
    fn answer(&self, mut row: Row, model: &Path) -> Result<Row> {
        let evals = &self.campaign.evals;
        let [openai, own] = ["lambada_openai.jsonl", "lambada.jsonl"].map(|file| evals.join(file));
        let lambada = if openai.exists() { openai } else { own };
        let task = |name: &str, file: &Path| format!("{name}={}", file.display());
        let arc_easy = task("arc_easy", &evals.join("arc_easy.jsonl"));
        let lambada = task("lambada", &lambada);
        let mut choice = vec!["--task", &arc_easy, "--delimiter", "Answer: "];
        let mut cloze = vec!["--task", &lambada];
        if self.campaign.quick {
            choice.extend(["--limit", "8"]);
            cloze.extend(["--limit", "8"]);
        }
        let (choice, cloze) = (self.eval(model, &choice)?, self.eval(model, &cloze)?);
        for (answer, metric, digits, [column, error]) in [
            (&choice, "acc", 4, ["arc_easy", "arc_easy_stderr"]),
            (
                &choice,
                "acc_norm",
                4,
                ["arc_easy_norm", "arc_easy_norm_stderr"],
            ),
            (&cloze, "acc", 4, ["lambada", "lambada_stderr"]),
            (
                &cloze,
                "perplexity",
                1,
                ["lambada_perplexity", "lambada_perplexity_stderr"],
            ),
        ] {
            let of = |what: &str| number(answer, &format!("/tasks/0/metrics/{metric}/{what}"));
            row = row
                .with(column, rounded(of("value")?, digits))
                .with(error, rounded(of("stderr")?, digits));
        }
        Ok(row)
    }

    fn eval(&self, model: &Path, arguments: &[&str]) -> Result<Value> {
        let mut command = self.programs.worker();
        command.arg("eval").arg("--model").arg(model);
        command.args(["--json", "--device"]);
        command
            .arg(self.campaign.device.of_worker(0, 1))
            .args(arguments);
        let output = process::run(command, LIMIT)?.expect_code(0)?;
        Ok(serde_json::from_str(&output.stdout)?)
    }
}

fn number(answer: &Value, pointer: &str) -> Result<f64> {
    let found = answer.pointer(pointer).and_then(Value::as_f64);
    found.ok_or_else(|| Failure::new(format!("eval --json has no {pointer}: {answer}")))
}

/// The tasks of the repository.
pub fn own_evals() -> PathBuf {
    repository().join("tests/evals")
}
