//! What uptraining is worth: the quickstart's recipe from the pretrained base, and from random weights.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use supra_recipes::schema::{Base, Budget, Recipe, Tokens, Warmup};

use crate::campaigns::plot::{self, Curve, Frame};
use crate::cluster::{Cluster, Device};
use crate::failure::{Failure, Result, While};
use crate::models::{Evaluation, Text, convert, quickstart};
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
    /// Checkpoints of a run, each evaluated.
    pub checkpoints: u64,
    /// Windows of held-out text that an evaluation takes; all, if none.
    pub windows: Option<u64>,
    /// Where the plot goes.
    pub plot: PathBuf,
}

/// Points of a line of training losses.
const POINTS: usize = 50;
const WORKERS: u32 = 2;
const RUN_LIMIT: Duration = Duration::from_secs(3600);

impl Curves {
    /// Runs the campaign and draws the plot.
    ///
    /// # Errors
    /// When a run or an evaluation fails, or random weights end no worse than the base's.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let recipe = self.recipe(programs, directory)?;
        let study = Study {
            programs,
            directory,
            recipe: &recipe,
            windows: self.windows,
        };
        let base = study.evaluate(&quickstart("base"))?;
        let converted = directory.join("converted");
        convert(programs, &quickstart("base"), &converted)?;
        let untrained = study.evaluate(&converted)?;

        let cluster = Cluster::with_workers(programs, &directory.join("cluster"), WORKERS)?;
        let mut uptrained =
            study.train(&cluster, "uptrained", Base::Pretrained(quickstart("base")))?;
        uptrained.heldout.insert(0, (0.0, untrained));
        let random = study.train(&cluster, "random", Base::Untrained(quickstart("base")))?;

        let tokens = recipe.budget.tokens();
        let curves = [
            Curve::line(0, "uptrained: training", &uptrained.training),
            Curve::dots(0, "uptrained: held out", &uptrained.heldout),
            Curve::line(1, "random weights: training", &random.training),
            Curve::dots(1, "random weights: held out", &random.heldout),
            Curve::line(
                2,
                "softmax base: held out",
                &[(0.0, base), (tokens as f64, base)],
            ),
        ];
        let frame = Frame {
            title: "SUPRA uptraining of the quickstart's base",
            x: ("tokens trained (millions)", 1e6),
            y: "loss per token (nats)",
        };
        plot::write(&self.plot, &frame, &curves)?;

        let (up, scratch) = (uptrained.last()?, random.last()?);
        if scratch.is_nan() || scratch <= up {
            let text = format!("random weights end at {scratch}, uptrained ones at {up}");
            return Err(Failure::new(text));
        }
        Ok(vec![
            line("softmax base", 0, base),
            line("converted, before uptraining", 0, untrained),
            line("uptrained", tokens, up),
            line("same shape from random weights", tokens, scratch),
        ])
    }

    /// The quickstart's recipe over its text, shorter if wanted, and with checkpoints to evaluate.
    fn recipe(&self, programs: &Programs, directory: &Path) -> Result<Recipe> {
        let source = repository().join("recipes/quickstart.yaml");
        let mut recipe = Recipe::load(&source).map_err(|error| Failure::new(error.to_string()))?;
        let text = Text::tokenize(programs, &quickstart("text"), directory)?;
        recipe.data.train = text.train;
        recipe.data.heldout = Some(text.heldout);

        let budget = recipe.budget.tokens() / self.shorter;
        recipe.budget = Budget::exactly(Tokens(budget));
        if self.shorter > 1 {
            // As many steps as fit, after a short warm-up.
            let sample = u64::from(recipe.batch.sequence_length);
            recipe.batch.tokens = Tokens((recipe.batch.samples() / self.shorter).max(8) * sample);
            recipe.optimizer.warmup = Warmup::Steps(4);
        }
        recipe.checkpoint.every_tokens = Tokens((budget / self.checkpoints).max(1)).into();
        recipe.checkpoint.keep = u32::MAX;
        Ok(recipe)
    }
}

/// What all trainings and evaluations share.
struct Study<'a> {
    programs: &'a Programs,
    directory: &'a Path,
    recipe: &'a Recipe,
    windows: Option<u64>,
}

/// Losses of one run over its tokens.
struct Trained {
    training: Vec<(f64, f64)>,
    heldout: Vec<(f64, f64)>,
}

impl Trained {
    fn last(&self) -> Result<f64> {
        let last = self.heldout.last().map(|point| point.1);
        last.ok_or_else(|| Failure::new("no checkpoint was evaluated"))
    }
}

impl Study<'_> {
    fn train(&self, cluster: &Cluster, name: &str, base: Base) -> Result<Trained> {
        let mut recipe = self.recipe.clone();
        recipe.base = base;
        let path = self.directory.join(format!("{name}.yaml"));
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
            let loss = self.evaluate(Path::new(&checkpoint.path))?;
            heldout.push((checkpoint.tokens as f64, loss));
        }
        Ok(Trained {
            training: training.collect(),
            heldout,
        })
    }

    /// Mean loss per token of a model on the recipe's held-out text.
    fn evaluate(&self, model: &Path) -> Result<f64> {
        let heldout = self.recipe.data.heldout.as_ref();
        let heldout = heldout.ok_or_else(|| Failure::new("the recipe has no held-out data"))?;
        let evaluation = Evaluation {
            heldout,
            length: self.recipe.batch.sequence_length,
            windows: self.windows,
            device: Device::Cpu,
        };
        evaluation.loss(self.programs, model)
    }
}

/// A row of the report.
fn line(model: &str, tokens: u64, loss: f64) -> Row {
    Row::new()
        .with("model", model)
        .with("tokens", tokens)
        .with("heldout_loss", rounded(loss, 4))
        .with("perplexity", rounded(loss.exp(), 2))
}
