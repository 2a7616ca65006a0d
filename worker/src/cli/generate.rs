//! `supra-worker generate`: continues a text.

use clap::Args;
use serde::Serialize;
use supra_checkpoint::fetch::ModelDirectory;
use supra_worker::inference::{
    engine::Engine,
    generate::{GenerateError, GenerateOptions, Generated, generate},
    load::LoadedModel,
    sampler::Sampling,
};

use super::{
    failure::Failure,
    options::{DeviceOptions, Dtype},
    out,
};

/// Continues prompts with a model directory or checkpoint. A SUPRA model runs as a recurrent network: memory and time
/// per token do not grow with the text.
#[derive(Debug, Args)]
pub struct Generate {
    /// Model directory, file of weights in one, checkpoint, or a checkpoint's URL (s3://, gs://)
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Text to continue; may be given several times
    #[arg(long, required = true, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Most new tokens per prompt
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_tokens: usize,
    /// Spread of the draws: 0 takes the likeliest token every time
    #[arg(long, default_value_t = 0.8, value_parser = not_negative)]
    temperature: f64,
    /// Draw only among the K likeliest tokens; 0 = all
    #[arg(long, default_value_t = 50, value_name = "K")]
    top_k: usize,
    /// Draw only among the likeliest tokens that together have probability P
    #[arg(long, default_value_t = 0.95, value_name = "P", value_parser = share)]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 17)]
    seed: u64,
    /// Number format to compute in
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Print one JSON object per prompt instead of the running text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

/// The JSON answer.
#[derive(Serialize)]
struct Answer<'a> {
    prompt: &'a str,
    text: &'a str,
    prompt_tokens: usize,
    tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
}

impl Generate {
    /// Generates and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let files = ModelDirectory::open(&self.model)?;
        let place = self.device.open()?;
        let model = LoadedModel::open(files.path(), place.device, self.dtype.into())?;
        out::complain(&format!("{}: {}", self.model, model.report));
        let tokenizer = model.tokenizer()?;
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                seed: self.seed,
            },
            stop: model.stop_tokens(),
        };
        let mut engine = Engine::new(model, 1).map_err(GenerateError::from)?;
        for prompt in &self.prompt {
            // A closed stdout shows at the next write; the rest of the text is then nobody's.
            let mut written = if self.json {
                Ok(())
            } else {
                out::write(prompt)
            };
            let emit = |piece: &str| {
                if !self.json && written.is_ok() {
                    written = out::write(piece);
                }
            };
            let generated = generate(&mut engine, &tokenizer, prompt, &options, emit)?;
            written?;
            self.conclude(prompt, &generated)?;
        }
        Ok(())
    }

    fn conclude(&self, prompt: &str, generated: &Generated) -> Result<(), Failure> {
        let (prefill, decode) = (
            generated.prefill.as_secs_f64(),
            generated.decode.as_secs_f64(),
        );
        if self.json {
            return out::json(&Answer {
                prompt,
                text: &generated.text,
                prompt_tokens: generated.prompt_tokens,
                tokens: generated.tokens,
                prefill_seconds: prefill,
                decode_seconds: decode,
            });
        }
        out::write("\n")?;
        out::complain(&format!(
            "[{} tokens in {decode:.2} s: {:.1} tokens/s; prompt of {} tokens in {prefill:.2} s]",
            generated.tokens,
            generated.tokens as f64 / decode.max(1e-9),
            generated.prompt_tokens
        ));
        Ok(())
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("a number from 0 on, such as 0.8".to_owned()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("a number above 0 and at most 1, such as 0.95".to_owned()),
    }
}
