//! `supra-worker generate`: continues texts.

use std::{
    cell::Cell,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args};
use supra_checkpoint::fetch::ModelDirectory;
use supra_worker::inference::{
    compare::compare,
    completion::Limits,
    engine::Engine,
    generate::{Event, GenerateOptions, Start, encode, generate},
    load::LoadedModel,
    sampler::Sampling,
    saved,
};

use super::{
    failure::Failure,
    interrupt,
    options::{DeviceOptions, Dtype},
    out,
    texts::{Done, Style, Texts},
};

/// Continues prompts with a model directory or checkpoint. A SUPRA model runs as a recurrent network: memory and time per
/// token do not grow with the text; a softmax model keeps the keys and values of all tokens. Prompts are continued side by side and
/// printed in their order, each as it grows. Ctrl-C ends with exit code 130 after the character that is being written.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("start").required(true).multiple(true))]
pub struct Generate {
    /// Model directory, file of weights in one, checkpoint, or a checkpoint's URL (s3://, gs://); of a folder of a run's
    /// checkpoints, the newest complete one
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Text to continue; may be given several times
    #[arg(long, group = "start", value_name = "TEXT")]
    prompt: Vec<String>,
    /// File whose text to continue, without the line end that closes it; may be given several times; - reads standard input
    #[arg(long, group = "start", value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    /// State to go on from, as --save-state wrote it, behind which prompts are read; without one it goes on by itself
    #[arg(long, group = "start", value_name = "FILE")]
    load_state: Option<PathBuf>,
    /// File to keep the one text in with all that the model remembers of it. With --max-tokens 0 that is the prompt. Text that
    /// comes behind a stop string is remembered, too
    #[arg(long, value_name = "FILE")]
    save_state: Option<PathBuf>,
    /// Most new tokens per text
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_tokens: usize,
    /// Continuations of each prompt, which is read once; each has a seed of its own
    #[arg(short = 'n', long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    continuations: u16,
    /// Texts that are continued at once, at most
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Spread of the draws: 0 takes the likeliest token every time
    #[arg(long, default_value_t = 0.8, value_name = "T", value_parser = not_negative)]
    temperature: f64,
    /// Draw only among the K likeliest tokens; 0 = all
    #[arg(long, default_value_t = 50, value_name = "K")]
    top_k: usize,
    /// Draw only among the likeliest tokens that together have probability P
    #[arg(long, default_value_t = 0.95, value_name = "P", value_parser = share)]
    top_p: f64,
    /// Draw only among tokens at least P times as likely as the likeliest; 0 = all
    #[arg(long, default_value_t = 0.0, value_name = "P", value_parser = share_or_nothing)]
    min_p: f64,
    /// Divide positive logits of tokens that the text has by R, and multiply negative ones; 1 = off
    #[arg(long, default_value_t = 1.0, value_name = "R", value_parser = positive)]
    repetition_penalty: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 17)]
    seed: u64,
    /// End a text before this string; may be given several times
    #[arg(long, value_name = "STRING")]
    stop: Vec<String>,
    /// Tell the probability of each new token, and of the N likeliest in its place (natural logarithms)
    #[arg(long, value_name = "N", requires = "json")]
    logprobs: Option<u16>,
    /// Read each text, prompt and continuation, again in the parallel, the chunkwise and the recurrent form, and show how far their
    /// logits are apart. Exit code 4 when that is further than the number format explains: fp32 5e-4 times the greatest logit, bf16
    /// 1.5 times each form's own distance to fp32. Of long texts the first 4096 tokens
    #[arg(long)]
    compare: bool,
    /// Number format to compute in
    #[arg(long, value_enum, default_value_t)]
    dtype: Dtype,
    /// Print one JSON object per text instead of the running text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceOptions,
}

