//! `supra plan`: what a recipe will do and need, before anything runs.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use supra_data::Manifest;
use supra_recipes::plan::{ModelShape, Needs, Rank, memory::CARDS};
use supra_recipes::schema::{Activations, Base, Chaos, CheckpointInterval};
use supra_recipes::{Plan as Order, Recipe};

use super::failure::{Exit, Failure, chain};
use super::format::{self, Table};
use super::out;
use super::runs::Json;
use crate::interval::{Bounds, Experience, time};

/// Arguments of `supra plan`.
#[derive(Args, Debug)]
pub struct Plan {
    /// Recipe (YAML)
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Workers, one per GPU, that share each step [default: workers.min of the recipe]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    gpus: Option<u32>,
    /// Directory with the config.json of the base [default: the recipe's base]
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    #[command(flatten)]
    json: Json,
}

/// Everything that the command shows; its JSON form is documented in docs/cli.md.
#[derive(Debug, Serialize)]
struct Preview {
    name: String,
    budget_tokens: u64,
    /// The budget cut to whole samples.
    tokens: u64,
    samples: u64,
    steps: u64,
    sequence_length: u64,
    batch_tokens: u64,
    last_step_tokens: u64,
    workers: u32,
    samples_per_worker: u64,
    micro_batch: u32,
    /// What the forward pass keeps for the backward pass.
    activations: Activations,
    schedule: Vec<Point>,
    /// Both `null` when the coordinator decides.
    checkpoints: Option<u64>,
    first_checkpoint_step: Option<u64>,
    /// With `checkpoint.every_tokens: auto`: what it comes to; else `null`.
    auto_checkpoints: Option<Auto>,
    /// Directory or URL that they are kept below; `null`: the coordinator's state directory.
    checkpoint_to: Option<String>,
    /// How often the held-out loss is measured; 0 without `eval`.
    evaluations: u64,
    /// Faults that the run inflicts on its own workers; `null` without.
    chaos: Option<Chaos>,
    /// Absent as long as the data is not there.
    data: Option<Data>,
    /// Parameters, memory, disk, operations; absent as long as the base is not there.
    needs: Option<Needs>,
    /// Why a part is absent.
    notes: Vec<String>,
}

/// How often checkpoints are written that the coordinator asks for.
#[derive(Debug, Serialize)]
struct Auto {
    /// Training time before the first, seconds.
    first_seconds: f64,
    /// What follows when it has shown what a checkpoint costs, as long as nothing fails.
    then: Vec<Guess>,
}

/// The interval that a cost leads to.
#[derive(Debug, Serialize)]
struct Guess {
    cost_seconds: f64,
    every_seconds: f64,
}

impl Auto {
    fn new(workers: u32) -> Auto {
        let bounds = Bounds::default();
        let after = |cost_seconds: f64| {
            let mut run = Experience::default();
            run.trained(0, workers, Some((cost_seconds * 1e3) as u64));
            let every_seconds = run.interval(workers, bounds).every.as_secs_f64();
            Guess {
                cost_seconds,
                every_seconds,
            }
        };
        Auto {
            first_seconds: bounds.least.as_secs_f64(),
            then: [1.0, 10.0, 100.0].map(after).into(),
        }
    }

    /// `auto: the first after 60 s of training, then every 22 min if one costs 1.0 s, …`
    fn text(&self) -> String {
        let guess = |guess: &Guess| {
            let (cost, every) = (time(guess.cost_seconds), time(guess.every_seconds));
            format!("every {every} if one costs {cost}")
        };
        let then: Vec<String> = self.then.iter().map(guess).collect();
        format!(
            "auto: the first after {} of training, then {}; more often when workers fail; and the last step",
            time(self.first_seconds),
            then.join(", ")
        )
    }
}

/// The learning rate at one step.
#[derive(Debug, Serialize)]
struct Point {
    step: u64,
    tokens: u64,
    learning_rate: f64,
}

/// What the training data holds, and how the budget goes over it.
#[derive(Debug, Serialize)]
struct Data {
    manifest: PathBuf,
    hash: String,
    files: usize,
    documents: u64,
    tokens: u64,
    windows: u64,
    /// Passes over the data that the budget takes.
    passes: f64,
    vocabulary: u32,
}

/// Shows the plan.
///
/// # Errors
/// A bad recipe, a damaged dataset or base, or a dataset that is too small for the budget. A
/// dataset or base that is not there yet is no error.
pub fn run(command: &Plan) -> Result<Exit, Failure> {
    let recipe =
        Recipe::load(&command.recipe).map_err(|error| Failure::input(error.to_string()))?;
    let workers = command.gpus.unwrap_or(recipe.workers.min).max(1);
    let preview = Preview::new(&recipe, workers, command.base.as_deref())?;
    if command.json.json {
        out::json(&preview)?;
    } else {
        out::text(&preview.render())?;
    }
    Ok(Exit::Done)
}

