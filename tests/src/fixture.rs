//! A world small enough to train in seconds: a softmax model of 40 thousand parameters with its
//! tokenizer, and text that it can learn from.
//!
//! The text goes the way of every text: parquet with a `content` column, then `supra data tokenize`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::failure::Result;
use crate::models::Shape;
use crate::process::run;
use crate::programs::Programs;

/// Words of the vocabulary, `<s>`, `</s>` and `<unk>` included.
pub const VOCABULARY: usize = 128;
const DIM: usize = 32;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const FFN: usize = 64;
/// Documents of the training text, and tokens of each: a header, its words and an end.
const DOCUMENTS: usize = 400;
const DOCUMENT_WORDS: usize = 120;
/// How long a program that only prepares files may take.
const PREPARATION: Duration = Duration::from_secs(60);

/// Directories of the small world.
#[derive(Clone, Debug)]
pub struct Fixture {
    /// Everything below is in here.
    pub root: PathBuf,
    /// The softmax model, as Hugging Face writes it.
    pub base: PathBuf,
    /// Tokenized text with its `dataset.json`.
    pub data: PathBuf,
}

impl Fixture {
    /// Makes it below `root`.
    pub fn create(programs: &Programs, root: &Path) -> Result<Self> {
        let fixture = Self {
            root: root.to_owned(),
            base: root.join("base"),
            data: root.join("tokens"),
        };
        write_model(&fixture.base)?;
        write_tokenizer(&fixture.base, VOCABULARY)?;
        let text = root.join("text");
        fs::create_dir_all(&text)?;
        write_text(&text.join("part-00000.parquet"), 1)?;
        write_text(&text.join("part-00001.parquet"), 2)?;
        let mut tokenize = programs.supra();
        tokenize
            .args(["data", "tokenize"])
            .arg(&text)
            .arg("--output")
            .arg(&fixture.data);
        tokenize
            .arg("--tokenizer")
            .arg(fixture.base.join("tokenizer.json"));
        run(tokenize, PREPARATION)?.expect_code(0)?;
        Ok(fixture)
    }
}

/// A recipe over the small world; the fields are what tests vary.
#[derive(Clone, Debug)]
pub struct TinyRecipe {
    /// Name of the run.
    pub name: String,
    /// Tokens of the budget. Rarely a whole number of batches: ends are where mistakes are.
    pub budget: u64,
    /// Tokens of a step.
    pub batch: u64,
    /// Highest learning rate.
    pub lr: &'static str,
    /// Inputs of a sample.
    pub sequence_length: u64,
    /// Samples of a micro-batch.
    pub micro_batch: u64,
    /// Who keeps the optimizer's state.
    pub sharding: &'static str,
    /// Tokens between checkpoints.
    pub checkpoint_every: u64,
    /// The whole `checkpoint` mapping, in place of one made from `checkpoint_every`.
    pub checkpoint: Option<String>,
    /// Fewest and most ranks of a generation.
    pub workers: (u32, u32),
    /// Whether the run is measured on text: on that which it trains, here.
    pub heldout: bool,
    /// Whether a budget larger than the data goes through it again.
    pub repeat: bool,
    /// Further lines of YAML, at the top level.
    pub more: String,
}

impl Default for TinyRecipe {
    fn default() -> Self {
        Self {
            name: "tiny".to_owned(),
            budget: 20_010,
            batch: 512,
            lr: "3e-3",
            sequence_length: 32,
            micro_batch: 4,
            sharding: "none",
            checkpoint_every: 4_096,
            checkpoint: None,
            workers: (2, 2),
            heldout: false,
            repeat: false,
            more: String::new(),
        }
    }
}

impl TinyRecipe {
    /// Whole samples that the budget pays for.
    pub fn samples(&self) -> u64 {
        self.budget / self.sequence_length
    }

    /// Steps that they make; the last one may be smaller.
    pub fn steps(&self) -> u64 {
        self.samples().div_ceil(self.batch / self.sequence_length)
    }

    /// Tokens that a finished run has trained.
    pub fn tokens(&self) -> u64 {
        self.samples() * self.sequence_length
    }

    /// The YAML.
    pub fn to_yaml(&self, fixture: &Fixture) -> String {
        let heldout = match self.heldout {
            true => format!(", heldout: {}", fixture.data.display()),
            false => String::new(),
        };
        // All are kept: tests look back.
        let checkpoint = format!("{{ every_tokens: {}, keep: 100 }}", self.checkpoint_every);
        format!(
            "name: {name}\n\
             base: {{ path: {base} }}\n\
             model: {{ precision: fp32, chunk: 16 }}\n\
             data: {{ train: {data}{heldout}, repeat: {repeat} }}\n\
             budget: {{ tokens: {budget} }}\n\
             batch: {{ tokens: {batch}, micro_batch: {micro}, sequence_length: {length} }}\n\
             optimizer: {{ lr: {lr}, final_lr: 1e-4, warmup: 5 steps, sharding: {sharding} }}\n\
             checkpoint: {checkpoint}\n\
             workers: {{ min: {min}, max: {max} }}\n\
             replica_check: {{ every_steps: 5 }}\n\
             {more}",
            name = self.name,
            base = fixture.base.display(),
            data = fixture.data.display(),
            heldout = heldout,
            budget = self.budget,
            batch = self.batch,
            lr = self.lr,
            sharding = self.sharding,
            micro = self.micro_batch,
            length = self.sequence_length,
            checkpoint = self.checkpoint.as_ref().unwrap_or(&checkpoint),
            min = self.workers.0,
            max = self.workers.1,
            repeat = self.repeat,
            more = self.more,
        )
    }

