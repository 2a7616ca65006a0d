//! `supra-worker bench`: how fast things are on this machine.

mod checkpoint;
mod decode;

use std::{
    error::Error,
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use supra_recipes::schema::{self, Attention};
use supra_worker::{
    bench::{Given, Measured, StepBench},
    device::Place,
    failure::chain,
    kernels::{
        self, Choice,
        timed::{Component, Cost},
    },
    model::{AttentionKind, ModelConfig, NewWeights, SupraConfig, load_params},
    step::Policy,
};
use tch::{Kind, Tensor};

use super::{
    failure::Failure,
    options::{DeviceOptions, Dtype},
    out,
};

/// Measures speed with random weights and tokens.
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time forward and backward of a micro-batch, or whole optimizer steps
    Step(Step),
    /// Time what a checkpoint costs: standing still, writing and reading
    Checkpoint(checkpoint::Checkpoint),
    /// Time the next tokens of several sequences at once
    Decode(decode::Decode),
    /// Time prompts, up to their first new token
    Prefill(decode::Prefill),
    /// Time the next token of longer and longer sequences, beside softmax attention
    Flat(decode::Flat),
}

/// Shapes of models that people know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shape {
    /// Mistral 7B: 32 query heads on 8 key/value heads
    #[value(name = "mistral-7b")]
    Mistral7b,
    /// Llama 2 7B: 32 heads
    #[value(name = "llama2-7b")]
    Llama2_7b,
}

/// Times forward and backward of a micro-batch, or whole optimizer steps; gradients add up in fp32, as in training.
#[derive(Debug, Args)]
struct Step {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = Shape::Mistral7b)]
    shape: Shape,
    /// Blocks [default: those of the shape]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    layers: Option<u64>,
    /// Attention of the model
    #[arg(long, value_enum, default_value_t = Mixing::Supra)]
    attention: Mixing,
    /// Sequences of the micro-batch
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1 << 16))]
    batch: i64,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 2048, value_name = "TOKENS", value_parser = clap::value_parser!(i64).range(2..=1 << 20))]
    sequence_length: i64,
    /// Documents in each sequence, which do not see each other
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1 << 20))]
    documents: i64,
    /// What the forward pass keeps for the backward pass
    #[arg(long, value_enum, default_value_t = Keep::Lean)]
    policy: Keep,
    /// Number format to compute in
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Model directory to take in place of random weights of a shape, with --tokens
    #[arg(long, value_name = "DIR", requires = "tokens", conflicts_with_all = ["shape", "layers", "attention", "documents"])]
    model: Option<PathBuf>,
    /// Safetensors file with `inputs` and `targets`, i64 [B, T], to take in place of random tokens, with --model
    #[arg(long, value_name = "FILE", requires = "model", conflicts_with_all = ["batch", "sequence_length"])]
    tokens: Option<PathBuf>,
    /// Time optimizer steps of N micro-batches, with clipping and AdamW, in place of passes over one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    micro_batches: Option<u32>,
    /// Timed passes, after three that are not
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    passes: u32,
    /// Seed of weights and tokens
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mixing {
    /// Linear attention
    Supra,
    /// Softmax attention
    Softmax,
}

