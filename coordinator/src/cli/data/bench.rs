//! `supra data bench`: how fast training data is read here, in the order in which a run trains on it.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use supra_data::{DataError, Loader, Reader};
use supra_recipes::plan::Digest;
use supra_recipes::{Plan, Recipe};

use super::super::failure::Failure;
use super::super::format::{self, Table};
use super::super::out;
use super::super::runs::Json;

/// Arguments of `supra data bench`.
#[derive(Args, Debug)]
pub struct Bench {
    /// Recipe whose data, order and sequence length hold
    #[arg(long, value_name = "RECIPE")]
    recipe: PathBuf,
    /// Samples to read, from the run's first on [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    samples: Option<u64>,
    /// How often to read them: whatever is read for the first time is checked as a whole
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    #[command(flatten)]
    json: Json,
}

/// One pass over the samples, in one thread.
#[derive(Serialize)]
struct Round {
    seconds: f64,
    cpu_seconds: f64,
    tokens_per_second: f64,
    tokens_per_cpu_second: f64,
}

/// The answer.
#[derive(Serialize)]
struct Answer {
    samples: u64,
    tokens: u64,
    reading: Vec<Round>,
    /// The digests of the samples of one round, which a worker reports as fed: without reading.
    digests: Round,
}

/// Measures and prints.
pub fn run(command: &Bench) -> Result<(), Failure> {
    let recipe =
        Recipe::load(&command.recipe).map_err(|error| Failure::input(error.to_string()))?;
    let answer = measure(command, &recipe)?;
    if command.json.json {
        return out::json(&answer);
    }
    let mut table = Table::new(&["", "tokens/s", "tokens per CPU second"]);
    let mut row = |name: String, round: &Round| {
        let cells = [round.tokens_per_second, round.tokens_per_cpu_second];
        let [wall, cpu] = cells.map(|rate| format::grouped(rate as u64));
        table.row([name, wall, cpu]);
    };
    for (number, round) in (1..).zip(&answer.reading) {
        row(format!("round {number}"), round);
    }
    row("digests".to_owned(), &answer.digests);
    out::text(&table.render())
}

fn measure(command: &Bench, recipe: &Recipe) -> Result<Answer, Failure> {
    let failure = |error: DataError| super::failure(error);
    let length = u64::from(recipe.batch.sequence_length);
    let reader = Reader::open(&recipe.data.train, length).map_err(failure)?;
    let plan = Plan::new(recipe, reader.windows(), reader.manifest().hash())
        .map_err(|error| Failure::input(error.to_string()))?;
    let samples = command.samples.unwrap_or(plan.samples).min(plan.samples);
    let tokens = samples * length;
    let mut loader = Loader::new(reader, plan);
    let mut reading = Vec::new();
    for _ in 0..command.rounds {
        let clock = Clock::start()?;
        for i in 0..samples {
            black_box(loader.sample(i).map_err(failure)?);
        }
        reading.push(clock.round(tokens)?);
    }
    let sample = loader.sample(0).map_err(failure)?;
    let clock = Clock::start()?;
    let digests: Digest = (0..samples)
        .map(|i| Digest::of_sample(i, black_box(&sample.tokens)))
        .sum();
    black_box(digests);
    Ok(Answer {
        samples,
        tokens,
        reading,
        digests: clock.round(tokens)?,
    })
}

/// Time on the wall, and of the processor in this thread.
struct Clock {
    wall: Instant,
    cpu: f64,
}

impl Clock {
    fn start() -> Result<Clock, Failure> {
        Ok(Clock {
            cpu: cpu_seconds()?,
            wall: Instant::now(),
        })
    }

    fn round(self, tokens: u64) -> Result<Round, Failure> {
        let seconds = self.wall.elapsed().as_secs_f64();
        let cpu_seconds = cpu_seconds()? - self.cpu;
        Ok(Round {
            seconds,
            cpu_seconds,
            tokens_per_second: tokens as f64 / seconds,
            tokens_per_cpu_second: tokens as f64 / cpu_seconds,
        })
    }
}

fn cpu_seconds() -> Result<f64, Failure> {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map_err(|error| Failure::failed(format!("the system tells no processor time: {error}")))?;
    Ok(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}