impl Preview {
    fn new(recipe: &Recipe, workers: u32, base: Option<&Path>) -> Result<Preview, Failure> {
        let mut notes = Vec::new();
        let manifest = manifest(&recipe.data.train, &mut notes)?;
        let shape = match (&recipe.base, base) {
            (Base::Random(shape), None) => Some((*shape).into()),
            (Base::Pretrained(path) | Base::Untrained(path), None) => shape(path, &mut notes)?,
            (_, Some(path)) => shape(path, &mut notes)?,
        };
        let length = u64::from(recipe.batch.sequence_length);
        // How much there is to do does not depend on the data: any that is large enough stands in.
        let (windows, hash) = manifest
            .as_ref()
            .map_or((u64::MAX, [0; 32]), |m| (m.windows(length), m.hash()));
        let order = Order::new(recipe, windows, hash)
            .map_err(|error| Failure::input(format!("{error}.")))?;
        let needs = shape
            .map(|shape| Needs::new(recipe, &shape, workers))
            .transpose();
        if let (Some(shape), Some(manifest)) = (&shape, &manifest)
            && u64::from(manifest.vocabulary()) > shape.vocab
        {
            notes.push(format!(
                "the data has {} token ids, the base only {}: it was made with another tokenizer",
                format::grouped(u64::from(manifest.vocabulary())),
                format::grouped(shape.vocab)
            ));
        }
        let due = |step: &u64| order.checkpoint_due(*step);
        let auto = recipe.checkpoint.every_tokens == CheckpointInterval::Auto;
        let to = recipe.checkpoint.to.as_ref();
        let share = order.rank_samples(1, 0, workers);
        Ok(Preview {
            name: recipe.name.as_str().to_owned(),
            budget_tokens: recipe.budget.tokens(),
            tokens: order.tokens_after(order.steps),
            samples: order.samples,
            steps: order.steps,
            sequence_length: length,
            batch_tokens: recipe.batch.tokens.get(),
            last_step_tokens: order.tokens_after(order.steps) - order.tokens_after(order.steps - 1),
            workers,
            samples_per_worker: share.end - share.start,
            micro_batch: recipe.batch.micro_batch,
            activations: recipe.batch.activations,
            schedule: schedule(recipe, &order),
            checkpoints: (!auto).then(|| (1..=order.steps).filter(due).count() as u64),
            first_checkpoint_step: (1..=order.steps).find(due).filter(|_| !auto),
            auto_checkpoints: auto.then(|| Auto::new(workers)),
            checkpoint_to: to.map(|to| to.display().to_string()),
            evaluations: evaluations(&order),
            chaos: recipe.chaos.clone(),
            data: manifest.map(|manifest| Data::new(&manifest, &order)),
            needs: needs.map_err(|error| Failure::input(format!("{error}.")))?,
            notes,
        })
    }

