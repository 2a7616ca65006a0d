//! What uptraining is worth: the quickstart's recipe from the pretrained base, and from random weights.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use supra_recipes::schema::{Budget, Recipe, Tokens, Weights};

use crate::campaigns::plot::{self, Curve};
use crate::cluster::Cluster;
use crate::failure::{Failure, Result, While};
use crate::process;
use crate::programs::{Programs, repository};
use crate::report::{Row, row};

/// What the report says above its table.
pub const ABOUT: &str = "The quickstart's recipe, once from the pretrained softmax base and once from random weights of the \
    same shape, on the same samples. Lines are the training loss (mean over a fiftieth of the budget), dots the loss on the \
    held-out text at each checkpoint; the flat line is the softmax base on the same held-out text. All losses are in nats per token.";

/// The campaign.
#[derive(Clone, Debug)]
pub struct Curves {
    /// Share of the quickstart's budget that is trained.
    pub fraction_of_budget: f64,
    /// Where the plot goes.
    pub plot: PathBuf,
}

/// Checkpoints of a run, each evaluated.
const CHECKPOINTS: u64 = 8;
/// Points of a line of training losses.
const POINTS: usize = 50;
const WORKERS: u32 = 2;
const RUN_LIMIT: Duration = Duration::from_secs(3600);
const EVALUATION_LIMIT: Duration = Duration::from_secs(600);

impl Curves {
    /// Runs the campaign and draws the plot.
    ///
    /// # Errors
    /// When a run or an evaluation fails, or random weights end no worse than the base's.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let recipe = prepare(self.fraction_of_budget)?;
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
            row(
                json!({"model": model, "tokens": tokens, "heldout_loss": loss, "perplexity": loss.exp()}),
            )
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

/// The quickstart's recipe with a share of its budget, and with checkpoints to evaluate.
fn prepare(fraction: f64) -> Result<Recipe> {
    let source = repository().join("recipes/quickstart.yaml");
    let mut recipe = Recipe::load(&source).map_err(|error| Failure::new(error.to_string()))?;
    let budget = (recipe.budget.tokens() as f64 * fraction) as u64;
    recipe.budget = Budget::exactly(Tokens(budget));
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
