//! A softmax model, what uptraining makes of it, and a linear model from random weights: what each of them can do.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{Cluster, Device};
use crate::failure::{Failure, Result, While};
use crate::models::{Shape, Text, convert, quickstart};
use crate::process;
use crate::programs::{Programs, repository};
use crate::report::{Row, rounded};

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
/// Bins of positions that have a column.
const SEEN: [u64; 4] = [1, 16, 256, 1024];

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
            100_000
        } else {
            PRETRAINING
        };
        let uptraining = pretraining / SHARE;
        let random = format!("{{ path: {}, weights: random }}", shape.display());

        let base = self.train("softmax", "base", &random, pretraining)?;
        let converted = self.directory.join("converted");
        convert(self.programs, &base, &converted)?;
        let from = format!("{{ path: {} }}", base.display());
        let uptrained = self.train("supra", "uptrained", &from, uptraining)?;
        let scratch = self.train("supra", "scratch", &random, pretraining + uptraining)?;

        let models = [
            ("softmax base", &base, pretraining),
            ("converted, before uptraining", &converted, 0),
            ("SUPRA, uptrained", &uptrained, uptraining),
            (
                "SUPRA from random weights",
                &scratch,
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

    /// Trains a recipe to its end, audits it, and gives its last checkpoint.
    fn train(&self, attention: &str, name: &str, base: &str, budget: u64) -> Result<PathBuf> {
        let (batch, length, micro, lr) = match self.campaign.quick {
            true => (2048, 128, 8, "5e-3"),
            false => (32_768, 512, 32, "1e-3"),
        };
        let warmup = (budget / batch / 20).clamp(1, 200);
        // Many a processor multiplies bf16 ten times slower than fp32.
        let precision = match self.campaign.device {
            Device::Cpu => "fp32",
            Device::Cuda => "bf16",
        };
        let recipe = format!(
            "name: {name}\n\
             base: {base}\n\
             attention: {attention}\n\
             model: {{ precision: {precision} }}\n\
             data: {{ train: {data}, repeat: true }}\n\
             budget: {{ tokens: {budget} }}\n\
             batch: {{ tokens: {batch}, micro_batch: {micro}, sequence_length: {length} }}\n\
             optimizer: {{ lr: {lr}, final_lr: 1e-4, warmup: {warmup} steps }}\n\
             checkpoint: {{ every_tokens: {budget} }}\n\
             workers: {{ min: 1, max: 1 }}\n",
            data = self.text.train.display(),
        );
        let path = self.directory.join(format!("{name}.yaml"));
        fs::write(&path, recipe)?;
        let run = self.cluster.submit(&path)?;
        let end = self.cluster.wait_finished(&run, LIMIT).while_doing(name)?;
        self.cluster.audit(&run)?;
        println!("{name}: loss {:.4} after {} tokens", end.loss, end.tokens);
        self.cluster.last_checkpoint(&run)
    }

    /// A row for a model, and its loss.
    fn measure(&self, name: &str, model: &Path, tokens: u64) -> Result<(Row, f64)> {
        let evals = &self.campaign.evals;
        let lambada = ["lambada_openai.jsonl", "lambada.jsonl"].map(|file| evals.join(file));
        let [openai, own] = &lambada;
        let lambada = if openai.exists() { openai } else { own };
        let task = |name: &str, file: &Path| format!("{name}={}", file.display());
        let (arc_easy, lambada) = (
            task("arc_easy", &evals.join("arc_easy.jsonl")),
            task("lambada", lambada),
        );
        let mut tasks = vec!["--task", &arc_easy, "--delimiter", "Answer: "];
        let mut cloze = vec!["--task", &lambada];
        let mut short = vec!["--sequence-length", "512"];
        let mut long = vec!["--sequence-length", "2048"];
        if self.campaign.quick {
            tasks.extend(["--limit", "8"]);
            cloze.extend(["--limit", "8"]);
            short.extend(["--windows", "8"]);
            long.extend(["--windows", "2"]);
        }
        let heldout = self.text.heldout.display().to_string();
        for arguments in [&mut short, &mut long] {
            arguments.extend(["--data", &heldout]);
        }
        let answers = [short, long, tasks, cloze].map(|arguments| self.eval(model, &arguments));
        let [text, positions, arc_easy, lambada] = answers;
        let (text, positions) = (text?, positions?);
        let (arc_easy, lambada) = (arc_easy?, lambada?);
        let loss = number(&text, "/loss")?;
        let mut row = Row::new()
            .with("model", name)
            .with("tokens", tokens)
            .with("heldout_loss", rounded(loss, 4))
            .with(
                "heldout_loss_stderr",
                rounded(number(&text, "/loss_stderr")?, 4),
            )
            .with(
                "bits_per_byte",
                rounded(number(&text, "/bits_per_byte")?, 4),
            );
        const COLUMNS: [&str; SEEN.len()] = ["seen_1", "seen_16", "seen_256", "seen_1024"];
        for (column, first) in COLUMNS.into_iter().zip(SEEN) {
            let bins = positions["positions"]
                .as_array()
                .map_or(&[][..], Vec::as_slice);
            let bin = bins.iter().find(|bin| bin["first"] == first);
            let loss = bin.and_then(|bin| bin["loss"].as_f64());
            row = row.with(column, loss.map(|loss| rounded(loss, 3)));
        }
        for (answer, column, error, metric, digits) in [
            (&arc_easy, "arc_easy", "arc_easy_stderr", "acc", 4),
            (
                &arc_easy,
                "arc_easy_norm",
                "arc_easy_norm_stderr",
                "acc_norm",
                4,
            ),
            (&lambada, "lambada", "lambada_stderr", "acc", 4),
            (
                &lambada,
                "lambada_perplexity",
                "lambada_perplexity_stderr",
                "perplexity",
                1,
            ),
        ] {
            let of = |what: &str| number(answer, &format!("/tasks/0/metrics/{metric}/{what}"));
            row = row
                .with(column, rounded(of("value")?, digits))
                .with(error, rounded(of("stderr")?, digits));
        }
        Ok((row, loss))
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
