//! `supra-worker bench decode`, `prefill` and `flat`: how fast a model is at inference on this machine.

use clap::Args;
use serde::Serialize;
use supra_worker::{
    bench::decode::{self, Decoded, Far, Prefilled, random_model},
    inference::engine::Engine,
    model::{AttentionKind, ModelConfig, SupraConfig},
};

use super::{Mixing, Shape, failed};
use crate::cli::{
    failure::Failure,
    options::{DeviceOptions, Dtype},
    out,
};

/// What all three are told about the model.
#[derive(Debug, Args)]
struct Model {
    /// Shape of the model
    #[arg(long, value_enum, default_value_t = Shape::Mistral7b)]
    shape: Shape,
    /// Blocks [default: those of the shape]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    layers: Option<u64>,
    /// Number format to compute in; states are fp32
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Seed of the weights
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

#[derive(Debug, Args)]
struct Steps {
    /// Tokens per sequence and timing
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    steps: u32,
}

impl Model {
    fn engine(
        &self,
        device: tch::Device,
        attention: AttentionKind,
        slots: usize,
    ) -> Result<Engine, Failure> {
        let named = ModelConfig::named(self.shape.into()).with_attention(attention);
        let config = ModelConfig {
            layers: self.layers.map_or(named.layers, u64::cast_signed),
            ..named
        };
        let options = (self.dtype.into(), device);
        let model = random_model(config, options, i64::from(self.seed));
        let model = model.map_err(|error| failed(&error))?;
        Engine::new(model, slots).map_err(|error| failed(&error))
    }

    /// Prints a line for people.
    fn show(&self, text: &str) -> Result<(), Failure> {
        match self.json {
            true => Ok(()),
            false => out::line(text),
        }
    }
}

/// Times the next tokens of several sequences at once, with random weights.
#[derive(Debug, Args)]
pub struct Decode {
    #[command(flatten)]
    model: Model,
    #[command(flatten)]
    steps: Steps,
    /// Attention of the model
    #[arg(long, value_enum, default_value_t = Mixing::Supra)]
    attention: Mixing,
    /// Numbers of sequences
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256", value_name = "N,…", value_parser = sequences)]
    batches: Vec<usize>,
}

/// Times prompts, from their tokens to the first new one, with random weights.
#[derive(Debug, Args)]
pub struct Prefill {
    #[command(flatten)]
    model: Model,
    /// Attention of the model
    #[arg(long, value_enum, default_value_t = Mixing::Supra)]
    attention: Mixing,
    /// Tokens of prompts
    #[arg(long, value_delimiter = ',', default_value = "2048,8192,32768", value_name = "N,…", value_parser = tokens)]
    prompts: Vec<usize>,
}

/// Times the next token of longer and longer sequences of a SUPRA model, and of the softmax model of the same shape.
#[derive(Debug, Args)]
pub struct Flat {
    #[command(flatten)]
    model: Model,
    #[command(flatten)]
    steps: Steps,
    /// Tokens before the one that is timed
    #[arg(long, value_delimiter = ',', default_value = "1,1024,4096,16384,32768,65536,131072", value_name = "N,…", value_parser = tokens)]
    lengths: Vec<usize>,
}

/// The JSON answer of `decode`.
#[derive(Serialize)]
struct Decodes {
    device: String,
    parameters: i64,
    decode: Vec<Decoded>,
}

/// The JSON answer of `prefill`.
#[derive(Serialize)]
struct Prefills {
    device: String,
    parameters: i64,
    prefill: Vec<Prefilled>,
}

/// The JSON answer of `flat`.
#[derive(Serialize)]
struct Fars {
    device: String,
    supra: Vec<Far>,
    softmax: Vec<Far>,
}

impl Decode {
    /// Measures and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let place = self.model.device.open()?;
        let slots = self.batches.iter().copied().max().unwrap_or(1);
        let attention = self.attention.into();
        let mut engine = self.model.engine(place.device, attention, slots)?;
        let mut rows = Vec::new();
        for &batch in &self.batches {
            let row = decode::decode(&mut engine, batch, self.steps.steps);
            let row = row.map_err(|error| failed(&error))?;
            self.model.show(&format!(
                "{batch:>6} sequences: {:8.3} ms a step, {:9.1} tokens/s, {:5.1} % of an H200's bound",
                row.milliseconds,
                row.tokens_per_second,
                100.0 * row.share_of_bound
            ))?;
            rows.push(row);
        }
        if !self.model.json {
            return Ok(());
        }
        out::json(&Decodes {
            device: place.model,
            parameters: engine.model().params.elements(),
            decode: rows,
        })
    }
}

impl Prefill {
    /// Measures and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let place = self.model.device.open()?;
        let mut engine = self.model.engine(place.device, self.attention.into(), 1)?;
        let mut rows = Vec::new();
        for &length in &self.prompts {
            let row = decode::prefill(&mut engine, length).map_err(|error| failed(&error))?;
            self.model.show(&format!(
                "{length:>6} tokens of prompt: first new token after {:7.1} ms, {:9.1} tokens/s",
                1e3 * row.seconds,
                row.tokens_per_second
            ))?;
            rows.push(row);
        }
        if !self.model.json {
            return Ok(());
        }
        out::json(&Prefills {
            device: place.model,
            parameters: engine.model().params.elements(),
            prefill: rows,
        })
    }
}

impl Flat {
    /// Measures and prints.
    pub fn execute(mut self) -> Result<(), Failure> {
        self.lengths.sort_unstable();
        let place = self.model.device.open()?;
        let measure = |attention| {
            let mut engine = self.model.engine(place.device, attention, 1)?;
            let rows = decode::far(&mut engine, &self.lengths, self.steps.steps);
            rows.map_err(|error| failed(&error))
        };
        let supra = measure(AttentionKind::Supra(SupraConfig::default()))?;
        let softmax = measure(AttentionKind::Softmax)?;
        if self.model.json {
            let device = place.model;
            return out::json(&Fars {
                device,
                supra,
                softmax,
            });
        }
        for (supra, softmax) in supra.iter().zip(&softmax) {
            out::line(&format!(
                "{:>7} tokens: SUPRA {:8.3} ms, {:6.1} MB; softmax {:8.3} ms, {:8.1} MB",
                supra.tokens,
                supra.milliseconds,
                supra.bytes as f64 / 1e6,
                softmax.milliseconds,
                softmax.bytes as f64 / 1e6
            ))?;
        }
        Ok(())
    }
}

fn sequences(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err("a number from 1 to 1024".to_owned()),
    }
}

fn tokens(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=0x100_0000) => Ok(count),
        _ => Err("a number from 1 to 16777216".to_owned()),
    }
}
