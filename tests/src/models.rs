//! Models and text outside of a run: shapes without weights, tokens of a text, losses on what is held out.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::Device;
use crate::failure::{Failure, Result};
use crate::process;
use crate::programs::{Programs, repository};

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(600);
/// Documents that are held out, as scripts/quickstart does.
const HELDOUT: &str = "64";

/// The dimensions of a Llama.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Width of the residual stream.
    pub dim: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
}

impl Shape {
    /// 32 M parameters with linear attention, 29 M with softmax, over the vocabulary of the quickstart's tokenizer.
    pub const SMALL: Shape = Shape {
        vocab: 2048,
        dim: 512,
        layers: 9,
        heads: 8,
        kv_heads: 4,
        ffn: 1408,
    };
    /// The same in small, for a processor that has seconds.
    pub const TINY: Shape = Shape {
        vocab: 2048,
        dim: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        ffn: 128,
    };

    /// Writes a model directory without weights and tokenizer.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.dim,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": false,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "float32",
        });
        fs::create_dir_all(directory)?;
        fs::write(directory.join("config.json"), format!("{config:#}\n"))?;
        Ok(())
    }
}

/// Tokens for training, and some documents that are held out.
#[derive(Clone, Debug)]
pub struct Text {
    /// Manifest of the training part.
    pub train: PathBuf,
    /// Manifest of the held-out part.
    pub heldout: PathBuf,
    /// Tokens of the training part.
    pub tokens: u64,
}

impl Text {
    /// The text of `folder` in the tokens of the quickstart's tokenizer, below `directory`.
    pub fn tokenize(programs: &Programs, folder: &Path, directory: &Path) -> Result<Text> {
        let tokens = directory.join("tokens");
        let mut tokenize = programs.supra();
        tokenize.args(["data", "tokenize", "--json", "--heldout", HELDOUT]);
        tokenize.arg("--tokenizer").arg(quickstart("base"));
        tokenize.arg("--output").arg(&tokens).arg(folder);
        let output = process::run(tokenize, LIMIT)?.expect_code(0)?;
        let answer: Value = serde_json::from_str(&output.stdout)?;
        let count = answer["tokens"].as_u64();
        let count = count
            .ok_or_else(|| Failure::new(format!("data tokenize says no `tokens`: {answer}")))?;
        Ok(Text {
            train: tokens.join("dataset.json"),
            heldout: tokens.join("heldout.json"),
            tokens: count,
        })
    }
}

/// A folder of the quickstart: `base` with its tokenizer, or `text`.
pub fn quickstart(folder: &str) -> PathBuf {
    repository().join("recipes/quickstart").join(folder)
}

/// Makes a linear model of a softmax one, without training it.
pub fn convert(programs: &Programs, base: &Path, out: &Path) -> Result<()> {
    let mut convert = programs.worker();
    convert.arg("convert").arg("--base").arg(base);
    convert.arg("--out").arg(out);
    process::run(convert, LIMIT)?.expect_code(0).map(drop)
}

/// How a model is evaluated.
#[derive(Clone, Copy, Debug)]
pub struct Evaluation<'a> {
    /// The held-out data.
    pub heldout: &'a Path,
    /// Tokens of a window.
    pub length: u32,
    /// Windows, from the first on; all, if none.
    pub windows: Option<u64>,
    /// Where it is computed, in fp32.
    pub device: Device,
}

impl Evaluation<'_> {
    /// Mean loss of a model, in nats per token.
    pub fn loss(&self, programs: &Programs, model: &Path) -> Result<f64> {
        let mut command = programs.worker();
        command.arg("eval").arg("--model").arg(model);
        command.arg("--data").arg(self.heldout);
        command.args(["--sequence-length", &self.length.to_string(), "--json"]);
        command.args(["--device", &self.device.of_worker(0, 1)]);
        if let Some(windows) = self.windows {
            command.args(["--windows", &windows.to_string()]);
        }
        let output = process::run(command, LIMIT)?.expect_code(0)?;
        let answer: Value = serde_json::from_str(&output.stdout)?;
        let loss = answer["loss"].as_f64();
        loss.ok_or_else(|| Failure::new(format!("eval --json has no `loss`: {answer}")))
    }
}
