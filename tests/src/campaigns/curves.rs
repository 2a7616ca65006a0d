//! What uptraining is worth: the quickstart's recipe from the pretrained base, and from random weights.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use supra_recipes::schema::{Budget, Recipe, Tokens, Warmup, Weights};

use crate::campaigns::plot::{self, Curve};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::process;
use crate::programs::{Programs, repository};
use crate::report::{Row, rounded};

/// What the report says above its table.
pub const ABOUT: &str = "The quickstart's recipe, once from the pretrained softmax base and once from random weights of the \
    same shape, on the same samples. Lines are the training loss (mean over a fiftieth of the budget), dots the loss on the \
    held-out text at each checkpoint; the flat line is the softmax base on the same held-out text. All losses are in nats per token.";

/// The campaign.
#[derive(Clone, Debug)]
pub struct Curves {
    /// The quickstart's budget is divided by this.
    pub shorter: u64,
    /// Where the plot goes.
    pub plot: PathBuf,
}

/// Checkpoints of a run, each evaluated.
const CHECKPOINTS: u64 = 8;
/// Points of a line of training losses.
const POINTS: usize = 50;
/// Documents that are held out, as scripts/quickstart does.
const HELDOUT: &str = "60";
const WORKERS: u32 = 2;
const RUN_LIMIT: Duration = Duration::from_secs(3600);
const EVALUATION_LIMIT: Duration = Duration::from_secs(600);

impl Curves {
    /// Runs the campaign and draws the plot.
    ///
    /// # Errors
    /// When a run or an evaluation fails, or random weights end no worse than the base's.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let recipe = prepare(programs, directory, self.shorter)?;
        let converted = directory.join("converted");
        let mut convert = programs.worker();
        convert
            .arg("convert")
            .arg("--base")
            .arg(&recipe.base.path)
            .arg("--out")
            .arg(&converted);
        process::run(convert, EVALUATION_LIMIT)?.expect_code(0)?;
        let base = evaluate(programs, &recipe, &recipe.base.path)?;
        let untrained = evaluate(programs, &recipe, &converted)?;

        let cluster = Cluster::with_workers(programs, &directory.join("cluster"), WORKERS)?;
        let uptrained = train(programs, &cluster, directory, &recipe, "uptrained")?;
        let mut random = recipe.clone();
        random.base.weights = Weights::Random;
        let random = train(programs, &cluster, directory, &random, "random")?;

        let tokens = recipe.budget.tokens() as f64;
        let flat = |label: &str, loss: f64, dots| Curve {
            label: label.to_owned(),
            points: vec![(0.0, loss), (tokens, loss)],
            dots,
        };
        let mut evaluated = uptrained.heldout.clone();
        evaluated.insert(0, (0.0, untrained));
        let curves = [
            Curve {
                label: "uptrained from the base, training".to_owned(),
                points: uptrained.training.clone(),
                dots: false,
            },
            Curve {
                label: "from random weights, training".to_owned(),
                points: random.training.clone(),
                dots: false,
            },
            flat("softmax base, held out", base, false),
            Curve {
                label: "uptrained, held out".to_owned(),
                points: evaluated,
                dots: true,
            },
            Curve {
                label: "from random weights, held out".to_owned(),
                points: random.heldout.clone(),
                dots: true,
            },
        ];
        plot::write(
            &self.plot,
            "SUPRA uptraining of the quickstart base",
            &curves,
        )?;
        let (up, scratch) = (uptrained.last()?, random.last()?);
        if scratch.is_nan() || scratch <= up {
            return Err(Failure::new(format!(
                "random weights end at {scratch}, uptrained ones at {up}"
            )));
        }
        let line = |model: &str, tokens: u64, loss: f64| {
            Row::new()
                .with("model", model)
                .with("tokens", tokens)
                .with("heldout_loss", rounded(loss, 4))
                .with("perplexity", rounded(loss.exp(), 2))
        };
        Ok(vec![
            line("softmax base", 0, base),
            line("converted, before uptraining", 0, untrained),
            line("uptrained", recipe.budget.tokens(), up),
            line(
                "same shape from random weights",
                recipe.budget.tokens(),
                scratch,
            ),
        ])
    }
}