impl Generate {
    /// Generates and prints.
    pub fn execute(self) -> Result<(), Failure> {
        let prompts = self.prompts()?;
        let files = ModelDirectory::open(&self.model)?;
        let place = self.device.open()?;
        let model = LoadedModel::open(files.path(), place.device, self.dtype.into())?;
        out::complain(&format!("{}: {}", files.location(), model.report));
        let tokenizer = model.tokenizer()?;
        let from = match &self.load_state {
            Some(path) => Some(saved::read(path, &model)?),
            None => None,
        };
        let options = self.options(&model);
        let tokens: Result<Vec<_>, _> = prompts
            .iter()
            .map(|prompt| encode(&tokenizer, prompt, from.is_some()))
            .collect();
        let tokens = tokens?;
        let start = |tokens| Start {
            from: from.as_ref(),
            tokens,
        };
        let starts: Vec<Start<'_>> = tokens.iter().map(|tokens| start(tokens)).collect();
        let all = starts.len() * options.continuations;
        let slots = all.min(options.continuations.max(self.batch.into()));
        let mut engine = Engine::new(model, slots)?;

        let stop = interrupt::watch()?;
        let style = match self.json {
            false => Style::Running,
            true => Style::Json {
                logprobs: self.logprobs.is_some(),
                later: self.compare,
            },
        };
        let mut texts = Texts::new(&prompts, &tokenizer, options.continuations, style);
        // A closed stdout shows at the next write; the rest of the texts is then nobody's.
        let unheard = Cell::new(false);
        let mut written = Ok(());
        let tell = |event: Event<'_>| {
            if written.is_ok() {
                written = texts.hear(event);
                unheard.set(written.is_err());
            }
        };
        let enough = || stop() || unheard.get();
        generate(&mut engine, &tokenizer, &starts, &options, enough, tell)?;
        written?;
        let done = texts.done();
        self.save(engine.model(), &done)?;
        if stop() {
            return Err(Failure::Interrupted);
        }
        self.compare(&mut engine, &texts, &done)
    }

    /// The texts to continue; an empty one where only a saved one goes on.
    fn prompts(&self) -> Result<Vec<String>, Failure> {
        let mut prompts = self.prompt.clone();
        let mut stdin_is_read = false;
        for path in &self.prompt_file {
            if path == Path::new("-") && std::mem::replace(&mut stdin_is_read, true) {
                return Err(Failure::input(
                    "--prompt-file - is given twice, but standard input can be read only once"
                        .to_owned(),
                ));
            }
            prompts.push(prompt_of(path)?);
        }
        if prompts.is_empty() {
            prompts.push(String::new());
        }
        let texts = prompts.len() * usize::from(self.continuations);
        match &self.save_state {
            Some(path) if texts > 1 => Err(Failure::input(format!(
                "--save-state {} keeps one text, but there are {texts}: give one prompt, and no --continuations",
                path.display()
            ))),
            _ => Ok(prompts),
        }
    }

    fn options(&self, model: &LoadedModel) -> GenerateOptions {
        GenerateOptions {
            limits: Limits {
                max_tokens: self.max_tokens,
                stop_tokens: model.stop_tokens(),
                stop_strings: self.stop.clone(),
            },
            sampling: Sampling {
                repetition_penalty: self.repetition_penalty,
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed,
            },
            continuations: self.continuations.into(),
            logprobs: self.logprobs.map(usize::from),
            save: self.save_state.is_some(),
        }
    }

    fn save(&self, model: &LoadedModel, done: &[Done<'_>]) -> Result<(), Failure> {
        let Some(path) = &self.save_state else {
            return Ok(());
        };
        match done.iter().find_map(|done| done.generated.saved.as_ref()) {
            Some(text) => {
                saved::write(path, model, text)?;
                out::complain(&format!(
                    "[{} tokens and their state are in {}]",
                    text.tokens.len(),
                    path.display()
                ));
            }
            None => out::complain(&format!(
                "[nothing is kept in {}: the prompt was not read to its end]",
                path.display()
            )),
        }
        Ok(())
    }

    fn compare(
        &self,
        engine: &mut Engine,
        texts: &Texts<'_>,
        done: &[Done<'_>],
    ) -> Result<(), Failure> {
        if !self.compare {
            return Ok(());
        }
        let mut apart = 0;
        for done in done {
            let comparison = compare(engine, &done.generated.all_tokens)?;
            apart += usize::from(!comparison.agree());
            match self.json {
                true => texts.answer(done, Some(&comparison))?,
                false => out::line(&format!("\n{}{comparison}", texts.heading(done)))?,
            }
        }
        match apart {
            0 => Ok(()),
            _ => Err(Failure::broken(format!(
                "the forms of {} are further apart than {} explains, in {apart} of {} texts: what is generated is not what the \
                 model was trained to say. Damaged memory or a fault of this program; compare on another device",
                self.model,
                self.dtype.name(),
                done.len()
            ))),
        }
    }
}

/// The text of a file, without the line end that editors put behind the last line.
fn prompt_of(path: &Path) -> Result<String, Failure> {
    let stdin = path == Path::new("-");
    let name = match stdin {
        true => "standard input".to_owned(),
        false => path.display().to_string(),
    };
    let bytes = match stdin {
        true => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
        }
        false => fs::read(path),
    };
    let bytes =
        bytes.map_err(|error| Failure::input(format!("cannot read the prompt {name}: {error}")))?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::input(format!(
            "the prompt {name} is not UTF-8 text at byte {at}: convert it first"
        ))
    })?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(value),
        _ => Err("a number from 0 on, such as 0.8".to_owned()),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("a number above 0, such as 1.1".to_owned()),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("a number above 0 and at most 1, such as 0.95".to_owned()),
    }
}

fn share_or_nothing(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("a number from 0 to 1, such as 0.05".to_owned()),
    }
}