    fn render(&self) -> String {
        let mut text = format!("{}\n\n", self.name);
        text.push_str(&self.work().render());
        if let Some(data) = &self.data {
            text.push_str(&format!("\nData\n{}", data.table().render()));
        }
        text.push_str("\nLearning rate\n");
        let mut table = Table::new(&[">  STEP", ">TOKENS", ">RATE"]);
        for point in &self.schedule {
            let tokens = format::short(point.tokens as f64);
            table.row([
                format::grouped(point.step),
                tokens,
                format::learning_rate(point.learning_rate),
            ]);
        }
        text.push_str(&table.render());
        if let Some(needs) = &self.needs {
            text.push_str(&format!("\nNeeds\n{}", needs_table(needs).render()));
            text.push_str(&format!("\n{}", memory_table(&needs.rank).render()));
            text.push_str(&format!("\n{}", host_table(&needs.rank).render()));
            text.push_str(&format!("\n{}", workers_table(needs).render()));
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        for note in &self.notes {
            text.push_str(&format!("note: {note}\n"));
        }
        text
    }

    fn work(&self) -> Table {
        let mut table = Table::new(&["", ""]);
        let mut fact = |name: &str, value: String| table.row([format!("  {name}"), value]);
        let left = match self.budget_tokens - self.tokens {
            0 => String::new(),
            left => format!(
                ", {} less than the budget: no whole sample fits",
                format::grouped(left)
            ),
        };
        fact(
            "budget",
            format!("{} tokens{left}", format::grouped(self.tokens)),
        );
        let length = format::grouped(self.sequence_length);
        fact(
            "samples",
            format!("{} of {length} tokens", format::grouped(self.samples)),
        );
        let last = match self.last_step_tokens == self.batch_tokens {
            true => String::new(),
            false => format!(", the last of {}", format::grouped(self.last_step_tokens)),
        };
        let batch = format::grouped(self.batch_tokens);
        fact(
            "steps",
            format!("{} of {batch} tokens{last}", format::grouped(self.steps)),
        );
        let samples = format::counted(self.samples_per_worker, "sample");
        let workers = format::counted(u64::from(self.workers), "worker");
        fact(
            "per worker",
            format!(
                "{samples} a step in micro-batches of {}, with {workers}",
                self.micro_batch
            ),
        );
        let (count, first) = (self.checkpoints, self.first_checkpoint_step);
        if let Some((count, first)) = count.zip(first) {
            let (count, first) = (format::grouped(count), format::grouped(first));
            fact("checkpoints", format!("{count}, the first at step {first}"));
        }
        if let Some(auto) = &self.auto_checkpoints {
            fact("checkpoints", auto.text());
        }
        if let Some(to) = &self.checkpoint_to {
            fact("kept in", to.clone());
        }
        match self.evaluations {
            0 => {}
            count => {
                let count = format::grouped(count);
                fact(
                    "evaluations",
                    format!("{count}, the first before step 1, the last after the last step"),
                );
            }
        }
        if let Some(chaos) = &self.chaos {
            fact("chaos", chaos.warning());
        }
        table
    }
}

impl Data {
    fn new(manifest: &Manifest, order: &Order) -> Data {
        Data {
            manifest: manifest.path().to_owned(),
            hash: format::hex(&manifest.hash()),
            files: manifest.files().len(),
            documents: manifest.documents(),
            tokens: manifest.tokens(),
            windows: order.windows,
            passes: order.samples as f64 / order.windows as f64,
            vocabulary: manifest.vocabulary(),
        }
    }