/// Losses of one run over its tokens.
struct Trained {
    training: Vec<(f64, f64)>,
    heldout: Vec<(f64, f64)>,
}

impl Trained {
    fn last(&self) -> Result<f64> {
        self.heldout
            .last()
            .map(|point| point.1)
            .ok_or_else(|| Failure::new("no checkpoint was evaluated"))
    }
}

/// The quickstart's recipe over its text, shorter if wanted, and with checkpoints to evaluate.
fn prepare(programs: &Programs, directory: &Path, shorter: u64) -> Result<Recipe> {
    let source = repository().join("recipes/quickstart.yaml");
    let mut recipe = Recipe::load(&source).map_err(|error| Failure::new(error.to_string()))?;
    let tokens = directory.join("tokens");
    let mut tokenize = programs.supra();
    tokenize
        .args(["data", "tokenize"])
        .arg(repository().join("recipes/quickstart/text"));
    tokenize
        .arg("--output")
        .arg(&tokens)
        .arg("--tokenizer")
        .arg(&recipe.base.path);
    tokenize.args(["--heldout", HELDOUT]);
    process::run(tokenize, EVALUATION_LIMIT)?.expect_code(0)?;
    recipe.data.train = tokens.join("dataset.json");
    recipe.data.heldout = Some(tokens.join("heldout.json"));
    let budget = recipe.budget.tokens() / shorter;
    recipe.budget = Budget::exactly(Tokens(budget));
    if shorter > 1 {
        // As many steps as fit, after a short warm-up.
        let sample = u64::from(recipe.batch.sequence_length);
        recipe.batch.tokens = Tokens((recipe.batch.samples() / shorter).max(8) * sample);
        recipe.optimizer.warmup = Warmup::Steps(4);
    }
    recipe.checkpoint.every_tokens = Tokens((budget / CHECKPOINTS).max(1));
    recipe.checkpoint.keep = CHECKPOINTS as u32 + 1;
    Ok(recipe)
}

fn train(
    programs: &Programs,
    cluster: &Cluster,
    directory: &Path,
    recipe: &Recipe,
    name: &str,
) -> Result<Trained> {
    let path = directory.join(format!("{name}.yaml"));
    fs::write(&path, recipe.to_yaml())?;
    let run = cluster.submit(&path)?;
    cluster.wait_finished(&run, RUN_LIMIT).while_doing(name)?;
    let steps = cluster.metrics(&run)?;
    let chunks = steps.chunks(steps.len().div_ceil(POINTS).max(1));
    let training = chunks.map(|chunk| {
        let mean = chunk.iter().map(|step| step.loss).sum::<f64>() / chunk.len() as f64;
        (chunk.last().map_or(0.0, |step| step.tokens as f64), mean)
    });
    let mut heldout = Vec::new();
    for checkpoint in cluster.checkpoints(&run)? {
        let loss = evaluate(programs, recipe, Path::new(&checkpoint.path))?;
        heldout.push((checkpoint.tokens as f64, loss));
    }
    Ok(Trained {
        training: training.collect(),
        heldout,
    })
}

/// Mean loss per token of a model on the recipe's held-out text.
fn evaluate(programs: &Programs, recipe: &Recipe, model: &Path) -> Result<f64> {
    let heldout = recipe.data.heldout.as_ref();
    let heldout =
        heldout.ok_or_else(|| Failure::new("the quickstart's recipe has no held-out data"))?;
    let length = recipe.batch.sequence_length.to_string();
    let mut command = programs.worker();
    command
        .arg("eval")
        .arg("--model")
        .arg(model)
        .arg("--data")
        .arg(heldout);
    command.args(["--sequence-length", &length, "--json"]);
    let output = process::run(command, EVALUATION_LIMIT)?.expect_code(0)?;
    let answer: serde_json::Value = serde_json::from_str(&output.stdout)?;
    let loss = answer["loss"].as_f64();
    loss.ok_or_else(|| Failure::new(format!("eval --json has no `loss`: {answer}")))
}
