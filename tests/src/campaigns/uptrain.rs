//! The whole method at once, by the orchestrator: a softmax model is pretrained from random weights and uptrained on 5 %
//! of its tokens, by one rank and by two.

use std::path::{Path, PathBuf};

use crate::cluster::{Cluster, Device};
use crate::failure::{Failure, Result};
use crate::models::{Evaluation, Shape, Text, convert};
use crate::programs::Programs;
use crate::report::{Row, rounded};
use crate::training::{Steps, Trained, Training};

/// What the report says above its table.
pub const ABOUT: &str = "A Llama of 29 M parameters (width 512, 9 blocks, 8 query heads on 4 key/value heads) is pretrained with \
    softmax attention from random weights, converted (32 M parameters) and uptrained on 5 % of the pretraining's tokens, beside the \
    same linear model trained on as many tokens from random weights; by one rank, and by two, which share a GPU where there is only \
    one. Every run goes through `supra-coordinator` and `supra-worker`; its ledger was audited. Losses are in nats per token of \
    64 held-out documents. `tok_s` counts training steps alone. The campaign fails if uptraining does not better the converted \
    model, or ends no better than random weights.";

const RANKS: [u32; 2] = [1, 2];
/// The 5 % of the paper.
const SHARE: u64 = 20;
/// How often pretraining goes through the text: more would teach a model of this size the text by heart.
const PASSES: u64 = 6;
/// What time allows on one GPU.
const MOST_TOKENS: u64 = 48_000_000;

/// The campaign.
#[derive(Clone, Debug)]
pub struct Uptrain {
    /// A small model and few tokens.
    pub quick: bool,
    /// Where it is trained.
    pub device: Device,
    /// Folder with parquet files of text, each document a row of the column `content`.
    pub text: PathBuf,
}

impl Uptrain {
    /// Trains with one rank and with two.
    ///
    /// # Errors
    /// When a run or an evaluation fails, an audit disagrees, or uptraining is of no use.
    pub fn run(&self, programs: &Programs, directory: &Path) -> Result<Vec<Row>> {
        let text = Text::tokenize(programs, &self.text, directory)?;
        let shape = directory.join("shape");
        let (size, pretraining) = if self.quick {
            (Shape::TINY, 400_000)
        } else {
            (Shape::SMALL, (PASSES * text.tokens).min(MOST_TOKENS))
        };
        size.write(&shape)?;
        let mut rows = Vec::new();
        for ranks in RANKS {
            let directory = directory.join(format!("ranks-{ranks}"));
            let study = Study {
                campaign: self,
                programs,
                text: &text,
                shape: &shape,
                cluster: Cluster::on(self.device, programs, &directory.join("cluster"), ranks)?,
                directory,
                ranks,
                pretraining,
            };
            rows.extend(study.run()?);
        }
        Ok(rows)
    }
}

/// One number of ranks.
struct Study<'a> {
    campaign: &'a Uptrain,
    programs: &'a Programs,
    text: &'a Text,
    /// Directory with the configuration alone.
    shape: &'a Path,
    cluster: Cluster,
    directory: PathBuf,
    ranks: u32,
    /// Tokens of pretraining.
    pretraining: u64,
}

impl Study<'_> {
    fn run(&self) -> Result<Vec<Row>> {
        let shape = format!("{{ path: {}, weights: random }}", self.shape.display());
        let uptraining = self.pretraining / SHARE;

        let training = Training {
            cluster: &self.cluster,
            device: self.campaign.device,
            ranks: self.ranks,
            text: self.text,
            steps: self.steps(),
            directory: &self.directory,
        };
        let base = training.run("base", "softmax", &shape, self.pretraining)?;
        let converted = self.directory.join("converted");
        convert(self.programs, &base.checkpoint, &converted)?;
        let from = format!("{{ path: {} }}", base.checkpoint.display());
        let uptrained = training.run("uptrained", "supra", &from, uptraining)?;
        let random = training.run("random", "supra", &shape, uptraining)?;

        let losses = [
            &base.checkpoint,
            &converted,
            &uptrained.checkpoint,
            &random.checkpoint,
        ]
        .map(|model| self.evaluate(model));
        let [base_loss, converted_loss, up_loss, random_loss] = losses;
        let (converted_loss, up_loss, random_loss) = (converted_loss?, up_loss?, random_loss?);
        let row = |model, tokens, loss: f64, speed: Option<f64>| {
            Row::new()
                .with("ranks", self.ranks)
                .with("model", model)
                .with("tokens", tokens)
                .with("heldout_loss", rounded(loss, 4))
                .with("perplexity", rounded(loss.exp(), 2))
                .with("tok_s", speed.map(f64::round))
        };
        let trained =
            |model, run: &Trained, loss| row(model, run.tokens, loss, Some(run.tokens_per_second));
        let rows = vec![
            trained("softmax base", &base, base_loss?),
            row("converted, before uptraining", 0, converted_loss, None),
            trained("uptrained", &uptrained, up_loss),
            trained("linear from random weights", &random, random_loss),
        ];
        let useful = up_loss < converted_loss && up_loss < random_loss;
        if !useful {
            return Err(Failure::new(format!(
                "ranks: {}: uptraining ends at {up_loss}: {converted_loss} before it, {random_loss} from random weights",
                self.ranks
            )));
        }
        Ok(rows)
    }

    fn steps(&self) -> Steps {
        if self.campaign.quick {
            Steps::QUICK
        } else {
            Steps {
                tokens: 16_384,
                micro_batch: 16,
                length: 512,
                lr: "1e-3",
            }
        }
    }

    fn evaluate(&self, model: &Path) -> Result<f64> {
        let evaluation = Evaluation {
            heldout: &self.text.heldout,
            length: self.steps().length,
            windows: self.campaign.quick.then_some(32),
            device: self.campaign.device,
        };
        evaluation.loss(self.programs, model)
    }
}