    /// Writes it to `ROOT/NAME.yaml`.
    pub fn write(&self, fixture: &Fixture) -> Result<PathBuf> {
        let path = fixture.root.join(format!("{}.yaml", self.name));
        fs::write(&path, self.to_yaml(fixture))?;
        Ok(path)
    }
}

/// One tensor in fp32.
struct Weight {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn write_model(directory: &Path) -> Result<()> {
    let shape = Shape {
        vocab: VOCABULARY,
        dim: DIM,
        layers: LAYERS,
        heads: HEADS,
        kv_heads: KV_HEADS,
        ffn: FFN,
    };
    shape.write(directory)?;

    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut weights = BTreeMap::new();
    let mut matrix = |name: String, rows: usize, columns: usize| {
        let values =
            (0..rows * columns).flat_map(|_| random.random_range(-0.1_f32..0.1).to_le_bytes());
        weights.insert(
            name,
            Weight {
                shape: vec![rows, columns],
                bytes: values.collect(),
            },
        );
    };
    let kv = DIM / HEADS * KV_HEADS;
    matrix("model.embed_tokens.weight".to_owned(), VOCABULARY, DIM);
    matrix("lm_head.weight".to_owned(), VOCABULARY, DIM);
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        matrix(name("self_attn.q_proj"), DIM, DIM);
        matrix(name("self_attn.k_proj"), kv, DIM);
        matrix(name("self_attn.v_proj"), kv, DIM);
        matrix(name("self_attn.o_proj"), DIM, DIM);
        matrix(name("mlp.gate_proj"), FFN, DIM);
        matrix(name("mlp.up_proj"), FFN, DIM);
        matrix(name("mlp.down_proj"), DIM, FFN);
    }
    let mut norm = |name: String| {
        let bytes = 1.0_f32.to_le_bytes().repeat(DIM);
        weights.insert(
            name,
            Weight {
                shape: vec![DIM],
                bytes,
            },
        );
    };
    norm("model.norm.weight".to_owned());
    for layer in 0..LAYERS {
        norm(format!("model.layers.{layer}.input_layernorm.weight"));
        norm(format!(
            "model.layers.{layer}.post_attention_layernorm.weight"
        ));
    }
    let mut views = Vec::new();
    for (name, weight) in &weights {
        views.push((
            name,
            TensorView::new(Dtype::F32, weight.shape.clone(), &weight.bytes)?,
        ));
    }
    safetensors::serialize_to_file(views, None, &directory.join("model.safetensors"))?;
    Ok(())
}

/// Writes a tokenizer of so many words, at least the special ones: `<s>` is 0, `</s>` 1 and `<unk>` 2.
pub fn write_tokenizer(directory: &Path, words: usize) -> Result<()> {
    let mut vocabulary = serde_json::Map::new();
    for id in 0..words {
        vocabulary.insert(word(id), id.into());
    }
    let special = |id: usize| {
        json!({"id": id, "content": word(id), "single_word": false, "lstrip": false,
               "rstrip": false, "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": word(2)},
    });
    fs::write(directory.join("tokenizer.json"), tokenizer.to_string())?;
    let settings = json!({"bos_token": word(0), "eos_token": word(1), "unk_token": word(2)});
    fs::write(
        directory.join("tokenizer_config.json"),
        settings.to_string(),
    )?;
    Ok(())
}

fn word(id: usize) -> String {
    match id {
        0 => "<s>".to_owned(),
        1 => "</s>".to_owned(),
        2 => "<unk>".to_owned(),
        _ => format!("w{id}"),
    }
}

/// Each word mostly determines the next one, so that there is something to learn.
fn write_text(path: &Path, seed: u64) -> Result<()> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let words = VOCABULARY - 3;
    let documents = (0..DOCUMENTS).map(|_| {
        let mut text = String::new();
        let mut current = random.random_range(0..words);
        for _ in 0..DOCUMENT_WORDS {
            // Writing to a string does not fail.
            let _ = write!(text, "{} ", word(3 + current));
            let surprise = random.random_range(0..8) == 0;
            current = if surprise {
                random.random_range(0..words)
            } else {
                (current * 7 + 3) % words
            };
        }
        text
    });
    write_documents(path, documents)
}

/// Writes a file of text as people have it: parquet with a document per row in the column `content`.
pub fn write_documents(path: &Path, documents: impl IntoIterator<Item = String>) -> Result<()> {
    let column: ArrayRef = Arc::new(StringArray::from_iter_values(documents));
    let batch = RecordBatch::try_from_iter([("content", column)])?;
    let mut writer = ArrowWriter::try_new(File::create(path)?, batch.schema(), None)?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(())
}