impl From<Mixing> for AttentionKind {
    fn from(mixing: Mixing) -> AttentionKind {
        match mixing {
            Mixing::Supra => AttentionKind::Supra(SupraConfig::default()),
            Mixing::Softmax => AttentionKind::Softmax,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Keep {
    /// Everything
    Save,
    /// Results of matrix products; elementwise work is done again
    Lean,
    /// Only the input of each block
    Recompute,
}

/// Passes before the clock runs.
const WARMUP: u32 = 3;
/// Operations per second that utilization is of: an H100's and H200's matrix units in bf16, dense, by the datasheet.
const PEAK: f64 = 989e12;

/// The JSON answer.
#[derive(Serialize)]
struct Answer {
    device: String,
    parameters: i64,
    layers: i64,
    batch: i64,
    sequence_length: i64,
    documents: i64,
    /// Of an optimizer step; 0: forward and backward only.
    micro_batches: u32,
    policy: Keep,
    /// Median over the passes.
    milliseconds: f64,
    tokens_per_second: f64,
    /// Of the matrix units' peak in bf16, recomputation not counted.
    model_flops_utilization: f64,
    /// Device memory that the process holds at the end, if the device is a GPU.
    peak_bytes: Option<u64>,
    loss: f64,
    gradient_norm: f64,
    seconds: Vec<f64>,
    /// Where the time of a pass goes, with marks between the calls.
    components: Vec<Line>,
}

/// One component of a pass.
#[derive(Serialize)]
struct Line {
    component: Part,
    milliseconds: f64,
    /// Of the pass.
    share: f64,
    flops_per_second: f64,
    bytes_per_second: f64,
    /// What the GPU's peaks, of products or of memory, would allow at best.
    roofline_milliseconds: Option<f64>,
}

/// A component, or what no component took.
#[derive(Clone, Copy, Serialize)]
#[serde(untagged)]
enum Part {
    Of(Component),
    Rest(&'static str),
}

impl Bench {
    /// Measures and prints.
    pub fn execute(self) -> Result<(), Failure> {
        match self.what {
            What::Step(step) => step.execute(),
            What::Checkpoint(checkpoint) => checkpoint.execute(),
            What::Decode(decode) => decode.execute(),
            What::Prefill(prefill) => prefill.execute(),
            What::Flat(flat) => flat.execute(),
        }
    }
}

fn failed(error: &dyn Error) -> Failure {
    Failure::failed(chain(error))
}

impl Step {
    fn execute(self) -> Result<(), Failure> {
        let place = self.device.open()?;
        let precision = self.dtype.into();
        let (config, given) = match (&self.model, &self.tokens) {
            (Some(model), Some(tokens)) => {
                let config = ModelConfig::load(model)?;
                let given = given(model, &config, tokens)?;
                (config, Some(given))
            }
            _ => (self.config(), None),
        };
        let rows = given.as_ref().map_or_else(
            || vec![self.batch, self.sequence_length],
            |given| given.inputs_bt.size(),
        );
        let bench = StepBench {
            config,
            batch: rows[0],
            tokens: rows[1],
            documents: self.documents,
            policy: self.policy.into(),
            precision,
            micro_batches: self.micro_batches.unwrap_or(0),
            warmup: WARMUP,
            passes: self.passes,
            seed: i64::from(self.seed),
            given,
        };
        let choice = kernels::on(place.device, precision, &bench.config);
        let Choice { kernels, note } = choice.map_err(|error| failed(&error))?;
        if let Some(note) = note {
            out::complain(&format!("warning: {note}"));
        }
        let measured = bench.run(&place, kernels).map_err(|error| failed(&error))?;
        let answer = self.answer(&bench, &measured, &place);
        if self.json {
            return out::json(&answer);
        }
        out::line(&answer.components())?;
        out::line(&format!(
            "{:.1} ms, {:.0} tokens/s, {:.1} % of {:.0} TFLOP/s, {} on {}",
            answer.milliseconds,
            answer.tokens_per_second,
            100.0 * answer.model_flops_utilization,
            PEAK / 1e12,
            answer.peak_bytes.map_or("host memory".to_owned(), |bytes| {
                format!("{:.1} GB", bytes as f64 / 1e9)
            }),
            answer.device,
        ))
    }
}

impl Step {
    /// The model of random weights.
    fn config(&self) -> ModelConfig {
        let named = ModelConfig::named(self.shape.into());
        let named = named.with_attention(self.attention.into());
        ModelConfig {
            layers: self.layers.map_or(named.layers, u64::cast_signed),
            max_positions: self.sequence_length,
            ..named
        }
    }

    fn answer(&self, bench: &StepBench, measured: &Measured, place: &Place) -> Answer {
        let tokens = (bench.batch * bench.tokens) as f64 * f64::from(bench.micro_batches.max(1));
        let tokens_per_second = tokens / measured.median();
        Answer {
            device: place.model.clone(),
            parameters: measured.parameters,
            layers: bench.config.layers,
            batch: bench.batch,
            sequence_length: bench.tokens,
            documents: bench.documents,
            micro_batches: bench.micro_batches,
            policy: self.policy,
            milliseconds: measured.median() * 1e3,
            tokens_per_second,
            model_flops_utilization: tokens_per_second * flops_per_token(bench) / PEAK,
            peak_bytes: place.memory_in_use(),
            loss: measured.loss,
            gradient_norm: measured.gradient_norm,
            seconds: measured.seconds.clone(),
            components: lines(measured),
        }
    }
}

impl Answer {
    /// A table of the components.
    fn components(&self) -> String {
        let mut table =
            "component          ms    share   TFLOP/s     TB/s   roofline ms\n".to_owned();
        for line in &self.components {
            let name = match line.component {
                Part::Of(component) => format!("{component:?}").to_lowercase(),
                Part::Rest(name) => name.to_owned(),
            };
            let roofline = line
                .roofline_milliseconds
                .map_or("-".to_owned(), |milliseconds| format!("{milliseconds:.1}"));
            table += &format!(
                "{name:<12} {:>8.1} {:>7.1}% {:>9.1} {:>8.2} {roofline:>13}\n",
                line.milliseconds,
                100.0 * line.share,
                line.flops_per_second / 1e12,
                line.bytes_per_second / 1e12,
            );
        }
        table
    }
}

/// The components of a pass and, last, what none of them took: other operations of libtorch and an idle device.
fn lines(measured: &Measured) -> Vec<Line> {
    let whole = measured.watched * 1e3;
    let line = |component, cost: Cost| Line {
        component,
        milliseconds: cost.milliseconds,
        share: cost.milliseconds / whole,
        flops_per_second: cost.flops / cost.milliseconds * 1e3,
        bytes_per_second: cost.bytes / cost.milliseconds * 1e3,
        roofline_milliseconds: measured
            .bandwidth
            .map(|bandwidth| 1e3 * (cost.flops / PEAK).max(cost.bytes / bandwidth)),
    };
    let busy: f64 = measured
        .components
        .values()
        .map(|cost| cost.milliseconds)
        .sum();
    let rest = Cost {
        milliseconds: whole - busy,
        ..Cost::default()
    };
    let parts = measured.components.iter();
    parts
        .map(|(component, cost)| line(Part::Of(*component), *cost))
        .chain([line(Part::Rest("other, idle"), rest)])
        .collect()
}

fn flops_per_token(bench: &StepBench) -> f64 {
    let config = &bench.config;
    let attention = match config.attention {
        AttentionKind::Supra(_) => Attention::Supra,
        AttentionKind::Softmax => Attention::Softmax,
    };
    let chunk = SupraConfig::DEFAULT_CHUNK.cast_unsigned();
    let shape = config.shape();
    shape.flops_per_token(attention, bench.tokens.cast_unsigned(), chunk)
}

/// Weights and tokens that were written by another program.
fn given(model: &Path, config: &ModelConfig, tokens: &Path) -> Result<Given, Failure> {
    let (weights, _) = load_params(model, config, NewWeights::Refuse)?;
    let wrong = |cause: &str| {
        let path = tokens.display();
        Failure::input(format!(
            "{path}: {cause}. Needed are `inputs` and `targets`, i64 of one shape [B, T], below the vocabulary of {}",
            config.vocab
        ))
    };
    let named = Tensor::read_safetensors(tokens).map_err(|error| wrong(&error.to_string()))?;
    let ids = |name: &str| {
        let found = named.iter().find(|(there, _)| there == name);
        let (_, ids) = found.ok_or_else(|| wrong(&format!("no tensor `{name}`")))?;
        let fits = ids.kind() == Kind::Int64 && ids.dim() == 2 && ids.numel() > 0;
        if !fits || ids.min().int64_value(&[]) < 0 || ids.max().int64_value(&[]) >= config.vocab {
            return Err(wrong(&format!("`{name}` does not fit")));
        }
        Ok(ids.shallow_clone())
    };
    let (inputs_bt, targets_bt) = (ids("inputs")?, ids("targets")?);
    if inputs_bt.size() != targets_bt.size() {
        return Err(wrong("`inputs` and `targets` differ in shape"));
    }
    Ok(Given {
        weights,
        inputs_bt,
        targets_bt,
    })
}

impl From<Shape> for schema::Shape {
    fn from(shape: Shape) -> schema::Shape {
        match shape {
            Shape::Mistral7b => schema::Shape::Mistral7b,
            Shape::Llama2_7b => schema::Shape::Llama2_7b,
        }
    }
}

impl From<Keep> for Policy {
    fn from(keep: Keep) -> Policy {
        match keep {
            Keep::Save => Policy::Save,
            Keep::Lean => Policy::Lean,
            Keep::Recompute => Policy::Recompute,
        }
    }
}