    fn table(&self) -> Table {
        let mut table = Table::new(&["", ""]);
        let mut fact = |name: &str, value: String| table.row([format!("  {name}"), value]);
        fact("manifest", self.manifest.display().to_string());
        fact("hash", self.hash.clone());
        let documents = format::counted(self.documents, "document");
        let files = format::counted(self.files as u64, "file");
        fact(
            "tokens",
            format!("{} in {documents}, {files}", format::grouped(self.tokens)),
        );
        fact("windows", format::grouped(self.windows));
        fact("the budget is", format!("{:.3} passes", self.passes));
        fact("vocabulary", format::grouped(u64::from(self.vocabulary)));
        table
    }
}

fn needs_table(needs: &Needs) -> Table {
    let mut table = Table::new(&["", ""]);
    let mut fact = |name: &str, value: String| table.row([format!("  {name}"), value]);
    let (parameters, new) = (
        format::grouped(needs.parameters),
        format::grouped(needs.new_parameters),
    );
    fact("parameters", format!("{parameters}, {new} of them new"));
    fact(
        "sent per worker",
        format!(
            "{} a step",
            format::bytes(needs.wire_bytes_per_rank_per_step)
        ),
    );
    fact("checkpoint", format::bytes(needs.checkpoint_bytes));
    fact(
        "disk",
        format!(
            "{} for the checkpoints that are kept",
            format::bytes(needs.checkpoint_disk_bytes)
        ),
    );
    let all = needs.flops_per_token * needs.tokens as f64;
    fact(
        "operations",
        format!("{:.3e} a token, {all:.3e} in all", needs.flops_per_token),
    );
    table
}

/// What the GPU of a worker holds, by item, for each choice of activations; and what cards of usual sizes make of it.
fn memory_table(rank: &Rank) -> Table {
    let plans = &rank.memory_per_rank;
    let mut table = Table::new(&["Memory per GPU", ">SAVE", ">LEAN", ">RECOMPUTE", ""]);
    let mut row = |name: String, [save, lean, recompute]: [String; 3], about: &str| {
        table.row([format!("  {name}"), save, lean, recompute, about.to_owned()]);
    };
    for (item, component) in plans[0].components.iter().enumerate() {
        let sizes = plans
            .each_ref()
            .map(|plan| format::bytes(plan.components[item].bytes));
        let about = if component.estimate { "estimate" } else { "" };
        row(component.name.to_owned(), sizes, about);
    }
    let sums = plans.each_ref().map(|plan| format::bytes(plan.bytes));
    row("in all".to_owned(), sums, "");
    for fit in &rank.cards {
        let verdicts = plans.each_ref().map(|plan| {
            let verdict = match fit.policy {
                Some(policy) if policy == plan.policy => "taken",
                _ if plan.bytes <= fit.card.bytes => "fits",
                _ => "too large",
            };
            verdict.to_owned()
        });
        let size = format::bytes(fit.card.bytes);
        row(format!("card of {} ({size})", fit.card.name), verdicts, "");
    }
    table
}

/// What the copy of a checkpoint and snapshots take of a worker's host memory, by item; and of a host with all workers.
fn host_table(rank: &Rank) -> Table {
    let (copy, snapshots) = (&rank.checkpoint_copy_per_rank, &rank.snapshots_per_rank);
    let mut table = Table::new(&[
        "Host memory per GPU",
        ">CHECKPOINT",
        ">SNAPSHOTS",
        ">IN ALL",
    ]);
    let mut row = |name: &str, copy: u64, snapshots: u64| {
        let all = copy.saturating_add(snapshots);
        let [copy, snapshots, all] = [copy, snapshots, all].map(format::bytes);
        table.row([format!("  {name}"), copy, snapshots, all]);
    };
    for (of_copy, of_snapshots) in copy.components.iter().zip(&snapshots.components) {
        row(of_copy.name, of_copy.bytes, of_snapshots.bytes);
    }
    row("in all", copy.bytes, snapshots.bytes);
    if rank.world > 1 {
        let on_one_host = |bytes: u64| bytes.saturating_mul(rank.world.into());
        let name = format!("of {} GPUs of one host", rank.world);
        row(&name, on_one_host(copy.bytes), on_one_host(snapshots.bytes));
    }
    table
}

/// What the GPU of one of so many workers holds, and which activations cards of usual sizes have room for.
fn workers_table(needs: &Needs) -> Table {
    let mut table = Table::new(&[
        "GPUs",
        ">PARAMETERS",
        ">GRADIENTS",
        ">OPTIMIZER",
        ">EXCHANGE",
        ">IN ALL: SAVE",
        ">LEAN",
        ">RECOMPUTE",
        CARDS[0].name,
        CARDS[1].name,
    ]);
    for rank in &needs.by_workers {
        let plans = &rank.memory_per_rank;
        let size = |kinds: &[&str]| {
            let components = plans[0].components.iter();
            let of_kind =
                components.filter(|part| kinds.iter().any(|kind| part.name.ends_with(kind)));
            format::bytes(of_kind.map(|part| part.bytes).sum())
        };
        let [save, lean, recompute] = plans.each_ref().map(|plan| format::bytes(plan.bytes));
        let [small, large] = rank.cards.map(|fit| match fit.policy {
            Some(policy) => policy.to_string(),
            None => "too small".to_owned(),
        });
        table.row([
            format!("  {}", rank.world),
            size(&["parameters"]),
            size(&["fp32 gradients"]),
            size(&["masters", "moments"]),
            size(&["other ranks"]),
            save,
            lean,
            recompute,
            small,
            large,
        ]);
    }
    table
}

/// How often the plan has the held-out loss measured.
fn evaluations(order: &Order) -> u64 {
    let due = |step: &u64| order.evaluation_due(*step);
    (0..=order.steps).filter(due).count() as u64
}

/// First step, end of warm-up, quarters, last step.
fn schedule(recipe: &Recipe, order: &Order) -> Vec<Point> {
    let batch = recipe.batch.tokens.get();
    let warmup = recipe
        .optimizer
        .warmup
        .tokens(batch)
        .unwrap_or(u64::MAX)
        .div_ceil(batch);
    let quarter = |n: u64| (u128::from(order.steps) * u128::from(n) / 4) as u64;
    let mut steps = vec![1, warmup, quarter(1), quarter(2), quarter(3), order.steps];
    steps.retain(|step| (1..=order.steps).contains(step));
    steps.sort_unstable();
    steps.dedup();
    let point = |step| Point {
        step,
        tokens: order.tokens_after(step),
        learning_rate: order.learning_rate(step),
    };
    steps.into_iter().map(point).collect()
}

fn manifest(train: &Path, notes: &mut Vec<String>) -> Result<Option<Manifest>, Failure> {
    let file = if train.is_dir() {
        train.join("dataset.json")
    } else {
        train.to_owned()
    };
    if !file.exists() {
        notes.push(format!(
            "there is no dataset at {}: `supra data tokenize` or `supra data index` makes it",
            file.display()
        ));
        return Ok(None);
    }
    Manifest::load(train)
        .map(Some)
        .map_err(|error| Failure::input(chain(&error)))
}

fn shape(base: &Path, notes: &mut Vec<String>) -> Result<Option<ModelShape>, Failure> {
    let file = base.join("config.json");
    if !file.exists() {
        let file = file.display();
        notes.push(format!("there is no {file}, so memory and checkpoint size are unknown: --base DIR names another"));
        return Ok(None);
    }
    ModelShape::load(base)
        .map(Some)
        .map_err(|error| Failure::input(format!("{error}.")))
}
